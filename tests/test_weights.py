"""Weights: every published layout, every kind of file and damage, the hub and its refusals."""

import dataclasses
import hashlib
import http.server
import json
import os
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2l.errors import UserError
from g2l.models import (
    load_model,
    main,
)
from g2l.registry import REGISTRY
from g2l.weights import parse_weights


def published(tmp_path_factory, kind, **config):
    """(folder as published, its tensors, normalised images, all tokens after the final norm) from
    transformers."""
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, f"{kind}Model"), getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    if "Dino" in kind:
        config["layerscale_value"] = 1.0
    net = make[0](make[1](image_size=224, **config)).eval()
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
    """Hibou-B's widths with 2 of its 12 blocks."""
    return published(
        tmp_path_factory,
        "Dinov2WithRegisters",
        patch_size=14,
        hidden_size=768,
        num_hidden_layers=2,
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
def two_blocks(monkeypatch):
    """As many as the published networks above have."""
    for name in ("hibou-b", "h0-mini", "hibou-l", "phikon-v2"):
        entry = REGISTRY[name]
        monkeypatch.setitem(
            REGISTRY, name, dataclasses.replace(entry, args={**entry.args, "depth": 2})
        )


def off(name, weights, x, tokens):
    """Largest difference of any token, relative to the spread of tokens."""
    with torch.no_grad():
        return float((load_model(name, str(weights)).tokens(x) - tokens).abs().max() / tokens.std())


def test_hibou_b_equals_transformers(hibou_b, two_blocks):
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


def test_hibou_b_in_the_layout_of_dinov2_itself(hibou_b, two_blocks, tmp_path):
    _, state, x, tokens = hibou_b
    out = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "register_tokens": state["embeddings.register_tokens"],
        "mask_token": state["embeddings.mask_token"],
    }
    for i in range(2):
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


def test_hibou_l_equals_transformers_and_each_wrong_map_is_caught(hibou_l, two_blocks, tmp_path):
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


def test_phikon_equals_transformers(tmp_path_factory, two_blocks):
    folder, _, x, tokens = published(
        tmp_path_factory,
        "Dinov2",
        patch_size=16,
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
    )
    assert off("phikon-v2", folder, x, tokens) < 1e-4


def test_phikon_and_midnight_equal_transformers(tmp_path_factory, monkeypatch):
    """Their layouts, with 2 blocks: the plain ViT with a pooler, and SwiGLU without registers."""
    small = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=2)
    ours = dict(embed_dim=96, depth=2, num_heads=2)
    swiglu = dict(patch_size=14, use_swiglu_ffn=True)
    for name, kind, config in [
        ("phikon", "ViT", dict(patch_size=16, intermediate_size=384)),
        ("midnight-12k", "Dinov2", swiglu),
    ]:
        entry = REGISTRY[name]
        entry = dataclasses.replace(entry, args={**entry.args, **ours})
        monkeypatch.setitem(REGISTRY, name, entry)
        folder, state, x, tokens = published(tmp_path_factory, kind, **config, **small)
        assert ("pooler.dense.weight" in state) == (kind == "ViT")
        assert off(name, folder, x, tokens) < 3e-4  # ViT's norms add 1e-12, timm's 1e-6


def test_check_names_the_model_that_a_file_fits(hibou_b, two_blocks, capsys):
    folder = hibou_b[0]
    assert main(["--check", str(folder)]) == 0
    assert "fits h0-mini and hibou-b" in capsys.readouterr().out
    assert main(["hibou-b", "--check", str(folder), "--device", "cpu"]) == 0
    assert "14,835,200 parameters" in capsys.readouterr().out
    assert main(["uni", "--check", str(folder)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and "They fit h0-mini and hibou-b" in error
        and "instead of" in error
    )


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


def damage(kind, folder, state):
    """A weight file, or folder, that is damaged in this way."""
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
        return folder
    elif kind == "renamed":
        save_file({f"x.{k}": v for k, v in state.items()}, file)
    elif kind == "one tensor less":
        save_file({k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}, file)
    else:
        return damaged_pickle(kind, folder / "w.bin", state)
    return file


def damaged_pickle(kind, file, state):
    """The same for PyTorch's own format."""
    contents = {
        "cut bin": state,
        "hostile": {**state, "extra": Bomb()},
        "whole network": torch.nn.Linear(2, 2),
        "no tensors": {"epoch": 3},
        "no names": dict(enumerate(state.values())),
    }
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "hostile old pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(contents[kind], file)
    if kind == "cut bin":
        file.write_bytes(file.read_bytes()[:-200])
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


PREFIXES = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.module.",
    "model.backbone.",
    "net.",
    "encoder.",
    "student.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_behind_the_prefixes_of_wrappers(prefix, tiny, tmp_path):
    model = load_model(tiny, "random")
    state = {prefix + key: value for key, value in model.net.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    assert load_model(tiny, str(tmp_path / "w.pth")).fingerprint == model.fingerprint


def checkpoints(state):
    """Training checkpoints as people keep them, by what is in them."""

    def named(prefix):
        return {prefix + key: value for key, value in state.items()}

    other = {"head.0.weight": torch.zeros(2, 2)}
    return {
        "flat teacher beside student": named("teacher.backbone.")
        | named("student.backbone.")
        | {"teacher.dino_head.0.weight": torch.zeros(2, 2)},
        "averaged beside trained": {k: v + 1 for k, v in named("model.").items()} | named("ema."),
        "model_state_dict": {"model_state_dict": state, "epoch": 1},
        "state_dict_ema": {"state_dict": other, "state_dict_ema": state},
        "our own checkpoint": {"distiller": named("student.net.") | {"projector": torch.zeros(2)}},
        "blocks in chunks": {k.replace("blocks.", "blocks.0."): v for k, v in state.items()},
    }


@pytest.mark.parametrize("kind", checkpoints({}))
def test_checkpoints_of_every_kind(kind, tiny, tmp_path):
    model = load_model(tiny, "random")
    torch.save(checkpoints(model.net.state_dict())[kind], tmp_path / "w.pth")
    assert load_model(tiny, str(tmp_path / "w.pth")).fingerprint == model.fingerprint


def test_a_model_in_several_files_and_a_pth_called_safetensors(tiny, tmp_path):
    model = load_model(tiny, "random")
    state = model.net.state_dict()
    keys, files = list(state), [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for n, file in enumerate(files):
        save_file({key: state[key] for key in keys[n::2]}, tmp_path / file)
    where = {key: files[n % 2] for n, key in enumerate(keys)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    torch.save(state, tmp_path / "pickled.safetensors")
    for path in (tmp_path, index, tmp_path / files[0], tmp_path / "pickled.safetensors"):
        assert load_model(tiny, str(path)).fingerprint == model.fingerprint
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(UserError, match="passwd: no such file"):
        load_model(tiny, str(index))


def test_weights_of_another_input_size_are_resampled(tiny, tmp_path):
    """As timm would: the same weights, built at 238 px and then set to 224."""
    larger = load_model(tiny, "random", input_size=238)
    save_file(larger.net.state_dict(), tmp_path / "w.safetensors")
    got = load_model(tiny, str(tmp_path / "w.safetensors"))
    larger.net.set_input_size(img_size=224)
    torch.testing.assert_close(got.net.pos_embed, larger.net.pos_embed)


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


def point_hub_at(url, monkeypatch):
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    for module in ("constants", "file_download"):  # older clients hold a copy
        monkeypatch.setattr(
            f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False
        )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local server with the hub's interface for resolving files; `hub.files` maps path to bytes
    or to a fault."""
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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "GPFM.pth"])
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
            "gated; ask for access on https://huggingface.co/lab/tiny, then `hf auth login` or set "
            "HF_TOKEN",
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
    assert error.value.mend == "weights"


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
