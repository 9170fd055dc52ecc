"""The recipe: losses, schedules, weight decay and the stop rule, each against its definition."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch

import distill
from g2l.models import load_model
from g2l.recipe import LOSSES, Distiller, Said, StopRule, cosine, look, param_groups
from g2l.runs import Run


def test_schedules_reach_their_ends():
    assert cosine(1e-4, 1e-6, 0, 100) == pytest.approx(1e-4)
    assert cosine(1e-4, 1e-6, 99, 100) == pytest.approx(1e-6)
    assert cosine(0.05, 0.5, 50, 101) == pytest.approx(0.275)
    assert cosine(1.0, 0.0, 0, 1) == 1.0


@pytest.mark.parametrize("kind", ["consecutive", "cumulative", "off"])
def test_stop_rule_is_the_papers_sentence(kind):
    rng = np.random.default_rng(1)
    sequence = (
        10
        + np.exp(-np.arange(900) / 60)
        + rng.normal(0, 0.02, 900)
        + 0.002 * np.maximum(0, np.arange(900) - 500)
    )
    rule, fired = StopRule(kind, window=100, patience=10, minimum=150), None
    for i, loss in enumerate(sequence.tolist()):
        if rule.update(loss):
            fired = i
            break
        if i == 444:  # a resumed rule goes on as it was
            state = json.loads(json.dumps(rule.state_dict()))
            rule = StopRule(kind, window=100, patience=10, minimum=150)
            rule.load_state_dict(state)
    above = [i >= 100 and sequence[i] > sequence[i - 100 : i].mean() for i in range(900)]
    runs, total, expected = 0, 0, None
    for i, high in enumerate(above):
        runs, total = (runs + 1 if high else 0), total + high
        if (runs if kind == "consecutive" else total) > 10 and i + 1 >= 150 and kind != "off":
            expected = i
            break
    assert fired == expected and (kind == "off") == (fired is None)
    if kind == "consecutive":
        assert fired > 500


def test_weight_decay_spares_vectors_and_tokens():
    student = load_model("timm:test_vit", "random")
    args = distill.build_parser().parse_args([])
    distiller = Distiller(student, 64, [96], args)
    names = {id(p): n for n, p in distiller.named_parameters()}
    decay, spared = (
        {names[id(p)] for p in group["params"]} for group in param_groups(distiller, False)
    )
    assert decay | spared == set(names.values()) and not decay & spared
    assert {
        "projector",
        "student.net.patch_embed.proj.weight",
        "student.net.blocks.0.attn.qkv.weight",
    } <= decay
    assert {
        "student.net.cls_token",
        "student.net.pos_embed",
        "student.net.norm.weight",
        "student.net.blocks.0.mlp.fc1.bias",
    } <= spared
    assert not param_groups(distiller, True)[1]["params"]


def test_losses_are_what_their_names_say():
    random_ = torch.Generator().manual_seed(0)
    s, t = torch.randn(32, 64, generator=random_), torch.randn(32, 96, generator=random_)
    values = {}
    for kind in LOSSES:
        args = distill.build_parser().parse_args(["--loss", kind])
        distiller = Distiller(load_model("timm:test_vit", "random"), 64, [96], args)
        values[kind] = distiller.loss(Said(s), [Said(t)])
        values[kind].backward()
        assert distiller.projector.grad.abs().max() > 0
    y = (s.double() @ distiller.projector.detach().double()).numpy()
    a, b = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-4) for v in (y, t.double().numpy()))
    d = a - b
    soft = [np.exp(v - v.max(1, keepdims=True)) for v in (a, b)]
    p, q = (v / v.sum(1, keepdims=True) for v in soft)
    wanted = {
        "logsum": math.log((d**4).sum()),
        "mse": (d**2).mean(),
        "cosine": 1 - ((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))).mean(),
        "smooth-l1": np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5).mean(),
        "kl": (q * np.log(q / p)).sum(1).mean(),
        "correlation": math.log((((a * b).mean(0) - 1) ** 4).sum() + 1e-5),
    }
    for kind, value in wanted.items():
        assert values[kind].item() == pytest.approx(value, rel=1e-4), kind
    assert values["logsum"].item() == pytest.approx(
        math.log(12 * 32 * 96), abs=0.25
    )  # independent features: E d^4 = 12


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_vit3"]
)  # class token; register and mean; and pooling
def test_all_tokens_are_the_embedding_and_the_patches(name):
    model, x = load_model(f"timm:{name}", "random"), torch.rand(2, 3, 160, 160)
    args = distill.build_parser().parse_args(["--tokens", "all"])
    found = look(model, x, args).rows("all").unflatten(0, (2, -1))
    tokens = model.tokens(model.normalize(x))
    assert torch.equal(found[:, 0], model(model.normalize(x)))
    assert torch.equal(found[:, 1:], tokens[:, model.num_prefix_tokens :]) and found.shape[1] == 101
    found.sum().backward()  # several ranks wait for the gradient of every parameter
    assert all(p.grad is not None for p in model.parameters())


def test_the_loss_picture_names_the_patches_of_cka_and_shows_its_whole_range(tmp_path, monkeypatch):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    row = {"loss": 1.0, "lr": 1e-3, "weight_decay": 0.1}
    steps = [{"step": i, "cka": 0.5 + i / 1e4} | row for i in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    with contextlib.closing(Run(tmp_path, 1, True, {}, [])) as run:
        run.draw_loss("256 patches of 3 patients that are held out")
    (middle,) = [axis for axis in drawn[0].axes if "CKA" in axis.get_ylabel()]
    assert middle.get_title("left") == "on 256 patches of 3 patients that are held out"
    assert middle.get_ylim() == (0, 1)
