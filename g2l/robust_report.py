"""TODO."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np

from g2l.benchmarks import Benchmark
from g2l.files import safe
from g2l.pictures import draw_sheet, save_figure
from g2l.protocols import FEW
from g2l.report import markdown, ranked
from g2l.results import read_metrics
from g2l.robust import DRAWS, KS, bounded_of, codes, index_of
from g2l.shifts import SHIFTS, shift

# Table 3 of arXiv 2510.11176 for k as in KS, as far as a public digest of the paper (papernotes, AAAI 2026) gives it:
# its rows for UNI and Virchow were not seen. uni2-h is the paper's UNI-v2.
PAPER_TABLE3 = {
    "h-optimus-0": (1.0826, 1.1890, 1.3730, 1.8467),
    "uni2-h": (1.0682, 1.2433, 1.4113, 1.8548),
    "hibou-l": (0.9056, 0.9905, 1.0879, 1.1855),
    "G2L": (1.0891, 1.3002, 1.5021, 2.0316),
}


COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c564b", "#7f7f7f")


KINDS = {
    (True, False): ("same tissue, other centre", "#009e73"),
    (True, True): ("same tissue, same centre", "#56b4e9"),
    (False, True): ("other tissue, same centre", "#d55e00"),
    (False, False): ("neither", "#bbbbbb"),
}


def table3(results: Path) -> str:
    """table3.md from metrics.jsonl alone: a section per benchmark and way of sampling; with TIGER the paper's numbers,
    which say nothing of other patches."""
    rows = [row for row in read_metrics(results) if row["protocol"] == "robustness"]
    text = [
        "# Table 3: robustness index",
        "",
        "Neighbours of the same class / neighbours of the same centre, summed over all patches. **1 is no "
        "threshold**: *chance* is what features that know nothing score on the same sample, and where every model "
        "ends as k grows. Above chance the tissue weighs more than the centre, below it the centre.",
        "",
    ]
    for key in dict.fromkeys((row["benchmark"], row["settings"]) for row in rows):
        text += section([row for row in rows if (row["benchmark"], row["settings"]) == key])
    if not any(row["benchmark"] == "tiger" for row in rows):
        return "\n".join(text)
    paper = [[name, *(f"{value:.4f}" for value in values)] for name, values in PAPER_TABLE3.items()]
    return "\n".join(
        [
            *text,
            "## The paper's Table 3",
            "",
            "TIGER, 40 patches of each class, 21 centres. No chance "
            "level is given with it; with balanced centres it would be about 4.6. Taken from a public digest "
            "of the paper; its rows for UNI and Virchow were not seen.",
            "",
            markdown(["model", *(f"k = {k}" for k in KS)], paper),
        ]
    )


def section(rows: list[dict]) -> list[str]:
    """Lines of table3.md for the rows of one benchmark and way of sampling."""
    benchmark, settings = rows[0]["benchmark"], rows[0]["settings"]
    drawn = [row["patches"] for row in rows if row["model"] == "chance"][-1]
    rows = [
        row | {f: math.nan for f in ("value", "low", "high") if row.get(f, 0) is None}
        for row in rows
        if row["patches"] == drawn
    ]  # a model measured on other patches is not comparable
    pick = lambda **want: [row for row in rows if all(row.get(f) == v for f, v in want.items())]  # noqa: E731
    values = lambda n, m, k=None, **more: [r["value"] for r in pick(model=n, metric=m, k=k, **more)]  # noqa: E731
    average = lambda *which, **more: float(np.mean(values(*which, **more) or np.nan))  # noqa: E731
    models = {row["model"]: row for row in pick(metric="seen")}
    ks = sorted({row["k"] for row in pick(model="chance", metric="index")})
    middle, samples = ks[:3][-1], len(values("chance", "index", ks[0]))

    def column(k):
        means, texts = [average(n, "index", k) for n in models], []
        for n, mean in zip(models, means, strict=True):
            texts.append(
                show(mean)
                + (f" ± {np.std(values(n, 'index', k), ddof=1):.2f}" if samples > 1 else "")
            )
        if len(models) > 1:
            texts = ranked([mean if np.isfinite(mean) else None for mean in means], texts)
        paper = [
            PAPER_TABLE3.get(row["paper"]) if benchmark == "tiger" else None
            for row in models.values()
        ]
        return [
            t + (f" (paper {p[KS.index(k)]:.2f})" if p else "")
            for t, p in zip(texts, paper, strict=True)
        ]

    seen = {n: row for n, row in models.items() if row["value"]}
    body = zip(models, *map(column, ks), strict=True)
    cells = {(row["class"], row["center"]): row for row in pick(metric="cell")}
    classes, centers = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    counts = {c: sum(row["value"] for key, row in cells.items() if key[0] == c) for c in classes}
    text = [
        f"## {benchmark}",
        "",
        f"{settings[0].upper()}{settings[1:]}. {sum(counts.values())} drawn: "
        + ", ".join(f"{c} {n}" for c, n in counts.items())
        + ". "
        + (
            f"Mean ± standard deviation of {samples} seeded samples."
            if samples > 1
            else "One sample."
        ),
        "",
        markdown(
            ["model", *(f"k = {k}" for k in ks)],
            [[n + " †" * (n in seen), *cells] for n, *cells in body]
            + [["*chance*", *(show(average("chance", "index", k)) for k in ks)]],
        ),
    ]
    if seen:
        known = ", ".join(f"{n}: {row['value']} of {row['patients']}" for n, row in seen.items())
        text += [
            f"† distilled on patients of this benchmark ({known}); --exclude-seen leaves them out.",
            "",
        ]
    blind = average("chance", "index", middle)
    behind = [
        [
            n,
            show(average(n, "index", middle) / blind),
            *(show(average(n, m, middle)) for m in ("bounded", "knn_class", "knn_center")),
            *(show(average(n, m)) for m in ("probe_class", "probe_center")),
        ]
        for n in [*models, "chance"]
    ]
    text += [
        f"### What stands behind it, k = {middle}",
        "",
        f"PathoROB's bounded index; balanced accuracy of the {middle} neighbours' vote and of a linear probe on "
        "unseen patients. The class should be found; the centre is found as far as the features hold it.",
        "",
        markdown(
            [
                "model",
                "index / chance",
                "bounded",
                "kNN class",
                "kNN centre",
                "probe class",
                "probe centre",
            ],
            behind,
        ),
    ]
    over = []
    for row in pick(metric="index_interval", k=middle) + pick(metric="index_difference", k=middle):
        rival, start = (row["other"], 0) if row["other"] else ("chance", blind)
        word = (
            "below"
            if row["high"] < start
            else "above"
            if row["low"] > start
            else "not clearly apart from"
        )
        known = np.isfinite(row["low"])
        over.append(
            [
                row["model"] + (f" − {rival}" if row["other"] else ""),
                show(row["value"]),
                f"{show(row['low'])} to {show(row['high'])}" if known else "–",
                f"{word} {rival}" if known else "too few patients to tell",
            ]
        )
    text += [
        f"### Over patients, k = {middle}",
        "",
        f"95 % interval of {DRAWS} resamples of the patients, paired; fewer than {FEW} allow none.",
        "",
        markdown(["model", "index", "interval", "reading"], over),
    ]
    for field, title in (("class", "class"), ("center", "centre")):
        kinds = [row[field] for row in pick(metric=f"index_by_{field}", model="chance")]
        index = lambda n, kind, f=field: show(average(n, f"index_by_{f}", middle, **{f: kind}))  # noqa: E731
        text += [
            f"### By {title}",
            "",
            f"Index of the patches of each {title}, k = {middle}.",
            "",
            markdown(
                [title, *models, "chance"],
                [[kind, *(index(n, kind) for n in [*models, "chance"])] for kind in kinds],
            ),
        ]
    shown = {
        key: f"{c['value']} of {c['available']}" if c["available"] else "–"
        for key, c in cells.items()
    }
    pictures = [
        f"![{file.removesuffix('.png')} of {benchmark}](robustness/{safe(benchmark)}/{file})\n"
        for row in pick(metric="pictures")
        for file in row["files"]
    ]
    text += ["### Pictures", "", *pictures] if pictures else []
    return [
        *text,
        "### Patches",
        "",
        "Drawn, in the first sample, of those there are; "
        f"{list(shown.values()).count('–')} of {len(cells)} cells are empty (–).",
        "",
        markdown(["centre", *classes], [[z, *(shown[c, z] for c in classes)] for z in centers]),
    ]


def show(value: float) -> str:
    """Two decimals, or a dash for what is not defined."""
    return f"{value:.2f}" if np.isfinite(value) else "–"


def aligned(lines: list[str]) -> str:
    """Markdown for a terminal: no emphasis, table columns of one width."""
    text, out = re.sub(r"</?u>|\*+|^#+ ", "", "\n".join(lines), flags=re.M), []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] if is_table else [line]
            for line in lines
        ]
        width = [max(map(len, column)) if is_table else 0 for column in zip(*rows, strict=True)]
        out += [
            "  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip()
            for row in rows
            if row[-1] != "---"
        ]
    return "\n".join(out)


def canvas(rows: int, columns: int, width: float, height: float):
    """A figure and its axes (rows, columns), each `width` x `height` inches; nothing is shown on a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )


def draw_index(path: Path, title: str, counts: dict[str, list[np.ndarray]]) -> None:
    """Index and bounded index of each model over k = 1, 2, ...: mean and range of the samples, and the chance line."""
    figure, axes = canvas(1, 2, 5.2, 4)
    for ax, rule, label in zip(
        axes[0], (index_of, bounded_of), ("robustness index", "bounded index"), strict=True
    ):
        for (name, samples), color in zip(
            counts.items(), itertools.cycle(["black", *COLORS]), strict=False
        ):
            curves = np.array([rule(count.sum(1)) for count in samples])
            k = np.arange(1, curves.shape[1] + 1)
            ax.plot(
                k, curves.mean(0), color=color, label=name, ls="--" if name == "chance" else "-"
            )
            if name != "chance":
                ax.fill_between(k, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
        ax.set(xlabel="neighbours k", ylabel=label, xticks=[1, *KS])
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 1].set_ylim(0, 1)
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{title}: tissue against centre among nearest neighbours (shaded: range of samples)",
        fontsize=10,
    )
    save_figure(figure, path)


def draw_map(
    path: Path,
    title: str,
    benchmark: Benchmark,
    x: dict[str, np.ndarray],
    rows: np.ndarray,
    method: str,
) -> None:
    """Each model's embedding of `rows` in two dimensions, coloured by class on the left, by centre on the right."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    figure, axes = canvas(len(x), 2, 5.4, 3.4)
    for (name, array), pair in zip(x.items(), axes, strict=True):
        flat = array[rows] / np.linalg.norm(array[rows], axis=1, keepdims=True).clip(1e-12)
        flat = PCA(min(50, *flat.shape), random_state=0).fit_transform(flat)
        if method == "tsne":
            flat = TSNE(
                perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0
            ).fit_transform(flat)
        for ax, by, values in (
            (pair[0], "class", np.array(benchmark.classes)[benchmark.labels[rows]]),
            (pair[1], "centre", np.array(benchmark.centers)[rows]),
        ):
            for i, value in enumerate(np.unique(values)):
                ax.scatter(
                    *flat[values == value, :2].T,
                    s=9,
                    lw=0,
                    color=COLORS[i % len(COLORS)],
                    label=value,
                    marker="osD^v"[i // len(COLORS) % 5],
                )
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, by {by}", fontsize=9)
            ax.spines[:].set_color("#bbbbbb")
            if ax in axes[0]:
                ax.legend(
                    fontsize=7,
                    markerscale=2,
                    frameon=False,
                    loc="upper left",
                    bbox_to_anchor=(1, 1),
                )
    figure.suptitle(
        f"{title}, {'t-SNE' if method == 'tsne' else 'first two PCA axes'}", fontsize=10
    )
    save_figure(figure, path)


def draw_misled(
    path: Path, name: str, benchmark: Benchmark, sample: np.ndarray, rows: np.ndarray
) -> None:
    """The queries of a sample whose five nearest neighbours `rows` (n, 5) most often share the centre but not the
    tissue, at most one per patient."""
    labels, centers, groups = (
        codes(a)[sample] for a in (benchmark.labels, benchmark.centers, benchmark.groups)
    )
    misled = (
        (labels[rows] != labels[:, None]) & (centers[rows] == centers[:, None]) & (rows >= 0)
    ).sum(1)
    order = [i for i in np.argsort(-misled, kind="stable") if misled[i]]
    queries = [order[j] for j in np.sort(np.unique(groups[order], return_index=True)[1])][:6]
    color = lambda i, j: (
        "black" if i == j else KINDS[labels[j] == labels[i], centers[j] == centers[i]][1]
    )  # noqa: E731
    lines = [
        [
            (
                benchmark.images[int(sample[j])],
                f"{benchmark.classes[benchmark.labels[sample[j]]]}\n{benchmark.centers[sample[j]]}",
                color(i, j),
            )
            for j in (i, *rows[i])
            if j >= 0
        ]
        for i in queries
    ]
    draw_sheet(
        path,
        f"{name}: neighbours that share the centre but not the tissue"
        if queries
        else f"{name}: no neighbour shares the centre of its query but not the tissue",
        {"query": "black"} | {text: c for text, c in KINDS.values()},
        lines,
    )


def draw_shift(
    path: Path, kind: str, strengths: list[float], image: np.ndarray, found: dict, names: list[str]
) -> None:
    """One patch at every strength above the models' curves: cosine, relative distance, share nearest to itself."""
    meaning, nothing, *_ = SHIFTS[kind]
    steps = sorted({*strengths, nothing})
    figure, axes = canvas(1, 3, 4.2, 4.6)
    strip = figure.add_axes((0.03, 0.72, 0.94, 0.22))
    strip.imshow(
        np.concatenate(
            [
                np.pad(
                    image if s == nothing else shift(image, kind, s),
                    ((0, 0), (3, 3), (0, 0)),
                    constant_values=255,
                )
                for s in steps
            ],
            1,
        )
    )
    width = image.shape[1] + 6
    strip.set(
        xticks=[width * (i + 0.5) for i in range(len(steps))],
        xticklabels=[f"{s:g}" for s in steps],
        yticks=[],
    )
    strip.spines[:].set_visible(False)
    strip.set_title(f"{kind}: one patch, and how far the features of all go", fontsize=10)
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.66), w_pad=0.1)
    labels = {
        "cosine": "cosine to itself unchanged\n(dotted: mean of two patches)",
        "distance": "distance to itself / median distance",
        "first": "share still nearest to itself",
    }
    for ax, (metric, label) in zip(axes[0], labels.items(), strict=True):
        for name, color in zip(names, itertools.cycle(COLORS), strict=False):
            ax.plot(
                steps,
                [found[name, kind, s][metric] for s in steps],
                "o-",
                ms=3,
                color=color,
                label=name,
            )
            if metric == "cosine":
                ax.axhline(found[name, kind, strengths[0]]["others"], color=color, ls=":", lw=1)
        ax.set(xlabel=meaning, ylabel=label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 2].set_ylim(-0.02, 1.02)
    axes[0, 1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)
