"""Exports: what other tools would load gives the features that load_model gives."""

import json
import runpy
import sys
import types

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from g2l.errors import UserError
from g2l.exports import export
from g2l.models import load_model, save_student


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "student"
    model = load_model("timm:test_vit", "random", input_size=64)
    save_student(model, folder, metadata={"run": "mine", "teacher": "t"})
    return folder


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(np.random.default_rng(0).random((2, 3, 64, 64))).float()


def wanted(student, image):
    model = load_model(str(student))
    with torch.no_grad():
        return model(image)


def test_eva_makes_the_network_from_the_lines(student, image, tmp_path):
    text = export(student, "eva", tmp_path).read_text()
    told = yaml.safe_load(text)["backbone"]
    assert told["class_path"] == "eva.vision.models.TimmModel"
    given = told["init_args"]
    # As eva's class does.
    weights = {"file": given["checkpoint_path"], "num_classes": 0}
    net = timm.create_model(
        given["model_name"], pretrained=True, pretrained_cfg=weights, **given["model_kwargs"]
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(image), wanted(student, image))
    assert "IN_FEATURES=64 RESIZE_DIM=64 NORMALIZE_MEAN='[0.5, 0.5, 0.5]'" in text


def test_thunder_takes_the_class(student, image, tmp_path, monkeypatch):
    base = types.ModuleType("thunder.models.pretrained_models")
    base.PretrainedModel = torch.nn.Module
    for name in ("thunder", "thunder.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    scope: dict = {"__name__": "student"}
    exec(export(student, "thunder", tmp_path).read_text(), scope)
    model = scope["Student"]().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_linear_probing_embeddings(image), wanted(student, image)
        )
        tokens = model.get_segmentation_embeddings(image)
    assert tokens.shape == (2, 16, 64) and model.emb_dim == 64 and model.name == "mine"
    assert callable(model.get_transform())


# What HEST's `benchmark` takes by name (hest.bench.BenchmarkConfig, version 1.1.1).
HEST_OPTIONS = """seed overwrite bench_data_root embed_dataroot weights_root results_dir batch_size
num_workers private_weights_root exp_code gene_list method alpha kfold benchmark_encoders normalize
dimreduce latent_dim encoders datasets config""".split()


def run_for_hest(student, folder, monkeypatch, name="__main__"):
    """What HEST's benchmark is called with by the file, run as a program or imported."""
    calls = []

    def benchmark(encoder, enc_transf, precision, cli_args=None, **options):
        calls.append((encoder, enc_transf, precision, options))

    bench = types.ModuleType("hest.bench")
    bench.benchmark = benchmark
    monkeypatch.setitem(sys.modules, "hest", types.ModuleType("hest"))
    monkeypatch.setitem(sys.modules, "hest.bench", bench)
    runpy.run_path(str(export(student, "hest", folder)), run_name=name)
    return calls


def test_hest_is_given_network_and_transform(student, image, tmp_path, monkeypatch):
    ((net, transform, precision, options),) = run_for_hest(student, tmp_path, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(net(image), wanted(student, image))
    patch = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    model = load_model(str(student))
    ours = model.normalize(model.geometry(torch.from_numpy(patch).permute(2, 0, 1)[None]))
    grey = 1.01 / 127.5  # one level of grey, to which Pillow rounds what it has resized
    torch.testing.assert_close(transform(Image.fromarray(patch))[None], ours, atol=grey, rtol=0)
    assert precision == torch.float32 and options["exp_code"] == "mine"
    assert set(options) <= set(HEST_OPTIONS)


def test_hest_measures_the_student_alone_on_all_tasks_of_its_board(student, tmp_path, monkeypatch):
    """Left out, HEST would fetch a ResNet50, take one task, and a PCA wider than the student."""
    ((*_, options),) = run_for_hest(student, tmp_path, monkeypatch)
    assert options["encoders"] == [] and options["latent_dim"] == 64
    assert len(options["datasets"]) == 9 and {"IDC", "LYMPH_IDC"} <= set(options["datasets"])
    config = json.loads((student / "config.json").read_text())
    wide = tmp_path / "run" / "wide"
    wide.mkdir(parents=True)
    (wide / "config.json").write_text(json.dumps({**config, "num_features": 1024}))
    assert "latent_dim=256," in export(wide, "hest", tmp_path).read_text()


def test_a_loader_of_hest_that_imports_the_file_does_not_run_it(student, tmp_path, monkeypatch):
    assert not run_for_hest(student, tmp_path, monkeypatch, name="__mp_main__")


def test_what_is_no_student_is_refused(tmp_path):
    with pytest.raises(UserError, match="no student"):
        export(tmp_path, "eva", tmp_path)
