"""Models: the registry, loading, preprocessing, input sizes, students that timm loads, the
command."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from jobs import run
from networks import TINY, batch, images, preprocess
from PIL import Image

from g2l.devices import pick_device
from g2l.errors import UserError
from g2l.features import extract_features
from g2l.models import (
    Model,
    blueprint,
    build,
    build_parser,
    load_model,
    main,
    resize_and_crop,
    save_student,
)
from g2l.ranks import setup_distributed
from g2l.registry import REGISTRY, lineage, origins, pretrained_on, table
from g2l.speed import flops_per_image


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTRY)
def test_each_entry_builds_as_stated(name):
    entry = REGISTRY[name]
    net = build(blueprint(name), empty=True)
    assert next(net.parameters()).is_meta  # so this costs no memory
    assert sum(p.numel() for p in net.parameters()) == entry.parameters
    assert net.num_prefix_tokens == entry.prefix and all(
        block.attn.fused_attn for block in net.blocks
    )
    net.blocks = net.blocks[:1]  # all are alike, and one gives the shapes of forty
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, 224, 224)}
    with torch.device("meta"):
        model = Model(
            net, name=name, embedding=entry.embedding, dtype=torch.float32, weights="file"
        )
        x = torch.zeros(2, 3, 224, 224)
        assert model(x).shape == (2, entry.dim) and model.dim == entry.dim
        side = entry.args.get("patch_size") or int(re.search(r"patch(\d+)", entry.timm)[1])
        patches = (224 // side) ** 2
        assert model.tokens(x).shape == (2, entry.prefix + patches, entry.width)


def test_parameters_are_those_that_the_authors_state():
    """In millions, as their cards or papers round them."""
    stated = {"h-optimus-0": 1135, "uni2-h": 681, "virchow2": 631, "hibou-b": 86, "phikon": 85.8}
    stated |= {"prov-gigapath-flash": 21.7, "lunit-vits16": 21.7, "h0-mini": 86}
    for name, millions in stated.items():
        assert REGISTRY[name].parameters / 1e6 == pytest.approx(millions, abs=0.5)


def test_the_registry_says_what_licences_forbid_and_what_pretraining_has_met():
    forbid = {name for name, entry in REGISTRY.items() if not entry.teaches}
    assert forbid == {"h-optimus-1", "h0-mini", "h0-mini+mean", "virchow2", "uni", "uni2-h"}
    for entry in REGISTRY.values():  # no fact without its source
        assert entry.pretrained_on and " say" in entry.pretraining
    told = {line.split()[0]: line for line in table().splitlines() if line}
    for name, entry in REGISTRY.items():
        assert ", ".join(entry.pretrained_on) in told[name] and entry.pretraining in told[name]
    assert list(REGISTRY["phikon-v2"].pretrained_on) == ["TCGA", "CPTAC", "GTEx"]
    student = {"runs/a/student": {"teacher": "bioptimus/H0-mini", "student": "hibou-l"}}
    ((note,),) = pretrained_on(student, "tp53", ["a"]).values()
    assert "runs/a/student comes from h0-mini" in note and "40 M of TCGA's tiles" in note
    second = {"teacher": "runs/a/student", "student": "timm:test_vit"}
    second["earlier"] = lineage(*student.popitem())
    ((note,),) = pretrained_on({"runs/b/student": second}, "tp53", ["a"]).values()
    assert "runs/b/student comes from h0-mini" in note
    assert list(pretrained_on({"phikon": {}}, "mine", ["TCGA-AA-0001"])) == ["phikon"]
    assert list(pretrained_on({"phikon": {}, "gpfm": {}}, "bracs", ["1"])) == ["gpfm"]
    assert not pretrained_on({"phikon": {}, "uni": {}}, "mine", ["P1"])
    assert not pretrained_on({"uni": {}, "timm:test_vit": {}}, "tils", ["TCGA-AA-0001"])


def test_a_folder_made_anew_hides_no_teacher():
    made: dict = {}
    for name, teachers in (
        ("runs/a/student", "h0-mini"),
        ("runs/b/student", "runs/a/student"),
        ("runs/a/student", "runs/b/student + virchow2"),
    ):
        earlier = lineage(*made.popitem()) if made else []
        made[name] = {"teacher": teachers, "student": "timm:test_vit", "earlier": earlier}
    last = {"teacher": name, "student": "hibou-l", "earlier": lineage(*made.popitem())}
    assert {"h0-mini", "virchow2"} < set(origins(last, "teacher"))


def test_a_model_of_unknown_pretraining_is_not_shown_as_one_without_a_leak():
    known = {"teacher": "h-optimus-0", "student": "hibou-l"}
    made_up = {"teacher": "timm:test_vit", "student": "timm:test_vit"}  # no slides: timm's own
    models = {"runs/a/student": known, "runs/b/student": made_up, "weights/mine": {}}
    ((name, (note,)),) = pretrained_on(models, "tp53", ["a"]).items()
    assert name == "weights/mine" and "what it was pretrained on is not known" in note
    assert not pretrained_on(models, "mine", ["P1"])  # of no public collection
    taught = {"runs/c/student": {"teacher": "weights/mine", "student": "hibou-l"}}
    ((note,),) = pretrained_on(taught, "tp53", ["a"]).values()
    assert "comes from weights/mine, which" in note and "is not known" in note


def test_the_mean_beside_the_class_token_leaves_registers_out(tiny, monkeypatch):
    """Numbers, not shapes: a register moved far away changes no embedding's mean of the patches."""
    monkeypatch.setitem(
        REGISTRY, tiny, dataclasses.replace(REGISTRY[tiny], embedding="cls+mean", dim=64)
    )
    model = load_model(tiny, "random")
    x = preprocess(model, batch(*images(2, 224, 224)))
    tokens = model.tokens(x)
    want = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)  # a class token, four registers
    torch.testing.assert_close(model(x), want)
    assert not torch.allclose(model(x)[:, 32:], tokens[:, 1:].mean(1), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name, gflops", [("h-optimus-0", 608), ("hibou-l", 165)])
def test_flops_are_those_worked_out_by_hand(name, gflops):
    net = build(blueprint(name), empty=True)
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, 224, 224)}
    with torch.device("meta"):
        model = Model(net, name=name, embedding="cls", dtype=torch.float32, weights="file")
    assert flops_per_image(model) / 1e9 == pytest.approx(gflops, rel=0.01)


def test_flops_of_a_network_that_pools_by_attention_are_counted():
    model = load_model("timm:test_vit3", "random")
    free = flops_per_image(model.requires_grad_(False))
    assert flops_per_image(model.requires_grad_(True)) == free > 1e6


@pytest.mark.slow
def test_table_and_speed_commands(capsys):
    done = run("g2l.models")
    assert done.returncode == 0 and all(f"\n{name} " in "\n" + done.stdout for name in REGISTRY)
    assert (
        "303,657,216" in done.stdout and "CC-BY-NC-ND-4.0" in done.stdout and "gated" in done.stdout
    )
    assert max(map(len, done.stdout.splitlines())) <= 154  # no name of the hub is cut
    assert all(entry.hub in done.stdout for entry in REGISTRY.values())
    assert main(["--speed", "timm:test_vit", "--device", "cpu"]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[0] == "timm:test_vit" and row[-2].endswith("%") and 0 < float(row[-2][:-1]) <= 150


def test_unknown_names_say_what_is_near():
    with pytest.raises(UserError, match="did you mean hibou-l"):
        load_model("hibou_l", "random")
    with pytest.raises(UserError, match="resnet10t"):
        load_model("timm:resnet10", "random")


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


def test_folders_that_are_no_student(tmp_path, tiny):
    with pytest.raises(UserError, match=r"no config.json"):
        load_model(str(tmp_path))
    for text, says in (
        ("{", "not a timm configuration"),
        ('{"architecture": "x", "g2l": {"teacher": "a", "earlier": 1}}', "not a timm config"),
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
            with pytest.raises(SystemExit):
                main(["--speed", "timm:test_vit", flag, value])
            assert f"{flag}: {value}: expected a whole number from 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["h-optimus-0", "hibou-l", "uni2-h", "prov-gigapath", "phikon-v2", "kaiko-vits8"]
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
        got = preprocess(model, batch(image, image))
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
        (preprocess(model, batch(image))[0] - reference(Image.fromarray(image))).abs()
        * min(model.std)
        * 255
    )
    assert levels.max() < 1.01
    assert (
        preprocess(load_model("timm:test_vit", "random", input_size=64), batch(image)).shape[-1]
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
    """There torchvision resizes in floating point and rounds; here the same two passes are made on
    the CPU."""
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
        preprocess(vit, bad)


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
        preprocess(small, batch(*images(1))).shape == (1, 3, 112, 112) and small.embedding == "pool"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size", [("tiny", None), ("tiny", 112), ("timm:resnet10t", 112), ("timm:test_vit", None)]
)
def test_a_student_is_bit_identical_in_timm(name, size, tiny, tmp_path):
    import timm

    model = load_model(name, "random", input_size=size).train()
    with torch.no_grad():
        for _ in range(2):
            model(preprocess(model, batch(*images(4))))  # moves running statistics
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
    x = preprocess(student, batch(*images(3)))
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


@pytest.mark.slow
def test_a_swin_student_at_another_size_keeps_its_windows(tmp_path):
    model = load_model("timm:swin_tiny_patch4_window7_224", "random", input_size=128)
    save_student(model, tmp_path, metadata={})
    student, x = load_model(str(tmp_path)), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(student(x), model(x))


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
    a, b = (extract_features(m, arrays) for m in (exact, half))
    assert (np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)).max() < tolerance
    assert exact.fingerprint != half.fingerprint


def test_devices():
    for name in ("gpu", "mps", "meta"):
        with pytest.raises(UserError, match=f"{name}: expected cpu, cuda"):
            pick_device(name)
    if not torch.cuda.is_available():
        assert setup_distributed("auto") == (0, 1, torch.device("cpu"))
        with pytest.raises(UserError, match="sees no GPU here"):
            pick_device("cuda")


def test_help_reads_well():
    text = build_parser().format_help()
    assert (
        "python -m g2l.models hibou-l --check FILE" in text
        and "[NAME=]FILE" in text
        and "images per second" in text
    )
