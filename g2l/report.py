"""TODO."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from g2l.features import display
from g2l.files import safe, write_text
from g2l.protocols import FEW
from g2l.results import Study

# Tables 1 and 2 of arXiv 2510.11176, as far as a public digest of the paper (papernotes, AAAI 2026) gives them; where
# our reference notes hold the same figure they agree. What is not here was not seen.
PAPER_TABLES = {
    protocol: {
        row.split()[0]: {
            model: float(value)
            for model, value in zip(models, row.split()[1:], strict=True)
            if value != "-"
        }
        for row in rows
    }
    for protocol, models, rows in [
        (
            "cka",
            ("hibou-l", "G2L"),
            [
                "bracs 0.7594 0.9683",
                "breakhis-40x 0.8909 0.9558",
                "breakhis-100x 0.9147 0.9686",
                "breakhis-200x 0.9230 0.9734",
                "breakhis-400x 0.8995 0.9575",
            ],
        ),
        (
            "knn",
            ("G2L", "h-optimus-0", "uni2-h", "hibou-l"),
            [
                "tils 0.9362 0.9344 0.9291 0.9214",
                "tp53 0.6904 0.6598 0.6542 0.6504",
                "idc 0.9232 0.9141 0.9165 0.9074",
                "gleason 0.8988 0.8994 0.8678 0.8124",
                "aggc 0.9243 0.9226 0.9170 0.8788",
                "chimera 0.7657 0.7663 0.7605 0.7184",
            ],
        ),
        (
            "probe",
            ("G2L", "h-optimus-0", "uni2-h", "hibou-l", "uni"),
            [
                "tils 0.9838 0.9822 0.9788 0.9827 -",
                "tp53 0.8046 0.7603 0.6795 0.7085 -",
                "idc 0.9796 0.9778 0.9756 0.9488 -",
                "gleason 0.9841 0.9846 0.9790 0.9708 -",
                "aggc 0.9958 0.9955 0.9956 0.9921 -",
                "chimera 0.852 - 0.865 - 0.857",
            ],
        ),
    ]
}


def paired_rows(
    rows: list[dict], benchmarks: Sequence[str], args: Study
) -> list[dict]:
    """The paired differences between this run's models and its teacher and baseline, in their order."""
    models = [display(n) for n in args.models]
    ends = [display(n) for n in (args.teacher, args.baseline) if n in args.models]
    found = [
        r
        for r in rows
        if r["protocol"] == "paired"
        and r["benchmark"] in benchmarks
        and r["model"] in models
        and r["other"] in ends
        and not (args.teacher and r["model"] == display(args.teacher))
    ]
    return sorted(
        found,
        key=lambda r: (
            benchmarks.index(r["benchmark"]),
            models.index(r["model"]),
            models.index(r["other"]),
            list(WORDS).index(r["metric"]),
        ),
    )


def means(rows: Sequence[dict]) -> dict[tuple, tuple[float, float, int]]:
    """(protocol, metric, model, benchmark[, other]) -> mean, standard deviation and number over folds or seeds."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        key = (row["protocol"], row["metric"], row["model"], row["benchmark"])
        if row["value"] is not None:
            found.setdefault((*key, row["other"]) if "other" in row else key, []).append(
                row["value"]
            )
    return {
        key: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v))
        for key, v in found.items()
    }


def families(names: Sequence[str]) -> dict[str, list[str]]:
    """Rows of a table: each benchmark, and before the magnifications of one (NAME-40x ...) their average."""
    rows: dict[str, list[str]] = {}
    for name in names:
        stem = re.sub(r"-\d+x$", "", name)
        same = [n for n in names if n != name and re.sub(r"-\d+x$", "", n) == stem]
        if stem != name and same:
            rows.setdefault(
                f"{stem} (mean of {len(same) + 1})", sorted([name, *same], key=list(names).index)
            )
        rows[name] = [name]
    return rows


def ranked(values: list[float | None], texts: list[str]) -> list[str]:
    """The best text bold, the second underlined, as the paper prints."""
    order = sorted({round(v, 4) for v in values if v is not None}, reverse=True)
    place = [order.index(round(v, 4)) if v is not None else 9 for v in values]
    return [
        f"**{t}**" if p == 0 else f"<u>{t}</u>" if p == 1 else t
        for p, t in zip(place, texts, strict=True)
    ]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [
        [cell.replace("|", "\\|") for cell in row] for row in [head, ["---"] * len(head), *rows]
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def paper_value(protocol: str, model: str, benchmark: str, about: dict) -> str:
    """The paper's own figure for this model and benchmark, or an empty string where none was found."""
    meta = about.get(model, {})
    name = (
        "G2L"
        if meta.get("teacher") == "h-optimus-0" and meta.get("student") == "hibou-l"
        else model
    )
    value = (
        PAPER_TABLES.get(protocol, {})
        .get(benchmark.replace("breakhis-binary", "breakhis"), {})
        .get(name)
    )
    return f" (paper {value:.3f})" if value else ""


def write_tables(args: Study) -> str:
    """table1.md and table2.md from metrics.jsonl alone; returns their text."""
    rows, mean, models = (
        args.rows,
        means(args.rows),
        [display(n) for n in args.models],
    )
    about = {r["model"]: r["metadata"] for r in rows if r["protocol"] == "model"}
    data = {r["benchmark"]: r for r in rows if r["protocol"] == "data"}
    sources = {
        b.name: [o.source for o in args.found[:i] if o.source] for i, b in enumerate(args.found)
    }
    names, teacher = (
        [b.name for b in args.found],
        display(args.teacher) if args.teacher in args.models else None,
    )

    def average(members: list[str], *key: str, column: int = 0) -> float | None:
        """Mean over benchmarks of mean (column 0) or standard deviation (1); key: protocol, metric, model[, other]."""
        keys = [(*key[:3], b, *key[3:]) for b in members]
        return (
            float(np.mean([mean[k][column] for k in keys]))
            if all(k in mean for k in keys)
            else None
        )

    def lines(
        protocol: str, columns: list[str], chance: Callable, cell: Callable
    ) -> list[list[str]]:
        """A row per benchmark: name, chance, and the ranked cells (value, text) of the models."""
        table = []
        kept = [
            b.name
            for b in args.found
            if protocol != "cka" or b.source not in sources.get(b.name, ())
        ]
        for label, members in families(kept).items():
            cells = [cell(members, m) for m in columns]
            texts = [
                "–"
                if v is None
                else t
                + (paper_value(protocol, m, label, about) if len(members) == 1 else "")
                + (" ⚠" if any(m in data[b]["marked"] for b in members) else "")
                for m, (v, t) in zip(columns, cells, strict=True)
            ]
            label = (
                label.replace("-binary", "") if protocol == "cka" else label
            )  # the same images for both tasks
            table.append([label, chance(members), *ranked([v for v, _ in cells], texts)])
        return table

    def alignment(members: list[str], m: str) -> tuple[float | None, str]:
        value, se, biased, floor = (
            average(members, "cka", part, m, teacher)
            for part in ("unbiased", "se", "biased", "floor")
        )
        return value, "" if value is None else (
            f"{value:.3f}"
            + ("" if se is None else f" ± {se:.3f}")
            + f" · {biased:.3f} [{floor:.3f}]"
        )

    one, others = "", [m for m in models if m != teacher]
    if teacher and others:
        table = lines(
            "cka", others, lambda members: str(sum(data[b]["value"] for b in members)), alignment
        )
        one = (
            f"# Table 1: CKA to {teacher}\n\nUnbiased CKA ± its standard error (jackknife over up to ten parts of "
            "whole groups) · biased CKA [what is left of it with the rows of one side shuffled: its chance level]. "
            "Unrelated features have an unbiased CKA of 0. Embeddings as used downstream, before the projector. "
            "Bold: best, underlined: second.\n\n"
            + markdown(["benchmark", "images", *others], table)
        )
        write_text(Path(args.results) / "table1.md", one)

    two = [
        "# Table 2: what the embeddings tell\n\nFolds and splits keep every group (patient, or the data set's best "
        "proxy) on one side. Bold: best, underlined: second; a difference counts only where the paired comparison "
        "below says so."
        + (
            " ⚠: the student has seen some of the patients."
            if any(data[b]["marked"] for b in names)
            else ""
        )
    ]
    knn = f"kNN (PCA {args.pca_dims}, k = {args.k}, majority vote)"
    kinds = [
        ("knn", "accuracy", f"{knn}: accuracy, mean ± sd over folds"),
        ("knn", "balanced accuracy", f"{knn}: balanced accuracy of all folds together"),
        ("probe", "auc", "Linear probe (6:2:2): AUC (macro one-vs-rest), mean ± sd over seeds"),
        (
            "probe",
            "balanced accuracy",
            "Linear probe (6:2:2): balanced accuracy, mean ± sd over seeds",
        ),
    ]
    if args.paper_splits:
        kinds += [
            (
                f"{protocol}-ungrouped",
                metric,
                f"{title}, ungrouped: a patient on both sides (leaks; only to "
                "compare with published numbers)",
            )
            for protocol, metric, title in (kinds[0], kinds[2])
        ]
    for protocol, metric, title in kinds:

        def chance(members: list[str], protocol: str = protocol, metric: str = metric) -> str:
            common = (
                average(members, protocol, "majority", m) for m in models
            )  # the same for each that has it
            value = (
                next((v for v in common if v is not None), None)
                if metric == "accuracy"
                else 0.5
                if metric == "auc"
                else np.mean([1 / np.count_nonzero(data[b]["counts"]) for b in members])
            )
            return "–" if value is None else f"{value:.3f}"

        def cell(
            members: list[str], m: str, protocol: str = protocol, metric: str = metric
        ) -> tuple:
            value, sd = (average(members, protocol, metric, m, column=column) for column in (0, 1))
            return value, "" if value is None else f"{value:.3f}" + (f" ± {sd:.3f}" if sd else "")

        table = lines(protocol if metric in ("accuracy", "auc") else "", models, chance, cell)
        two.append(
            f"## {title}\n\n"
            + markdown(
                ["benchmark", "majority class" if metric == "accuracy" else "chance", *models],
                table,
            )
        )
    table = [
        [r["benchmark"], r["model"], r["other"], WORDS[r["metric"]], with_interval(r), verdict(r)]
        for r in paired_rows(rows, names, args)
    ]
    if table:
        two.append(
            "## Paired differences\n\nModel minus other with its 95 % interval: over 1,000 resamplings of whole "
            f"groups; for CKA by the jackknife. Fewer than {FEW} groups allow none.\n\n"
            + markdown(["benchmark", "model", "other", "measure", "difference", "reading"], table)
        )
    two = "\n\n".join(two)
    write_text(Path(args.results) / "table2.md", two)
    return one + "\n\n" + two


WORDS = {
    "cka": "CKA to teacher",
    "knn": "kNN accuracy",
    "probe": "probe AUC",
}  # of paired differences


def verdict(row: dict) -> str:
    """A paired difference in a word: better, worse, or no difference that the data can show."""
    if row["low"] is None:
        return "too few groups to tell"
    return "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "within noise"


def with_interval(row: dict) -> str:
    """A paired difference with its interval, where there is one."""
    return f"{row['value']:+.3f}" + (
        "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    )


def role(name: str, args: Study) -> str:
    """What a model is in this comparison: teacher, before or after distillation, or nothing."""
    origin = args.cards[name]["metadata"].get("teacher")
    return (
        "teacher"
        if name == args.teacher
        else "before distillation"
        if name == args.baseline
        else f"distilled from {display(origin)}"
        if origin
        else ""
    )


def write_report(args: Study, tables: str, failures: list[str]) -> None:
    """report.md: tables, pictures and everything that one must know to read them."""
    data = {r["benchmark"]: r for r in args.rows if r["protocol"] == "data"}
    names = [b.name for b in args.found if b.name in data]
    models = [
        [
            display(n),
            role(n, args),
            f"{c['parameters'] / 1e6:,.1f} M",
            str(c["dim"]),
            c["embedding"],
            str(c["input_size"]),
            f"{c['ms_per_image']:.1f}",
            str(c["weights"]),
        ]
        for n, c in args.cards.items()
    ]
    benchmarks = [
        [
            b,
            data[b]["level"],
            str(data[b]["value"]),
            str(data[b]["groups"]),
            ", ".join(
                f"{c} {n}" for c, n in zip(data[b]["classes"], data[b]["counts"], strict=True)
            ),
            "; ".join(data[b]["notes"]) or "–",
        ]
        for b in names
    ]
    pictures = [
        f"## {b}\n\n"
        + "\n\n".join(
            f"![{kind} of {b}](pictures/{kind}-{safe(b)}{tail}.png)"
            for kind, tail in [
                ("confusion", ""),
                ("cka", ""),
                *(("gallery", f"-{safe(display(n))}") for n in args.models),
            ]
            if (Path(args.results) / "pictures" / f"{kind}-{safe(b)}{tail}.png").is_file()
        )
        for b in names
    ]
    if args.no_pictures:
        pictures = []
    write_text(
        Path(args.results) / "report.md",
        "\n\n".join(
            [
                "# Evaluation",
                "Written by `"
                + " ".join(["python evaluate.py", *args.argv])
                + f"` on {args.device_used}.",
                *(["**Not evaluated:** " + "; ".join(failures)] if failures else []),
                *(
                    ["![accuracy against size and time](figure1.png)"]
                    if (Path(args.results) / "figure1.png").is_file() and not args.no_pictures
                    else []
                ),
                "## Models\n\n"
                + markdown(
                    [
                        "model",
                        "role",
                        "parameters",
                        "width",
                        "embedding",
                        "input px",
                        f"ms per image ({args.device_used})",
                        "weights",
                    ],
                    models,
                ),
                "## Benchmarks\n\n"
                + markdown(
                    ["benchmark", "level", "images", "groups", "classes", "notes"], benchmarks
                ),
                tables.replace("\n## ", "\n### ").replace("# Table", "## Table"),
                *pictures,
            ]
        ),
    )


def summarize(args: Study) -> str:
    """One screen: per benchmark and model CKA, kNN and probe beside chance, and what the paired comparison allows."""
    mean, rows, shown = (
        means(args.rows),
        args.rows,
        [display(n) for n in args.models],
    )
    width, teacher, lines = (
        max(map(len, shown)) + 2,
        display(args.teacher) if args.teacher else None,
        [],
    )

    def form(*key: str, spread: float | None = None) -> str:
        if key not in mean:
            return "–"
        spread = mean[key][1] if spread is None else spread
        return f"{mean[key][0]:.3f}" + (f" ± {spread:.3f}" if spread else "")

    for b, d in [
        (b.name, r)
        for b in args.found
        for r in rows
        if r["protocol"] == "data" and r["benchmark"] == b.name
    ]:
        lines += [
            "",
            f"{b}: {d['value']} images, {np.count_nonzero(d['counts'])} classes, {d['groups']} groups (never "
            "on both sides of a split)",
            f"{'':{width}}{'params':>9}{'ms/img':>8}   {'CKA to teacher':<16}{'kNN accuracy':<16}probe AUC",
        ]
        for m, about in zip(shown, args.cards.values(), strict=True):
            se = mean.get(("cka", "se", m, b, teacher), (0,))[0]
            cka = "teacher" if m == teacher else form("cka", "unbiased", m, b, teacher, spread=se)
            lines.append(
                f"{m:{width}}{about['parameters'] / 1e6:>7.1f} M{about['ms_per_image']:>8.1f}   {cka:<16}"
                f"{form('knn', 'accuracy', m, b):<16}{form('probe', 'auc', m, b)}"
            )
        common = next(
            (m for m in shown if ("knn", "majority", m, b) in mean), ""
        )  # the same for each that has it
        lines.append(
            f"{'majority class / chance':{width + 20}}{'0.000':<16}"
            f"{form('knn', 'majority', common, b, spread=0):<16}0.500"
        )
        lines += [
            f"  {r['model']} against {r['other']}: {WORDS[r['metric']]} {with_interval(r)}, {verdict(r)}"
            for r in paired_rows(rows, [b], args)
        ]
        lines += [f"  note: {note}" for note in d["notes"]]
    return "\n".join(lines)
