"""CKA of layers: against a plain formula, and evaluate.py's protocol of it."""

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from g2l.benchmarks import load_folder
from g2l.layers import layer_rows, look
from g2l.models import load_model
from g2l.results import Study, read_metrics

SIDE = 64


def folder(place):
    """Eight patients, three images each: smooth ones and rough ones."""
    rng = np.random.default_rng(0)
    (place / "mine").mkdir()
    lines = ["image,label,group"]
    for i in range(24):
        image = rng.normal(130 + 5 * (i % 7), 5 + 40 * (i % 2), (SIDE, SIDE, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(place / "mine" / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i % 2]},p{i // 3}")
    (place / "mine" / "labels.csv").write_text("\n".join(lines) + "\n")
    return place / "mine"


def unbiased(x, y):
    """Song et al. 2012, with Gram matrices in fp64."""
    n = len(x)
    grams = []
    for z in (x, y):
        z = z - z.mean(0)
        gram = z @ z.T
        np.fill_diagonal(gram, 0)
        grams.append(gram)

    def hsic(k, m):
        sums = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
        return (k * m).sum() + sums

    k, m = grams
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_layers_are_means_over_places_in_the_networks_order(tmp_path):
    sample = load_folder(folder(tmp_path))
    model = load_model("timm:test_vit", "random", input_size=SIDE)
    seen = []
    for block in model.net.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out))
    layers = look(model, sample)
    assert len(layers) == len(model.net.blocks)
    first = model.num_prefix_tokens  # the class token is no place
    tokens = torch.cat(seen[:: len(layers)])[:, first:]
    torch.testing.assert_close(layers[0], tokens.mean(1), rtol=1e-4, atol=1e-5)


def test_that_layers_need_a_teacher_is_told(tmp_path, capsys):
    study = Study(**dict.fromkeys(Study.__dataclass_fields__))
    assert not layer_rows(load_folder(folder(tmp_path)), ["timm:test_vit"], study)
    assert "mine: no teacher, so nothing is said of layers" in capsys.readouterr().err


@pytest.mark.slow
def test_the_map_by_the_command(tmp_path, capsys):
    place = folder(tmp_path)
    out = tmp_path / "r"
    command = ["--benchmark", place, "--models", "timm:test_vit", "timm:test_resnet"]
    command += ["--teacher", "timm:test_vit", "--weights", "random", "--device", "cpu"]
    command += ["--input-size", SIDE, "--protocols", "layers", "--seeds", 1, "--results", out]
    assert evaluate.main(list(map(str, command))) == 0, capsys.readouterr().err
    rows = [row for row in read_metrics(out) if row["protocol"] == "layers"]
    maps = {row["model"]: np.array(row["map"]) for row in rows if "map" in row}
    sample = load_folder(place)
    nets = {name: load_model(name, "random", input_size=SIDE) for name in maps}
    layers = {name: [x.double().numpy() for x in look(net, sample)] for name, net in nets.items()}
    for name, found in maps.items():
        for i, x in enumerate(layers[name]):
            for j, y in enumerate(layers["timm:test_vit"]):
                assert abs(found[i, j] - unbiased(x, y)) < 2e-3
    assert np.allclose(maps["timm:test_vit"].diagonal(), 1, atol=1e-3)
    blind = [row["value"] for row in rows if row["model"] == "chance"]
    assert abs(np.mean(blind)) < 0.2
    assert (out / "pictures" / "layers-mine.png").is_file()
    assert "layers-mine.png" in (out / "report.md").read_text()
    assert "last layer" in (out / "table2.md").read_text()
