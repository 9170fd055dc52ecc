"""Exports: what other tools would load gives the features that load_model gives."""

import sys
import types

import numpy as np
import pytest
import timm
import torch
import yaml

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


def test_hest_is_given_network_and_transform(student, image, tmp_path, monkeypatch):
    given = []
    bench = types.ModuleType("hest.bench")
    bench.benchmark = lambda *args, **options: given.append((args, options))
    monkeypatch.setitem(sys.modules, "hest", types.ModuleType("hest"))
    monkeypatch.setitem(sys.modules, "hest.bench", bench)
    exec(export(student, "hest", tmp_path).read_text(), {})
    (net, transform, precision), options = given[0]
    with torch.no_grad():
        torch.testing.assert_close(net(image), wanted(student, image))
    assert callable(transform) and precision == torch.float32 and options == {"exp_code": "mine"}


def test_what_is_no_student_is_refused(tmp_path):
    with pytest.raises(UserError, match="no student"):
        export(tmp_path, "eva", tmp_path)
