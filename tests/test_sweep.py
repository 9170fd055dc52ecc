"""distill.py --sweep: what is varied, the runs it makes, going on, and the table of them."""

import csv
import json

import numpy as np
import pytest
from conftest import torchrun
from PIL import Image
from training import command, losses

import distill
from g2l.errors import UserError
from g2l.sweep import _draw, run_name, trials

pytestmark = pytest.mark.usefixtures("no_curve")


def short(data, runs, *more):
    return command(data, runs, "s", "--max-steps", 2, "--eval-every", 1, *more)


def test_all_combinations_in_order_and_what_is_no_sweep():
    found = trials(["loss=mse,cosine", "max-slides=1,2"], ["loss", "max_slides"])
    assert found[1] == {"loss": "mse", "max_slides": "2"} and len(found) == 4
    assert run_name("b", {"student": "runs/x", "alpha": "2.5"}) == "b_student-runs_x_alpha-2.5"
    for bad in (["lr"], ["lr="], ["lr=1,"], ["speed=1"], ["lr=1", "lr=2"]):
        with pytest.raises(UserError, match="expected NAME=VALUE"):
            trials(bad, ["lr"])


@pytest.mark.slow
def test_a_sweep_leaves_its_runs_a_table_and_a_picture_and_goes_on(data, tmp_path, capsys):
    arguments = short(data, tmp_path, "--sweep", "loss=logsum,mse", "seed=0,1")
    assert distill.main(arguments) == 0
    assert f"sweep: {tmp_path / 's_loss_seed.md'}" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "s_loss_seed.csv").open()))
    assert [row["run"] for row in rows] == [
        f"s_loss-{loss}_seed-{seed}" for loss in ("logsum", "mse") for seed in (0, 1)
    ]
    config = json.loads((tmp_path / "s_loss-mse_seed-1" / "config.json").read_text())
    assert (config["arguments"]["loss"], config["arguments"]["seed"]) == (["mse"], 1)
    assert float(rows[3]["cka_after"]) == config["finished"]["best"]["last"]
    table = (tmp_path / "s_loss_seed.md").read_text()
    spread = np.std([float(row["cka_after"]) for row in rows[2:]], ddof=1)
    assert "| loss | runs |" in table and f"| mse | 2 | {spread:.3f} |" in table
    Image.open(tmp_path / "s_loss_seed.png").load()
    assert distill.main(arguments) == 0
    assert capsys.readouterr().out.count("finished at step 2") == 4


@pytest.mark.slow
def test_cohort_sizes_say_how_many_slides_it_takes(data, tmp_path):
    assert distill.main(short(data, tmp_path, "--sweep", "max-slides=2,4,0")) == 0
    table = (tmp_path / "s_max_slides.md").read_text()
    assert "As good as the largest cohort" in table and " slides." in table
    assert "| 4 | 1 | – |" in table, "one run has no spread"
    used = {}
    for count in (2, 4, 0):
        config = json.loads((tmp_path / f"s_max_slides-{count}" / "config.json").read_text())
        cohort = config["cohort"]
        used[count] = cohort
        assert cohort["slides"] - len(cohort["held out"]) == (count or 6)
        assert cohort["held out"] == used[2]["held out"]
    assert set(used[2]["patients"]) < set(used[4]["patients"]) < set(used[0]["patients"])
    first = [losses(tmp_path / f"s_max_slides-{count}")[0][1] for count in (2, 0)]
    assert first[0] != first[1]


def test_mistakes_in_a_sweep_are_told_before_the_first_run(data, tmp_path, capsys):
    mistakes = (("alpha=4,0", "--alpha 0"), ("steps=3", "NAME=VALUE"), ("loss=mse,hinge", "hinge"))
    for bad, says in mistakes:
        assert distill.main(short(data, tmp_path, "--sweep", bad)) == 1
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("values", "style"), [(("mse", "logsum"), "None"), (("0.5", "1e-3"), "-")])
def test_a_line_joins_only_values_that_have_an_order(values, style, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("g2l.sweep.save_figure", lambda figure, path: figures.append(figure))
    curve = {"curve": ([0, 1], [0.1, 0.2])}
    groups = {
        (value,): [{"cka_after": 0.2, **curve}, {"cka_after": 0.4, **curve}] for value in values
    }
    _draw(tmp_path / "s.png", ["what"], groups)
    (bars,) = figures[0].axes[1].containers
    assert bars.lines[0].get_linestyle() == style and bars.has_yerr
    assert bars.lines[0].get_ydata() == pytest.approx([0.3, 0.3])


@pytest.mark.nightly
def test_a_sweep_under_torchrun(data, tmp_path):
    done = torchrun(2, "distill.py", *short(data, tmp_path, "--sweep", "alpha=2,4"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 2 | 1 |" in (tmp_path / "s_alpha.md").read_text()
    assert len(losses(tmp_path / "s_alpha-4")) == 2
