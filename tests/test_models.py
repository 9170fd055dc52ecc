"""models.py: the registry, weights in every layout and every state of damage, preprocessing, students, features."""

import dataclasses
import hashlib
import http.server
import os
import pickle
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, torchrun
from PIL import Image
from safetensors.torch import load_file, save_file

from g2l.devices import pick_device
from g2l.errors import PatchError, UserError
from g2l.features import SAVE_SECONDS, extract_features
from g2l.models import (
    Model,
    _build,
    build_parser,
    fitting_batch_size,
    flops_per_image,
    load_model,
    main,
    resize_and_crop,
    save_student,
)
from g2l.ranks import setup_distributed
from g2l.registry import REGISTRY
from g2l.weights import WEIGHT_FILES, parse_weights

TINY = dict(embed_dim=32, depth=2, num_heads=2)


def images(n, height=64, width=64, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


def batch(*arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture
def tiny(monkeypatch):
    """A registry entry small enough to run: a SwiGLU ViT with registers, as H-optimus and Hibou are."""
    entry = dataclasses.replace(REGISTRY["hibou-l"], args=TINY, hub="lab/tiny", dim=32)
    monkeypatch.setitem(REGISTRY, "tiny", entry)
    return "tiny"


@pytest.fixture(scope="module")
def vit():
    return load_model("timm:test_vit", "random", input_size=64)


# ---- registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_each_entry_builds_as_stated(name):
    entry = REGISTRY[name]
    args = dict(img_size=224, init_values=1e-5, global_pool="token", **entry.args)
    net = _build(entry.timm, args, name, empty=True)
    assert next(net.parameters()).is_meta  # so this costs no memory
    assert sum(p.numel() for p in net.parameters()) == entry.parameters
    assert net.num_prefix_tokens == entry.prefix and all(
        block.attn.fused_attn for block in net.blocks
    )
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, 224, 224)}
    with torch.device("meta"):
        model = Model(
            net, name=name, embedding=entry.embedding, dtype=torch.float32, weights="file"
        )
        x = torch.zeros(2, 3, 224, 224)
        assert model(x).shape == (2, entry.dim) and model.dim == entry.dim
        patches = (224 // entry.args.get("patch_size", 16 if "16" in entry.timm else 14)) ** 2
        assert model.tokens(x).shape == (2, entry.prefix + patches, model.tokens_dim)


@pytest.mark.parametrize("name, gflops", [("h-optimus-0", 608), ("hibou-l", 165)])
def test_flops_are_those_worked_out_by_hand(name, gflops):
    entry = REGISTRY[name]
    net = _build(entry.timm, dict(img_size=224, init_values=1e-5, **entry.args), name, empty=True)
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, 224, 224)}
    with torch.device("meta"):
        model = Model(net, name=name, embedding="cls", dtype=torch.float32, weights="file")
    assert flops_per_image(model) / 1e9 == pytest.approx(gflops, rel=0.01)


def test_table_and_speed_commands():
    done = run("g2l.models")
    assert done.returncode == 0 and all(f"\n{name} " in "\n" + done.stdout for name in REGISTRY)
    assert (
        "303,657,216" in done.stdout and "CC-BY-NC-ND-4.0" in done.stdout and "gated" in done.stdout
    )
    assert max(map(len, done.stdout.splitlines())) <= 120
    done = run("g2l.models", "--speed", "timm:test_vit", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[2].split()
    assert row[0] == "timm:test_vit" and row[-2].endswith("%") and 0 < float(row[-2][:-1]) <= 150


def test_unknown_names_say_what_is_near():
    with pytest.raises(UserError, match="did you mean hibou-l"):
        load_model("hibou_l", "random")
    with pytest.raises(UserError, match="resnet10t"):
        load_model("timm:resnet10", "random")


# ---- key maps, against transformers' own networks -----------------------------------------------------------------


def published(tmp_path_factory, kind, **config):
    """(folder as published, its tensors, normalised images, all tokens after the final norm) from transformers."""
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, f"{kind}Model"), getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    net = make[0](make[1](image_size=224, layerscale_value=1.0, **config)).eval()
    with torch.no_grad():  # every tensor matters: no zero bias hides a swap
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        x = torch.randn(1, 3, 224, 224)
        tokens = net(pixel_values=x).last_hidden_state
    folder = tmp_path_factory.mktemp(kind)
    net.save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors"), x, tokens


@pytest.fixture(scope="module")
def hibou_b(tmp_path_factory):
    return published(
        tmp_path_factory,
        "Dinov2WithRegisters",
        patch_size=14,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        use_swiglu_ffn=True,
        num_register_tokens=4,
    )


@pytest.fixture(scope="module")
def hibou_l(tmp_path_factory):
    """Hibou-L's widths with 2 of its 24 blocks."""
    return published(
        tmp_path_factory,
        "Dinov2WithRegisters",
        patch_size=14,
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
        use_swiglu_ffn=True,
        num_register_tokens=4,
    )


@pytest.fixture
def short_l(monkeypatch):
    for name in ("hibou-l", "phikon-v2"):
        entry = REGISTRY[name]
        monkeypatch.setitem(
            REGISTRY, name, dataclasses.replace(entry, args={**entry.args, "depth": 2})
        )


def off(name, weights, x, tokens):
    """Largest difference of any token, relative to the spread of tokens."""
    with torch.no_grad():
        return float((load_model(name, str(weights)).tokens(x) - tokens).abs().max() / tokens.std())


def test_hibou_b_equals_transformers(hibou_b):
    folder, state, x, tokens = hibou_b
    assert {
        "embeddings.position_embeddings",
        "encoder.layer.0.attention.attention.query.weight",
        "encoder.layer.0.mlp.weights_in.weight",
        "layernorm.weight",
    } <= set(state)  # the layout on the hub
    assert off("hibou-b", folder, x, tokens) < 1e-4
    model = load_model("hibou-b", str(folder / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model(x), tokens[:, 0], rtol=1e-4, atol=1e-4)


def test_hibou_b_in_the_layout_of_dinov2_itself(hibou_b, tmp_path):
    _, state, x, tokens = hibou_b
    out = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "register_tokens": state["embeddings.register_tokens"],
        "mask_token": state["embeddings.mask_token"],
    }
    for i in range(12):
        old, new = f"encoder.layer.{i}.", f"blocks.{i}."
        for w in ("weight", "bias"):
            out[new + f"attn.qkv.{w}"] = torch.cat(
                [state[old + f"attention.attention.{p}.{w}"] for p in ("query", "key", "value")]
            )
            for a, b in (
                ("attention.output.dense", "attn.proj"),
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                ("mlp.weights_in", "mlp.w12"),
                ("mlp.weights_out", "mlp.w3"),
            ):
                out[f"{new}{b}.{w}"] = state[f"{old}{a}.{w}"]
        out[new + "ls1.gamma"], out[new + "ls2.gamma"] = (
            state[f"{old}layer_scale{k}.lambda1"] for k in (1, 2)
        )
    for w in ("weight", "bias"):
        out[f"norm.{w}"] = state[f"layernorm.{w}"]
        out[f"patch_embed.proj.{w}"] = state[f"embeddings.patch_embeddings.projection.{w}"]
    torch.save(out, tmp_path / "hibou-b.pth")
    assert off("hibou-b", tmp_path / "hibou-b.pth", x, tokens) < 1e-4


def test_hibou_l_equals_transformers_and_each_wrong_map_is_caught(hibou_l, short_l, tmp_path):
    folder, state, x, tokens = hibou_l
    assert off("hibou-l", folder, x, tokens) < 1e-4

    def corrupted(change):
        bad = dict(state)
        change(bad)
        save_file({k: v.contiguous() for k, v in bad.items()}, tmp_path / "bad.safetensors")
        return off("hibou-l", tmp_path / "bad.safetensors", x, tokens)

    def unfolded(s):  # as if the class slot of the position embedding were dropped
        s["embeddings.position_embeddings"] = s["embeddings.position_embeddings"].clone()
        s["embeddings.position_embeddings"][:, 0] = 0

    def swapped(s):
        for key in [k for k in s if "weights_in" in k]:
            gate, value = s[key].chunk(2)
            s[key] = torch.cat([value, gate])

    def shuffled(s):
        for key in [k for k in s if ".query." in k]:
            s[key], s[key.replace("query", "value")] = s[key.replace("query", "value")], s[key]

    assert corrupted(lambda s: None) < 1e-4
    for lost in ("encoder.layer.1.attention.attention.key.weight", "embeddings.cls_token"):
        with pytest.raises(UserError, match="missing"):
            corrupted(lambda s, lost=lost: s.pop(lost))
    for change in (unfolded, swapped, shuffled):
        assert corrupted(change) > 0.01, change.__name__


def test_phikon_equals_transformers(tmp_path_factory, short_l):
    folder, _, x, tokens = published(
        tmp_path_factory,
        "Dinov2",
        patch_size=16,
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
    )
    assert off("phikon-v2", folder, x, tokens) < 1e-4


def test_check_names_the_model_that_a_file_fits(hibou_b, capsys):
    folder = hibou_b[0]
    assert main(["--check", str(folder)]) == 0
    assert "fits h0-mini and hibou-b" in capsys.readouterr().out
    assert main(["hibou-b", "--check", str(folder), "--device", "cpu"]) == 0
    assert "85,739,520" in capsys.readouterr().out
    assert main(["uni", "--check", str(folder)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and "They fit h0-mini and hibou-b" in error
        and "instead of" in error
    )


# ---- weights: every kind, every damage ----------------------------------------------------------------------------


def test_random_weights_are_the_same_bits_and_leave_the_global_state_alone(tiny):
    torch.manual_seed(1)
    expected = torch.rand(3)
    for name in ("tiny", "timm:test_resnet", "timm:test_vit"):
        torch.manual_seed(1)
        first = load_model(name, "random")
        torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
        torch.manual_seed(2)
        assert load_model(name, "random").fingerprint == first.fingerprint
    assert load_model("timm:test_vit2", "random").fingerprint != first.fingerprint
    assert all(p.requires_grad and not p.is_meta for p in load_model("tiny", "random").parameters())


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


def damage(kind, folder, state):
    file = folder / "w.safetensors"
    save_file(state, file)
    if kind == "missing":
        file.unlink()
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    elif kind == "cut safetensors":
        file.write_bytes(file.read_bytes()[:-50])
    elif kind == "html":
        file.write_text("<html>Please log in</html>" * 10)
    elif kind == "empty folder":
        file.unlink()
        file = folder
    elif kind == "renamed":
        save_file({f"x.{k}": v for k, v in state.items()}, file)
    elif kind == "one tensor less":
        save_file({k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}, file)
    else:
        file = folder / "w.bin"
        if kind == "cut bin":
            torch.save(state, file)
            file.write_bytes(file.read_bytes()[:-200])
        elif kind == "hostile":
            torch.save({**state, "extra": Bomb()}, file)
        elif kind == "hostile old pickle":
            file.write_bytes(pickle.dumps(Bomb()))
        elif kind == "whole network":
            torch.save(torch.nn.Linear(2, 2), file)
        elif kind == "no tensors":
            torch.save({"epoch": 3}, file)
        elif kind == "no names":
            torch.save(dict(enumerate(state.values())), file)
        elif kind == "empty":
            file.write_bytes(b"")
    return file


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "no such file"),
        ("pointer", "git lfs pull"),
        ("cut safetensors", "cut short"),
        ("html", "no safetensors file"),
        ("empty folder", "no weights in this folder"),
        ("renamed", "tensors missing .*not expected"),
        ("one tensor less", r"1 tensors missing \(blocks.1.mlp.fc1.bias\)"),
        ("cut bin", "cut short"),
        ("hostile", "refused"),
        ("hostile old pickle", "refused"),
        ("whole network", "refused"),
        ("no names", "names and tensors.* found dict of 0, 1, 2"),
        ("no tensors", "expected a state dict .* found dict of epoch"),
        ("empty", "cut short|refused"),
    ],
)
def test_damaged_weights_give_one_clear_message_and_run_nothing(
    kind, says, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    file = damage(kind, tmp_path, load_model(tiny, "random").net.state_dict())
    with pytest.raises(UserError, match=says) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about an old pickle
        load_model(tiny, str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value), "no advice to load it all the same"
    assert not (tmp_path / "exploded").exists()


def test_check_finds_a_changed_byte_that_pytorch_does_not(tmp_path, capsys):
    file = tmp_path / "w.bin"
    torch.save(load_model("timm:test_vit", "random").net.state_dict(), file)
    assert main(["timm:test_vit", "--check", str(file)]) == 0
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["timm:test_vit", "--check", str(file)]) == 1
    assert "damaged, checksum of" in capsys.readouterr().err


def test_weights_of_every_kind_give_the_same_model(tiny, tmp_path):
    model = load_model(tiny, "random")
    state = model.net.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "w.bin")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    heads = {
        "teacher": {
            **{f"backbone.{k}": v for k, v in state.items()},
            "dino_head.mlp.weight": torch.ones(3),
        }
    }
    torch.save(heads, tmp_path / "training.pth")
    for file in ("", "model.safetensors", "w.bin", "w.pt", "old.pth", "training.pth"):
        assert load_model(tiny, str(tmp_path / file)).fingerprint == model.fingerprint
    with torch.no_grad():  # training goes on in memory, not in the file
        for p in load_model(tiny, str(tmp_path)).parameters():
            p.add_(1)
    assert load_model(tiny, str(tmp_path)).fingerprint == model.fingerprint
    state["norm.bias"] = state["norm.bias"] + 1e-6
    save_file(state, tmp_path / "model.safetensors")
    assert load_model(tiny, str(tmp_path)).fingerprint != model.fingerprint
    assert (
        load_model(tiny, str(tmp_path / "w.bin"), input_size=112).fingerprint != model.fingerprint
    )


def test_a_classifier_in_the_file_is_left_out(tmp_path):
    import timm

    net = timm.create_model("test_resnet", num_classes=7)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = load_model("timm:test_resnet", str(tmp_path / "w.safetensors"))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), net.eval().forward_head(net.forward_features(x), pre_logits=True)
        )


def test_folders_that_are_no_student(tmp_path, tiny):
    with pytest.raises(UserError, match=r"no config.json"):
        load_model(str(tmp_path))
    for text, says in (
        ("{", "not a timm configuration"),
        ("[]", "not a timm configuration"),
        ('{"model_type": "dinov2"}', "transformers' format"),
        ('{"architecture": "no_such_net"}', "no architecture"),
        ('{"architecture": "hf-hub:evil/net"}', "no architecture"),
        ('{"architecture": "test_vit", "model_args": {"nonsense": 1}}', "cannot build"),
        ('{"architecture": "test_vit", "model_args": {"checkpoint_path": "/x"}}', "may not hold"),
        ('{"architecture": "test_vit", "mean": [0.5]}', "mean is"),
        ('{"architecture": "test_vit", "std": [1, 1, 0]}', "std is"),
        ('{"architecture": "test_vit"}', "no weights in this folder"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=says):
            load_model(str(tmp_path))


def test_numbers_that_cannot_be_are_named(capsys):
    for flag in ("--input-size", "--batch-size"):
        for value in ("0", "-16"):
            assert main(["--speed", "timm:test_vit", flag, value]) == 1
            assert capsys.readouterr().err == f"error: {flag} {value}: expected at least 1\n"


def test_parse_weights(tmp_path):
    names = ["h-optimus-0", "timm:resnet10t", str(tmp_path)]
    assert parse_weights(None, names) == dict.fromkeys(names)
    assert parse_weights(["random"], names) == {
        "h-optimus-0": "random",
        "timm:resnet10t": "random",
        str(tmp_path): None,
    }
    assert parse_weights(["random", "h-optimus-0=a=b.bin"], names)["h-optimus-0"] == "a=b.bin"
    assert parse_weights(["h-optimus-0=a.bin", "random"], names)["h-optimus-0"] == "a.bin"
    assert parse_weights(["runs/a=1/student=w.bin"], ["runs/a=1/student"]) == {
        "runs/a=1/student": "w.bin"
    }
    assert parse_weights(["w.bin"], names[:1]) == {"h-optimus-0": "w.bin"}
    for bad in ("w.bin", "uni=w.bin"):
        with pytest.raises(UserError, match="for which model"):
            parse_weights([bad], names)


# ---- the hub ------------------------------------------------------------------------------------------------------


def point_hub_at(url, monkeypatch):
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    for module in ("constants", "file_download"):  # older clients hold a copy
        monkeypatch.setattr(
            f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False
        )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local server with the hub's interface for resolving files; `hub.files` maps path to bytes or to a fault."""
    constants = pytest.importorskip("huggingface_hub.constants")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.seen.append((self.command, self.path, self.headers.get("Authorization")))
            repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
            body = server.files.get(
                f"{repository}/{file}", server.files.get(repository, "EntryNotFound")
            )
            if isinstance(body, str):
                self.send_response(
                    {"GatedRepo": 403, "RepoNotFound": 401, "EntryNotFound": 404}.get(body, 500)
                )
                self.send_header("X-Error-Code", body)
                self.send_header("X-Error-Message", body)
                body = b""
            else:
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.seen = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_hub_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.constants = constants
    server.reset = getattr(
        pytest.importorskip("huggingface_hub.utils"), "reset_sessions", lambda: None
    )
    server.reset()  # older clients keep a session that knows whether it is offline
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("file", WEIGHT_FILES)
def test_weights_come_from_the_hub_and_then_from_its_cache(
    file, hub, tiny, tmp_path, monkeypatch, capsys
):
    state = load_model(tiny, "random").net.state_dict()
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    hub.files[f"lab/tiny/{file}"] = (tmp_path / file).read_bytes()
    first = load_model(tiny)
    assert any(token == "Bearer hf_secret" for _, _, token in hub.seen)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    hub.reset()
    assert (
        load_model(tiny).fingerprint == first.fingerprint == load_model(tiny, "random").fingerprint
    )
    assert main([tiny, "--device", "cpu"]) == 0 and not hub.seen
    blob = next(p for p in tmp_path.glob("cache/*/blobs/*") if len(p.name) == 64)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    assert main([tiny, "--device", "cpu"]) == 1 and "SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault, says",
    [
        (
            "GatedRepo",
            "gated; ask for access on https://huggingface.co/lab/tiny, then `hf auth login` or set HF_TOKEN",
        ),
        ("RepoNotFound", "does not exist or is hidden without a token"),
        ("EntryNotFound", "holds none of model.safeten"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("down", "the hub cannot be reached"),
    ],
)
def test_hub_refusals_say_what_to_do(fault, says, hub, tiny, monkeypatch):
    hub.files["lab/tiny"] = fault
    if fault == "offline":
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    if fault == "down":
        monkeypatch.setattr(
            "huggingface_hub.utils._http.time.sleep", lambda seconds: None
        )  # it would retry for 20 s
        point_hub_at("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(UserError, match=says) as error:
        load_model(tiny)
    assert "--weights tiny=FILE" in str(error.value)


def test_a_timm_model_without_network_says_so(hub, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.reset()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_model("timm:resnet10t")


def test_no_network_is_touched_when_weights_are_given(hub, tiny, tmp_path):
    save_file(load_model(tiny, "random").net.state_dict(), tmp_path / "w.safetensors")
    load_model(tiny, str(tmp_path / "w.safetensors"))
    load_model("timm:test_resnet", "random")
    assert not hub.seen


# ---- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["h-optimus-0", "hibou-l", "uni2-h", "virchow2", "prov-gigapath", "phikon-v2"]
)
@pytest.mark.parametrize("shape", [(256, 256), (224, 224), (300, 230), (150, 200)])
def test_preprocess_equals_the_published_transform(name, shape, monkeypatch):
    from torchvision import transforms as T

    entry = REGISTRY[name]
    monkeypatch.setitem(
        REGISTRY, name, dataclasses.replace(entry, timm="test_vit", args={}, embedding="cls")
    )
    model = load_model(name, "random")
    how = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}[
        entry.interpolation
    ]
    reference = T.Compose(
        [
            T.Resize(256 if name == "prov-gigapath" else 224, interpolation=how),
            T.CenterCrop(224),
            T.ToTensor(),
            T.Normalize(*entry.norm),
        ]
    )
    smooth = np.asarray(Image.fromarray(images(1, 20, 20)[0]).resize(shape[::-1], Image.BICUBIC))
    for image in (images(1, *shape)[0], smooth):
        got = model.preprocess(batch(image, image))
        levels = (
            (got[0] - reference(Image.fromarray(image))).abs()
            * torch.tensor(entry.norm[1]).view(3, 1, 1)
            * 255
        )
        assert got.shape == (2, 3, 224, 224) and got.dtype == torch.float32
        # grey levels; PIL and torch round after each of two passes, and now and then apart
        assert (
            levels.max() < 2.01 and levels.mean() < 0.05 and (levels > 1.01).float().mean() < 1e-3
        )


def test_timm_models_bring_their_own_transform(tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    model = load_model("timm:resnet10t", "random")
    reference = create_transform(**resolve_model_data_config(model.net))
    image = images(1, 250, 190)[0]
    levels = (
        (model.preprocess(batch(image))[0] - reference(Image.fromarray(image))).abs()
        * min(model.std)
        * 255
    )
    assert levels.max() < 1.01
    assert (
        load_model("timm:test_vit", "random", input_size=64).preprocess(batch(image)).shape[-1]
        == 64
    )
    squashed = resize_and_crop(
        batch(image), size=64, resize=64, interpolation="bicubic", squash=True
    )
    assert (
        np.abs(
            squashed[0].permute(1, 2, 0).numpy().astype(int)
            - np.asarray(Image.fromarray(image).resize((64, 64), Image.BICUBIC))
        ).max()
        <= 1
    )


def test_teacher_and_student_normalise_the_same_crop_each_its_way(monkeypatch):
    for name in ("h-optimus-0", "hibou-l"):
        monkeypatch.setitem(REGISTRY, name, dataclasses.replace(REGISTRY[name], args=TINY))
    crop = torch.rand(2, 3, 224, 224)
    for name in ("h-optimus-0", "hibou-l"):
        model = load_model(name, "random")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in REGISTRY[name].norm)
        torch.testing.assert_close(model.normalize(crop), (crop - mean) / std)
    assert load_model("h-optimus-0", "random").mean != model.mean


def test_resizing_on_a_gpu_is_the_same_within_rounding():
    """There torchvision resizes in floating point and rounds; here the same two passes are made on the CPU."""
    x = batch(
        *images(2, 300, 280)
    )  # noise: overshoot is cut off between the passes, so their order matters
    exact = x
    for shape in ((300, 256), (274, 256)):
        exact = torch.nn.functional.interpolate(
            exact.float(), shape, mode="bicubic", antialias=True
        ).round()
        exact = exact.clamp(0, 255)
    got = resize_and_crop(x, size=224, resize=256, interpolation="bicubic")
    levels = (got.float() - exact[:, :, 25:249, 16:240]).abs()
    assert levels.max() <= 2 and (levels > 1).float().mean() < 1e-3
    if torch.cuda.is_available():
        gpu = resize_and_crop(x.cuda(), size=224, resize=256, interpolation="bicubic").cpu()
        assert (gpu.float() - got.float()).abs().max() <= 2


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_preprocess_refuses_what_is_no_uint8_batch(bad, vit):
    with pytest.raises(ValueError, match="expected uint8"):
        vit.preprocess(bad)


def test_another_input_size(tiny):
    import timm

    model = load_model(tiny, "random")
    larger = load_model(tiny, "random", input_size=280)
    dynamic = timm.create_model(
        REGISTRY[tiny].timm,
        num_classes=0,
        img_size=224,
        dynamic_img_size=True,
        init_values=1e-5,
        **TINY,
    ).eval()
    dynamic.load_state_dict(model.net.state_dict())
    x = torch.randn(1, 3, 280, 280)
    with torch.no_grad():
        torch.testing.assert_close(
            larger(x), dynamic(x)
        )  # resampled once, as timm does at every call
    with pytest.raises(UserError, match="multiples of its patch size 14, such as 224 or 238"):
        load_model(tiny, "random", input_size=230)
    with pytest.raises(UserError, match="224 only"):
        load_model("timm:mixer_s32_224", "random", input_size=112)
    with pytest.raises(UserError, match="multiples of its patch size 16, such as 240 or 256"):
        load_model(
            "timm:efficientvit_m0", "random", input_size=250
        )  # its patch size is one number, not a pair
    small = load_model("timm:resnet10t", "random", input_size=112)
    assert (
        small.preprocess(batch(*images(1))).shape == (1, 3, 112, 112) and small.embedding == "pool"
    )


# ---- students -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size", [("tiny", None), ("tiny", 112), ("timm:resnet10t", 112), ("timm:test_vit", None)]
)
def test_a_student_is_bit_identical_in_timm(name, size, tiny, tmp_path):
    import timm

    model = load_model(name, "random", input_size=size).train()
    with torch.no_grad():
        for _ in range(2):
            model(model.preprocess(batch(*images(4))))  # moves running statistics
    metadata = {
        "teacher": "h-optimus-0",
        "cancer": "brca",
        "run": "first",
        "patients": ["TCGA-AA-0001"],
        "steps": 7,
    }
    folder = tmp_path / "runs" / "first" / "student"
    save_student(model, folder, metadata=metadata)
    config, file = sorted(folder.iterdir())
    assert (config.name, file.name) == ("config.json", "model.safetensors")
    assert config.stat().st_mode == file.stat().st_mode  # others may load it too
    student = load_model(str(folder))
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = student.preprocess(batch(*images(3)))
    with torch.no_grad():
        assert torch.equal(student(x), net(x))
        assert torch.equal(student(x), model.eval()(x))
    assert (
        student.metadata == metadata
        and student.name == "first"
        and student.fingerprint == model.fingerprint
    )
    assert (
        net.pretrained_cfg["mean"] == list(model.mean)
        and net.pretrained_cfg["input_size"][-1] == model.input_size
    )
    assert (student.mean, student.std, student.embedding) == (
        model.mean,
        model.std,
        model.embedding,
    )
    save_student(
        student.net, tmp_path / "again" / "student", metadata={}
    )  # the bare network will do
    assert load_model(str(tmp_path / "again" / "student")).fingerprint == model.fingerprint
    assert load_model(str(tmp_path / "again" / "student" / "model.safetensors")).name == "again"
    with pytest.raises(UserError, match="again/student"):
        load_model(str(tmp_path / "again"))


def test_a_swin_student_at_another_size_keeps_its_windows(tmp_path):
    model = load_model("timm:swin_tiny_patch4_window7_224", "random", input_size=128)
    save_student(model, tmp_path, metadata={})
    student, x = load_model(str(tmp_path)), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(student(x), model(x))


# ---- features -------------------------------------------------------------------------------------------------------


class Source:
    """Items by number; an exception in their place is raised. Counts what was read."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read.append(i)
        if isinstance(self.items[i], BaseException):
            raise self.items[i]
        return self.items[i]


def plain(model, arrays):
    with torch.no_grad():
        return torch.cat([model(model.preprocess(batch(a))) for a in arrays]).numpy()


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 1}, {"batch_size": 5}, {"workers": 2, "batch_size": 4}]
)
def test_features_do_not_depend_on_batches_or_workers(options, vit):
    arrays = images(9) + images(4, 70, 90, seed=1)  # sizes mixed
    got = extract_features(vit, Source(arrays), progress="none", **options)
    want = plain(vit, arrays)
    assert (
        got.dtype == np.float32
        and np.abs(got - want).max() < 1e-5 * np.linalg.norm(want, axis=1).min()
    )


def test_sequences_are_averaged_and_read_one_by_one(vit):
    arrays = images(7)
    lazy = Source(arrays)
    got = extract_features(
        vit, [arrays, np.stack(arrays[:3]), lazy, arrays[0]], batch_size=3, progress="none"
    )
    want = plain(vit, arrays)
    np.testing.assert_allclose(
        got, [want.mean(0), want[:3].mean(0), want.mean(0), want[0]], rtol=1e-4, atol=1e-5
    )
    assert lazy.read == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_items_become_nan_and_are_named(workers, vit):
    good = images(3)
    items = [
        good[0],
        OSError("truncated"),
        good[1],
        PatchError("slide s, x 1, y 2"),
        [],
        good[2][:, :, 0],
        Source([good[0], ValueError("bad patch"), good[1]]),
        Source([OSError("a"), OSError("b")]),
    ]
    errors = []
    got = extract_features(vit, Source(items), errors=errors, workers=workers, progress="none")
    assert np.flatnonzero(np.isnan(got).any(1)).tolist() == [1, 3, 4, 5, 7]
    assert errors[:4] == [
        (1, "truncated"),
        (3, "slide s, x 1, y 2"),
        (4, "holds no images"),
        (5, "expected an RGB image, uint8 (H, W, 3), got uint8 (64, 64)"),
    ]
    assert errors[4:] == [(6, "bad patch"), (7, "a"), (7, "b")]
    np.testing.assert_allclose(got[6], plain(vit, good[:2]).mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ZeroDivisionError):  # a defect is no unreadable image
        extract_features(vit, Source([good[0], ZeroDivisionError()]), progress="none")


def test_padding_for_a_compiled_network_changes_nothing(vit):
    arrays = images(5)
    model = load_model("timm:test_vit", "random", input_size=64)
    model.compiled = True
    shapes = []
    model.net.register_forward_pre_hook(lambda _, args: shapes.append(len(args[0])))
    got = extract_features(model, arrays, batch_size=4, progress="none")
    assert shapes == [4, 4]
    np.testing.assert_allclose(got, plain(vit, arrays), rtol=1e-4, atol=1e-5)


def test_features_resume_and_notice_changes(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("g2l.features.SAVE_SECONDS", 0)
    arrays = images(8)
    broken = Source([*arrays[:5], OSError("lost"), arrays[6], RuntimeError("killed here")])
    with pytest.raises(RuntimeError):
        extract_features(vit, broken, batch_size=1, cache=tmp_path, key="data 1", progress="none")
    whole, errors = Source([*arrays[:5], OSError("lost"), *arrays[6:]]), []
    got = extract_features(vit, whole, cache=tmp_path, key="data 1", errors=errors, progress="none")
    assert 0 not in whole.read and 7 in whole.read and errors == [(5, "lost")]
    want = plain(vit, arrays)
    want[5] = np.nan
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    again = Source([None] * 8)  # nothing is read a second time
    np.testing.assert_array_equal(
        extract_features(vit, again, cache=tmp_path, key="data 1", progress="none"), got
    )
    assert not again.read
    files = sorted(tmp_path.iterdir())  # one a row
    files[0].write_bytes(files[0].read_bytes()[:40])
    damaged = Source(arrays)
    extract_features(vit, damaged, cache=tmp_path, key="data 1", progress="none")
    assert len(damaged.read) == 1
    other = Source(arrays)
    extract_features(vit, other, cache=tmp_path, key="data 2", progress="none")
    assert len(other.read) == 8
    resized = Source(arrays)
    extract_features(
        load_model("timm:test_vit", "random", input_size=80),
        resized,
        cache=tmp_path,
        key="data 1",
        progress="none",
    )
    assert len(resized.read) == 8


SCRIPT = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch
from g2l import features, models, ranks
features.SAVE_SECONDS = 0
class Source:
    def __init__(self, slow): self.slow = slow
    def __len__(self): return 13
    def __getitem__(self, i):
        time.sleep(self.slow)
        if i == 4: raise OSError("lost")
        return np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
def main(out, slow):
    rank, world, device = ranks.setup_distributed("cpu")
    assert ranks.setup_distributed("cpu") == (rank, world, device)
    errors = []
    model = models.load_model("timm:test_vit", "random", input_size=64)
    got = features.extract_features(model, Source(slow), batch_size=2, cache=out + "/cache", errors=errors)
    assert errors == [(4, "lost")]
    np.save(f"{{out}}/{{rank}}-of-{{world}}.npy", got)
    ranks.leave_distributed()
if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
"""


def test_features_are_the_same_under_torchrun_and_after_a_kill(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "one"), "0.5"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 240
    while not list((tmp_path / "one").glob("cache/[!.]*.safetensors")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "one").glob("*.npy")) and list(
        (tmp_path / "one").glob("cache/[!.]*.safetensors")
    )
    monkeypatch.setattr("g2l.features.SAVE_SECONDS", SAVE_SECONDS)
    runpy.run_path(str(script))["main"](str(tmp_path / "one"), 0)
    done = torchrun(2, str(script), tmp_path / "two", "0")
    assert done.returncode == 0, done.stderr
    one, first, second = (
        np.load(tmp_path / f) for f in ("one/0-of-1.npy", "two/0-of-2.npy", "two/1-of-2.npy")
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, one, rtol=1e-4, atol=1e-5)
    assert np.isnan(one[4]).all() and np.isfinite(np.delete(one, 4, 0)).all()


# ---- precision and devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", ["tiny", "timm:resnet10t"])
def test_half_precision_keeps_norms_and_stays_close(name, dtype, tolerance, tiny):
    exact, half = (
        load_model(name, "random", input_size=112),
        load_model(name, "random", input_size=112, dtype=dtype),
    )
    kinds = {
        type(m).__name__: p.dtype for m in half.net.modules() for p in m.parameters(recurse=False)
    }
    assert (
        kinds["Conv2d"] == dtype and kinds[next(k for k in kinds if "Norm" in k)] == torch.float32
    )
    arrays = images(4, 112, 112)
    a, b = (extract_features(m, arrays, progress="none") for m in (exact, half))
    assert (np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)).max() < tolerance
    assert exact.fingerprint != half.fingerprint


def test_devices():
    for name in ("gpu", "mps", "meta"):
        with pytest.raises(UserError, match=f"{name}: expected cpu, cuda"):
            pick_device(name)
    if not torch.cuda.is_available():
        assert setup_distributed("auto") == (0, 1, torch.device("cpu"))
        with pytest.raises(UserError, match="use --device cpu"):
            pick_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_features_equal_those_of_the_cpu(tiny):
    arrays = images(10, 250, 250)
    want = extract_features(load_model(tiny, "random"), arrays, progress="none")
    for dtype, tolerance in ((torch.float32, 1e-3), (None, 2e-2)):
        model = load_model(tiny, "random", device="cuda", dtype=dtype)
        got = extract_features(model, arrays, progress="none", workers=2)
        assert (np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max() < tolerance
    assert fitting_batch_size(model) % 8 == 0


def test_help_reads_well():
    text = build_parser().format_help()
    assert (
        "python -m g2l.models hibou-l --check FILE" in text
        and "[NAME=]FILE" in text
        and "images per second" in text
    )
