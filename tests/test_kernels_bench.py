"""The benchmark says nothing that is wrong; the GPU day's steps end, are recorded and reported."""

import json
import math
import re
import shutil
import time

import gpu_day
import pytest
import torch

import kernels
from kernels import bench

CPU = torch.device("cpu")


def case(ours):
    runs = {"ours": lambda: ours, "rival": lambda: 1.0}
    return bench.Case("k", "s", runs, lambda value: abs(value - 1), 1e-6)


@pytest.mark.parametrize("ours", [1.0, 1.1])
def test_no_speed_up_is_printed_for_a_wrong_result(ours, capsys):
    rows = bench.compare(case(ours), CPU, 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert [row["right"] for row in rows] == [ours == 1, True]
    assert ("WRONG" in lines[0]) == (ours != 1) and ("x |" in lines[1]) == (ours == 1)


@pytest.mark.slow
def test_benchmark_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "cka.json"
    assert bench.main(["cka", "--quick", "--device", "cpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["torch"] == torch.__version__
    assert {row["name"] for row in found["rows"]} >= {"ours", "eager", "numpy", "Grams kept"}
    assert all(row["right"] and row["ms_20"] <= row["ms"] <= row["ms_80"] for row in found["rows"])
    assert capsys.readouterr().out.count("| ours |") == 2


@pytest.mark.parametrize("kind", ["Gaussian", "clusters", "identical rows"])
def test_every_search_of_the_benchmark_is_right_and_an_error_is_seen(kind):
    base = bench.knn_data(kind, 400, 20)
    missed = bench.missed(base, 5)
    for search in bench.searches(CPU).values():
        index = bench.neighbours(search, base, 5)
        assert missed(index) == 0
        assert not (index == torch.arange(400)[:, None]).any()
        assert missed(index.flip(0)) > 0.1


def test_a_step_that_fails_or_hangs_is_recorded_and_the_next_one_runs(capfd):
    hang = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    wanted = {
        "good": (["-c", "print('fine')"], 60),
        "bad": (["-c", "raise SystemExit('broken')"], 60),
        "slow": (["-c", hang], 3),
        "after": (["-c", "print('still here')"], 60),
    }
    start = time.monotonic()
    results = gpu_day.run_all(wanted, 120)
    assert time.monotonic() - start < 55
    assert [result["status"] for result in results.values()] == [0, 1, None, 0]
    assert "broken" in results["bad"]["output"] and "begun" in results["slow"]["output"]
    assert gpu_day.run_all(wanted, 0)["good"]["output"].startswith("not begun")


def test_steps_fit_the_day(tmp_path):
    steps = gpu_day.steps(tmp_path)
    assert sum(limit for _, limit in steps.values()) <= gpu_day.BUDGET <= 480


def test_predictions_of_the_readme_stand_beside_what_was_measured():
    predicted = gpu_day.predictions(gpu_day.README.read_text())
    assert {row["kernel"].split(",")[0] for row in predicted} == {"logsum", "cka", "knn"}
    for row in predicted:
        assert 0 < row["floor"] <= row["ours"] and row["rival"] > 0
    first = {"kernel": predicted[0]["kernel"], "shape": predicted[0]["shape"]}
    rows = [
        {**first, "name": "ours", "ms": 2.0, "right": True},
        {**first, "name": "eager", "ms": 1.0, "right": False},
        {**first, "name": "torch.compile", "ms": 3.0, "right": True},
    ]
    table = gpu_day.beside(predicted, rows)
    assert (table[0]["measured"], table[0]["best"]) == (2.0, 3.0)
    assert table[1]["measured"] is None
    results = {"fuzz": {"status": 1, "seconds": 3.0, "output": "seed 5"}}
    text = gpu_day.report({"device": "X", "date": "today", "torch": "2"}, results, table)
    assert "| fuzz | FAILED, 3 s |" in text and "seed 5" in text
    assert re.search(r"\| 2 \| .* \| 3 \|", text) and "not measured" in text


def test_predicted_shapes_are_shapes_of_the_benchmark(monkeypatch):
    shapes = set()
    source = bench.__file__
    text = open(source).read()
    for row in gpu_day.predictions(gpu_day.README.read_text()):
        shapes.add(row["shape"])
        assert row["kernel"] in text
        assert all(number in text for number in re.findall(r"^\d+", row["shape"]))
    assert shapes


def test_readme_and_package_say_who_they_are():
    text = gpu_day.README.read_text()
    assert "PyPI" in text and "transformers" in text
    assert kernels.__version__.startswith("0.0.")


def test_transformers_does_without_a_package_of_this_name():
    pytest.importorskip("transformers")
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def test_the_folder_works_under_another_name(tmp_path):
    copy = tmp_path / "g2l_kernels"
    shutil.copytree(gpu_day.ROOT / "kernels", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in copy.glob("*.py"):
        file.write_text(file.read_text().replace("from kernels", "from g2l_kernels"))
    program = (
        "import torch, g2l_kernels as k; x = torch.randn(9, 3);"
        "k.cka(x, x), k.covariance(x), k.knn(x, 2), k.log_sum_loss(x, x.T @ x, x);"
        "assert not any(name.split('.')[0] == 'kernels' for name in sys.modules)"
    )
    result = gpu_day.run_step(
        ["-c", f"import sys; sys.path[0] = {str(tmp_path)!r}; {program}"], 120
    )
    assert result["status"] == 0, result["output"]


def test_profile_names_operations():
    x = torch.randn(50, 50)
    one = bench.Case("k", "s", {"ours": lambda: x @ x}, abs, math.inf)
    text = gpu_day.profile(one, CPU)
    assert text.startswith("k, s") and "aten::mm" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_day_without_a_gpu_is_an_error(tmp_path, capsys):
    assert gpu_day.main(["--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().err
