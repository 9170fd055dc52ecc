"""Everything to measure on a machine with one GPU and no network, in one command of 8 minutes.

    python tests/gpu_day.py --out DIR

Steps run one after another, each with a time limit of its own; one that fails or takes too long is
recorded, and the next one runs. DIR/gpu_day.json and DIR/gpu_day.md then hold what each step said,
the rows of the benchmark, where the time of each kernel goes, and the predictions of
kernels/README.md beside what was measured.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script it is run from tests/

from kernels import bench  # noqa: E402

BUDGET = 460  # seconds for all steps
MODELS = ("h-optimus-0", "hibou-l")  # the teacher and the student of the paper
README = ROOT / "kernels" / "README.md"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_kernels_gpu.py"]


def steps(out: Path) -> dict[str, tuple[list, int]]:
    """name -> (arguments of Python, seconds that it may take)."""
    rows = str(out.resolve() / "bench.json")
    return {
        "tests against fp64": ([*PYTEST, "-n", "4", "-k", "not fuzz"], 90),  # most of it compiles
        "fuzz": ([*PYTEST, "-k", "fuzz"], 50),
        "kernels against rivals": (["-m", "kernels.bench", "--json", rows], 140),
        "profile of each kernel": (["tests/gpu_day.py", "--profile"], 40),
        "training step": (["tests/bench_step.py", "--plain"], 80),
        "foundation models": (["-m", "g2l.models", "--speed", *MODELS], 60),
    }


def run_step(arguments: list, limit: float) -> dict:
    """Run Python with these arguments -> status (None: out of time), seconds and output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
            status = None
        output.seek(0)
        text = output.read()
    return {"status": status, "seconds": time.monotonic() - start, "output": text}


def run_all(wanted: dict[str, tuple[list, int]], budget: float) -> dict[str, dict]:
    """Results by name; no step begins after the budget, and none outlasts it."""
    end, results = time.monotonic() + budget, {}
    for name, (arguments, limit) in wanted.items():
        left = end - time.monotonic()
        if left <= 0:
            results[name] = {"status": None, "seconds": 0.0, "output": "not begun: out of time"}
        else:
            results[name] = run_step(arguments, min(limit, left))
        print(f"{name}: {outcome(results[name])}", flush=True)
    return results


def outcome(result: dict) -> str:
    word = {0: "done", None: "out of time"}.get(result["status"], "FAILED")
    return f"{word}, {result['seconds']:.0f} s"


def predictions(text: str) -> list[dict]:
    """Rows of the table of predictions in kernels/README.md: kernel, shape and times in ms."""
    found = []
    for line in text.partition("<!-- predictions: begin -->")[2].splitlines():
        if "<!-- predictions: end -->" in line:
            break
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 5 and re.fullmatch(r"[\d.]+", cells[2]):
            floor, ours, rival = map(float, cells[2:])
            found.append(
                {
                    "kernel": cells[0],
                    "shape": cells[1],
                    "floor": floor,
                    "ours": ours,
                    "rival": rival,
                }
            )
    return found


def beside(predicted: list[dict], rows: list[dict]) -> list[dict]:
    """Each prediction with measured ms of ours and of the best right rival; None: not measured."""
    table = []
    for row in predicted:
        same = [r for r in rows if (r["kernel"], r["shape"]) == (row["kernel"], row["shape"])]
        ours = [r["ms"] for r in same if r["name"] == "ours"]
        rivals = [r["ms"] for r in same if r["name"] != "ours" and r["right"]]
        measured = {"measured": min(ours, default=None), "best": min(rivals, default=None)}
        table.append({**row, **measured})
    return table


def report(facts: dict, results: dict[str, dict], table: list[dict]) -> str:
    """The Markdown file."""
    lines = [f"# Measured on {facts['device']}, {facts['date']}, torch {facts['torch']}", ""]
    lines += ["| step | outcome |", "|---|---|"]
    lines += [f"| {name} | {outcome(result)} |" for name, result in results.items()]
    lines += ["", "Milliseconds, predicted and measured; the rival is the best that was right.", ""]
    lines += [
        "| kernel | shape | floor | ours, predicted | measured | rival, predicted | measured |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in table:
        cells = [row[name] for name in ("floor", "ours", "measured", "rival", "best")]
        shown = ["not measured" if cell is None else f"{cell:.3g}" for cell in cells]
        lines.append(f"| {row['kernel']} | {row['shape']} | {' | '.join(shown)} |")
    for name, result in results.items():
        lines += ["", f"## {name}", "", "```", result["output"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def profile(case: bench.Case, device: torch.device) -> str:
    """Where one run of ours spends its time, after a first run."""
    case.runs["ours"]()
    with torch.profiler.profile() as trace:
        case.runs["ours"]()
        if device.type == "cuda":
            torch.cuda.synchronize()
    order = f"self_{device.type}_time_total"
    table = trace.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60)
    return f"{case.kernel}, {case.shape}\n{table}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tests/gpu_day.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the two files")
    parser.add_argument("--profile", action="store_true", help="only print the kernels' profiles")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no GPU is visible to PyTorch", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    if args.profile:
        for cases in bench.CASES.values():
            for case in cases(device, True):
                print(profile(case, device))
        return 0
    if args.out is None:
        parser.error("--out DIR is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    results = run_all(steps(args.out), BUDGET)
    measured = args.out / "bench.json"
    rows = json.loads(measured.read_text())["rows"] if measured.exists() else []
    table = beside(predictions(README.read_text()), rows)
    facts = bench.about(device)
    everything = {**facts, "steps": results, "predictions": table, "rows": rows}
    (args.out / "gpu_day.json").write_text(json.dumps(everything, indent=1))
    (args.out / "gpu_day.md").write_text(report(facts, results, table))
    return int(any(result["status"] != 0 for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
