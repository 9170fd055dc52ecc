"""A sweep: a run for each combination of values, then one table and one picture of them all.

`trials` reads what is to be varied and `run_name` names the runs; when they are done, `write_sweep`
reads what each has left in its folder. Runs that differ in their seed only are repetitions.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from g2l.errors import UserError
from g2l.files import read_json, safe, write_table, write_text
from g2l.pictures import canvas, save_figure
from g2l.report import markdown
from g2l.runs import column

Trial = dict[str, str]  # what is varied, and the value
MEASURES = ("cka_before", "cka_after", "cka_best", "best_step", "steps")
Groups = dict[tuple[str, ...], list[dict]]  # rows of repetitions, by their values


def trials(specs: Sequence[str], known: Collection[str]) -> list[Trial]:
    """`NAME=VALUE,VALUE,...`, once or more, as all combinations; the last name varies fastest.

    Raises UserError for a name that is not of `known` or is given twice, and for an empty value.
    """
    axes = {}
    for spec in specs:
        name, _, text = spec.partition("=")
        name = name.replace("-", "_")
        values = text.split(",")
        if name not in known or name in axes or "" in values:
            raise UserError(
                f"sweep {spec}: expected "
                f"NAME=VALUE,VALUE,... with each NAME once, of {', '.join(known)}"
            )
        axes[name] = values
    found = itertools.product(*axes.values())
    return [dict(zip(axes, values, strict=True)) for values in found]


def run_name(base: str, trial: Trial) -> str:
    """The folder of a trial's run."""
    parts = [safe(f"{name}-{value}") for name, value in trial.items()]
    return "_".join([base, *parts])


def write_sweep(folder: Path, base: str, found: Sequence[Trial]) -> Path:
    """Write BASE_NAMES.md, .csv and .png beside the finished runs; the path of the first."""
    path = folder / f"{'_'.join([base, *found[0]])}.md"
    names = [name for name in found[0] if name != "seed"] or ["seed"]
    rows = []
    groups = Groups()
    for trial in found:
        run = folder / run_name(base, trial)
        finished = read_json(run / "config.json")["finished"]
        best = finished["best"]
        row = {
            **trial,
            "run": run.name,
            "cka_before": best["before"],
            "cka_after": best["last"],
            "cka_best": best["cka"],
            "best_step": best["step"],
            "steps": finished["step"],
        }
        rows.append(row)
        key = tuple(trial[name] for name in names)
        repetitions = groups.setdefault(key, [])
        repetitions.append({**row, "curve": column(run, "cka")})
    table = [list(rows[0]), *(row.values() for row in rows)]
    write_table(path.with_suffix(".csv"), table)
    write_text(path, _table(names, groups))
    _draw(path.with_suffix(".png"), names, groups)
    return path


def _after(rows: list[dict]) -> tuple[float, float]:
    """Mean and standard deviation of the CKA at the end of repetitions; 0 of a single one."""
    values = [row["cka_after"] for row in rows]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _table(names: list[str], groups: Groups) -> str:
    """Means of repetitions in Markdown, and where cohorts were varied, how many slides it took."""
    lines = []
    for key, rows in groups.items():
        apart = f"{_after(rows)[1]:.3f}" if len(rows) > 1 else "–"
        cells = [*key, str(len(rows)), apart]
        for name in MEASURES:
            mean = np.mean([row[name] for row in rows])
            cells.append(f"{mean:.4g}")
        lines.append(cells)
    head = [*names, "runs", "± of cka_after", *MEASURES]
    text = markdown(head, lines)
    text += "\nCKA: unbiased, to the teacher, on the patches held out; ±: over seeds.\n"
    if names == ["max_slides"]:
        most = max(groups, key=lambda key: int(key[0]) or np.inf)  # 0: all
        mean, spread = _after(groups[most])
        margin = max(spread, 0.01)
        near = [key for key in groups if _after(groups[key])[0] >= mean - margin]
        few = min(near, key=lambda key: int(key[0]) or np.inf)
        text += f"As good as the largest cohort, within {margin:.3f}: {few[0]} slides.\n"
    return text


def _draw(path: Path, names: list[str], groups: Groups) -> None:
    """CKA over steps for each combination, and at the end over the values of the first name.

    A line joins values that have an order; between losses it would say what nobody measured.
    """
    figure, ((left, right),) = canvas(1, 2, 4.6, 3.6)
    lines: dict[str, dict] = {}  # by the other values
    ordered = all(re.fullmatch(r"[\d.+-]+(e[\d+-]+)?", key[0]) for key in groups)
    for number, (key, rows) in enumerate(groups.items()):
        for row in rows:
            left.plot(*row["curve"], color=f"C{number}", label=" ".join(key))
        line = lines.setdefault(" ".join(key[1:]), {})
        line[key[0]] = _after(rows)
    for label, after in lines.items():
        means, spreads = zip(*after.values(), strict=True)
        right.errorbar(list(after), means, spreads, fmt="o-" if ordered else "o", label=label)
    handles, labels = left.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # not for each repetition
    left.legend(once.values(), once, title=", ".join(names))
    left.set(xlabel="step", ylabel="CKA to the teacher, held-out patches")
    right.set(xlabel=names[0], ylabel="CKA at the end, ± over seeds")
    if len(names) > 1:
        right.legend(title=", ".join(names[1:]))
    save_figure(figure, path)
