"""Table 3 and its pictures, drawn from recorded measurements.

`table3` writes a section for each benchmark and way of sampling. `Readings` holds what was measured
on one of them, and each part of a section is a function of it: the index, what stands behind it,
intervals over patients, classes and centres one by one, and the patches themselves. The pictures
follow.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from g2l.benchmarks import Benchmark
from g2l.files import safe
from g2l.paper import FIGURES, paper_figure
from g2l.pictures import COLORS, canvas, draw_sheet
from g2l.protocols import FEW
from g2l.report import markdown, ranked
from g2l.results import read_metrics
from g2l.robust import DECIDING, DRAWS, KS, bounded_of, index_of
from g2l.shifts import SHIFTS, shift

KINDS = {
    (True, False): ("same tissue, other centre", "#009e73"),
    (True, True): ("same tissue, same centre", "#56b4e9"),
    (False, True): ("other tissue, same centre", "#d55e00"),
    (False, False): ("neither", "#bbbbbb"),
}


def table3(results: Path) -> str:
    """table3.md from metrics.jsonl alone: a section per benchmark and way of sampling.

    With TIGER the paper's numbers stand at its end; of other patches they say nothing.
    """
    rows = [row for row in read_metrics(results) if row["protocol"] == "robustness"]
    latest = {row["benchmark"]: row.get("data") for row in rows}  # what was read last
    rows = [row for row in rows if row.get("data") == latest[row["benchmark"]]]
    drawn = {row["benchmark"]: row for row in rows if row["metric"] == "pictures"}
    rows = [r for r in rows if r["metric"] != "pictures" or r is drawn[r["benchmark"]]]
    text = (
        "# Table 3: robustness index\n\nNeighbours of the same class / neighbours of the same "
        "centre, summed over all patches. **1 is no threshold**: *chance* is what features that "
        "know nothing score on the same sample, and where every model ends as k grows. Above "
        "chance the tissue weighs more than the centre, below it the centre.\n\n"
    )
    for key in dict.fromkeys((row["benchmark"], row["settings"]) for row in rows):
        text += section([row for row in rows if (row["benchmark"], row["settings"]) == key])
    return text + (paper_table() if "tiger" in latest else "")


def paper_table() -> str:
    """The paper's own Table 3."""
    models = dict.fromkeys(model for what, _, model in FIGURES if what == "index")
    rows = [[model, *(FIGURES["index", str(k), model] for k in KS)] for model in models]
    return (
        "## The paper's Table 3\n\nTIGER, 40 patches of each of five classes, 21 centres, mean ± "
        "standard deviation of five folds. No chance level is given with it; with balanced centres "
        "it would be about 4.6.\n\n" + markdown(["model", *(f"k = {k}" for k in KS)], rows)
    )


class Readings:
    """What was measured on one benchmark in one way of sampling, on the patches drawn last."""

    def __init__(self, rows: list[dict]):
        drawn = [row["patches"] for row in rows if row["model"] == "chance"][-1]
        self.rows = [row for row in rows if row["patches"] == drawn]
        self.benchmark, self.settings = rows[0]["benchmark"], rows[0]["settings"]
        self.models = {row["model"]: row for row in self.of("seen")}
        self.ks = sorted({row["k"] for row in self.of("index", model="chance")})
        self.k = self.ks[:3][-1]  # at which all but the first table is read
        self.seeds = {row["seed"] for row in self.of("index")}
        self.cells = {(row["center"], row["class"]): row for row in self.of("cell")}
        share = [row["value"] for row in self.of("deciding")]
        self.deciding = share[0] if share else 1.0

    def of(self, metric: str, **want: Any) -> list[dict]:
        """The rows of a metric whose fields are as wanted."""
        want["metric"] = metric
        return [row for row in self.rows if want.items() <= row.items()]

    def values(
        self,
        metric: str,
        model: str,
        **want: Any,
    ) -> ndarray:
        """Values of one model, nan where they are not defined."""
        return np.array([row["value"] for row in self.of(metric, model=model, **want)], float)

    def show(
        self,
        metric: str,
        model: str,
        **want: Any,
    ) -> str:
        """Their mean, and for what chance was drawn for their standard deviation."""
        values = self.values(metric, model, **want)
        drawn = model == "chance" and metric not in ("index", "bounded")
        spread = np.std(values) if drawn else 0
        return two(values.mean() if len(values) else np.nan, spread)


def two(value: float | None, spread: float = 0.0) -> str:
    """Two decimals, with the spread where there is one, or a dash for what is not defined."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:.2f}" + (f" ± {spread:.2f}" if spread else "")


def section(rows: list[dict]) -> str:
    """The part of table3.md on one benchmark and way of sampling."""
    held = Readings(rows)
    parts = [what_was_drawn(held), index_table(held), behind(held), over_patients(held)]
    parts += [one_by_one(held, "class", "class"), one_by_one(held, "center", "centre")]
    files = [file for row in held.of("pictures") for file in row["files"]]
    if files:
        folder = f"robustness/{safe(held.benchmark)}"
        links = [f"![{f.removesuffix('.png')} of {held.benchmark}]({folder}/{f})" for f in files]
        parts.append("### Pictures\n\n" + "\n\n".join(links) + "\n")
    parts.append(patches_table(held))
    return "\n".join(parts) + "\n"


def what_was_drawn(held: Readings) -> str:
    """Heading of a section, and its sample in words."""
    counts: dict[str, int] = {}
    for (_, kind), cell in held.cells.items():
        counts[kind] = counts.get(kind, 0) + cell["value"]
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    samples = len(held.seeds)
    spread = "One sample."
    if samples > 1:
        spread = f"Mean ± standard deviation of {samples} seeded samples."
    text = (
        f"## {held.benchmark}\n\n{held.settings[0].upper()}{held.settings[1:]}. "
        f"{sum(counts.values())} patches were drawn: {kinds}. {spread}\n"
    )
    if held.deciding < DECIDING:
        text += (
            f"\n**No reading is given.** Only {held.deciding:.0%} of the patches can choose "
            "between a neighbour of their class in another centre and one of another class in "
            "their own. "
            f"Below {DECIDING:.0%} the index says how the data were collected, not what a model "
            "sees. Centres that hold several classes usually mend it, for instance institutions "
            "instead of TCGA's tissue source sites.\n"
        )
    return text


def index_table(held: Readings) -> str:
    """The index of every model over k, as the paper's Table 3, above what chance gives."""
    columns = [[*index_column(held, k), held.show("index", "chance", k=k)] for k in held.ks]
    seen = {name: row for name, row in held.models.items() if row["value"]}
    names = [name + " †" * (name in seen) for name in held.models]
    rows = [list(row) for row in zip([*names, "*chance*"], *columns, strict=True)]
    text = markdown(["model", *(f"k = {k}" for k in held.ks)], rows)
    if seen:
        of = ", ".join(f"{name}: {row['value']} of {row['patients']}" for name, row in seen.items())
        text += f"\n† was distilled on patients of this benchmark ({of}); they can be left out.\n"
    return text


def index_column(held: Readings, k: int) -> list[str]:
    """The index of every model at one k, the best marked if that can be read."""
    found = [held.values("index", name, k=k) for name in held.models]
    texts = [two(v.mean(), np.std(v, ddof=1) if len(v) > 1 else 0) for v in found]
    if len(texts) > 1 and held.deciding >= DECIDING:
        texts = ranked([v.mean() if np.isfinite(v).all() else None for v in found], texts)
    if held.benchmark != "tiger":
        return texts
    named = zip(texts, held.models.values(), strict=True)
    return [text + paper_figure("index", str(k), row["paper"] or "", {}) for text, row in named]


def behind(held: Readings) -> str:
    """The bounded index, and how well class and centre are told."""
    blind = held.values("index", "chance", k=held.k).mean()
    rows = []
    for name in [*held.models, "chance"]:
        cells = [held.show(m, name, k=held.k) for m in ("bounded", "knn_class", "knn_center")]
        cells += [held.show(m, name) for m in ("probe_class", "probe_center")]
        rows.append([name, two(held.values("index", name, k=held.k).mean() / blind), *cells])
    head = "model\tindex / chance\tbounded\tkNN class\tkNN centre\tprobe class\tprobe centre"
    return (
        f"### What stands behind it, k = {held.k}\n\nPathoROB's bounded index; balanced accuracy "
        f"of the vote of {held.k} neighbours, and of a linear probe on unseen patients. The class "
        "should be found; the centre is found as far as the features hold it. Chance is what "
        "random features score in the same way, mean ± standard deviation of several draws.\n\n"
        + markdown(head, rows)
    )


def over_patients(held: Readings) -> str:
    """Each index with its interval against chance, then the difference of each pair of models."""
    blind = held.values("index", "chance", k=held.k).mean()
    rows = []
    for row in held.of("index_interval", k=held.k) + held.of("index_difference", k=held.k):
        name, other, interval, reading = row["model"], row["other"], "–", "too few patients to tell"
        if row["low"] is not None:
            start = 0 if other else blind
            word = "above" if row["low"] > start else "not clearly apart from"
            word = "below" if row["high"] < start else word
            reading = f"{word} {other or 'chance'}" if held.deciding >= DECIDING else "withheld"
            interval = f"{two(row['low'])} to {two(row['high'])}"
        pair = f"{name} − {other}" if other else name
        rows.append(f"{pair}\t{two(row['value'])}\t{interval}\t{reading}")
    return (
        f"### Over patients, k = {held.k}\n\n95 % intervals of {DRAWS} resamplings of the "
        f"patients, the same for all models; fewer than {FEW} patients allow none.\n\n"
        + markdown("model\tindex\tinterval\treading", rows)
    )


def one_by_one(
    held: Readings,
    field: str,
    title: str,
) -> str:
    """The index of the patches of each class, or of each centre."""
    names, metric = [*held.models, "chance"], f"index_by_{field}"
    rows = []
    for kind in (row[field] for row in held.of(metric, model="chance")):
        shown = [held.show(metric, name, k=held.k, **{field: kind}) for name in names]
        rows.append([kind, *shown])
    return f"### By {title}\n\nIndex of the patches of each {title}, k = {held.k}.\n\n" + markdown(
        [title, *names], rows
    )


def patches_table(held: Readings) -> str:
    """How many patches of each centre and class were drawn."""
    shown = {
        key: f"{cell['value']} of {cell['available']}" if cell["available"] else "–"
        for key, cell in held.cells.items()
    }
    classes = list(dict.fromkeys(kind for _, kind in shown))
    centers = dict.fromkeys(center for center, _ in shown)
    rows = [[center, *(shown[center, kind] for kind in classes)] for center in centers]
    return (
        "### Patches\n\nDrawn in the first sample, of those there are; "
        f"{list(shown.values()).count('–')} of {len(shown)} cells are empty (–).\n\n"
        + markdown(["centre", *classes], rows)
    )


def shift_table(
    name: str,
    count: int,
    steps: dict[str, list],
    found: dict,
    models: list[str],
) -> str:
    """shifts.md: how far the features of changed patches go, by kind and strength of the change."""
    text = (
        f"# Shifts of stain and scanner\n\n{count} patches of {name}. Distance of a changed patch "
        "to itself over the median distance of two patches (1: as far as any other), and the share "
        "still nearest to themselves.\n\n"
    )
    for kind, strengths in steps.items():
        rows = []
        for model in models:
            values = [found[model, kind, s] for s in strengths]
            rows.append([model, *(f"{v['distance']:.2f} ({v['first']:.0%})" for v in values)])
        head = ["model", *map("{:g}".format, strengths)]
        text += f"## {kind}: {SHIFTS[kind][0]}\n\n{markdown(head, rows)}\n"
    return text


def aligned(text: str) -> str:
    """Markdown for a terminal: no emphasis, table columns of one width."""
    plain = re.sub(r"</?u>|\*+|^#+ ", "", text, flags=re.M)
    out: list[str] = []
    for is_table, lines in itertools.groupby(plain.splitlines(), lambda line: line[:1] == "|"):
        if not is_table:
            out += lines
            continue
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        del rows[1]  # the rule below the head
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [cell.ljust(w) for cell, w in zip(row, width, strict=True)]
            out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def draw_index(title: str, counts: dict[str, list[ndarray]]):
    """Index and bounded index of each model over k: mean and range of the samples, and chance."""
    figure, axes = canvas(1, 2, 5.2, 4)
    rules = {"robustness index": index_of, "bounded index": bounded_of}
    for axis, (label, rule) in zip(axes[0], rules.items(), strict=True):
        for i, (name, samples) in enumerate(counts.items()):
            curves = np.array([rule(count.sum(1)) for count in samples])
            k = np.arange(1, curves.shape[1] + 1)
            if name == "chance":
                axis.plot(k, curves.mean(0), "k--", label=name)
                continue
            color = COLORS[(i - 1) % len(COLORS)]
            axis.plot(k, curves.mean(0), color=color, label=name)
            axis.fill_between(k, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
        axis.set(xlabel="neighbours k", ylabel=label, xticks=[1, *KS])
        axis.grid()
    axes[0, 1].set_ylim(0, 1)
    axes[0, 0].legend()
    what = "tissue against centre among nearest neighbours (shaded: range of samples)"
    figure.suptitle(f"{title}: {what}")
    return figure


def draw_map(
    title: str,
    benchmark: Benchmark,
    x: dict[str, ndarray],
    rows: ndarray,
    method: str,
):
    """Each model's embedding of `rows` in two dimensions, coloured by class and by centre."""
    views = {
        "class": np.array(benchmark.classes)[benchmark.labels[rows]],
        "centre": np.array(benchmark.centers)[rows],
    }
    figure, axes = canvas(len(x), 2, 5.2, 3.4)
    for (name, array), pair in zip(x.items(), axes, strict=True):
        flat = flatten(array[rows], method)
        for axis, (by, values) in zip(pair, views.items(), strict=True):
            for i, value in enumerate(np.unique(values)):
                look = {"color": COLORS[i % len(COLORS)], "marker": "osD^v"[i // len(COLORS) % 5]}
                axis.scatter(*flat[values == value].T, s=9, lw=0, label=value, **look)
            axis.set(xticks=[], yticks=[], title=f"{name}, by {by}")
    legends = (("lower center", 2), ("right upper", 16))  # where, and rows at most
    for axis, (place, height) in zip(axes[0], legends, strict=True):
        handles, names = axis.get_legend_handles_labels()
        columns = -(-len(names) // height)
        figure.legend(handles, names, loc=f"outside {place}", ncols=columns, markerscale=2)
    how = "t-SNE" if method == "tsne" else "first two PCA axes"
    figure.suptitle(f"{title}, {how}")
    return figure


def flatten(x: ndarray, method: str) -> ndarray:
    """Features (n, D) in two dimensions (n, 2), L2-normalised: by PCA, or by t-SNE after it."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
    flat = PCA(min(50, *unit.shape), random_state=0).fit_transform(unit)
    if method == "tsne":
        perplexity = min(30, (len(x) - 1) / 3)
        flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat)
    return flat[:, :2]


def draw_misled(
    name: str,
    benchmark: Benchmark,
    sample: ndarray,
    rows: ndarray,
):
    """The queries of a sample that their neighbours mislead most, at most one per patient.

    Their five nearest neighbours `rows` (n, 5) most often share the centre but not the tissue.
    """
    labels, centers = benchmark.labels[sample], np.array(benchmark.centers)[sample]
    wrong = (labels[rows] != labels[:, None]) & (centers[rows] == centers[:, None]) & (rows >= 0)
    misled = wrong.sum(1)
    queries: dict[str, int] = {}
    for i in np.argsort(-misled, kind="stable")[: np.count_nonzero(misled)]:
        queries.setdefault(benchmark.groups[sample[i]], i)
    lines = []
    for i in list(queries.values())[:6]:
        line = []
        for j in (i, *rows[i][rows[i] >= 0]):
            same = bool(labels[j] == labels[i]), bool(centers[j] == centers[i])
            caption = f"{benchmark.classes[labels[j]]}\n{centers[j]}"
            frame = KINDS[same][0] if j != i else "query"
            line.append((benchmark.images[int(sample[j])], caption, frame))
        lines.append(line)
    title = f"{name}: neighbours that share the centre but not the tissue"
    if not lines:
        title = f"{name}: no neighbour shares the centre of its query but not the tissue"
    return draw_sheet(title, {"query": "black"} | dict(KINDS.values()), lines)


def draw_shift(
    kind: str,
    strengths: list[float],
    image: ndarray,
    found: dict,
    names: list[str],
):
    """One patch at every strength above the models' curves of cosine, distance and recognition.

    found: `displacement` by (model, kind, strength), the strength that changes nothing among them.
    """
    meaning, nothing, *_ = SHIFTS[kind]
    steps = sorted({*strengths, nothing})
    figure, axes = canvas(1, 3, 4.2, 4.6)
    labels = {
        "cosine": "cosine to itself unchanged\n(dotted: mean of two patches)",
        "distance": "distance to itself / median distance",
        "first": "share still nearest to itself",
    }
    for axis, (metric, label) in zip(axes[0], labels.items(), strict=True):
        for name, color in zip(names, itertools.cycle(COLORS), strict=False):
            curve = [found[name, kind, s][metric] for s in steps]
            axis.plot(steps, curve, "o-", ms=3, color=color, label=name)
            if metric == "cosine":
                axis.axhline(found[name, kind, nothing]["others"], color=color, ls=":", lw=1)
        axis.set(xlabel=meaning, ylabel=label)
        axis.grid()
    axes[0, 2].set_ylim(-0.02, 1.02)
    axes[0, 1].legend()
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.66), w_pad=0.1)
    strip = figure.add_axes((0.03, 0.72, 0.94, 0.22))
    shown = [image if s == nothing else shift(image, kind, s) for s in steps]
    spaced = [np.pad(a, ((0, 0), (3, 3), (0, 0)), constant_values=255) for a in shown]
    strip.imshow(np.concatenate(spaced, 1))
    middles = spaced[0].shape[1] * (np.arange(len(steps)) + 0.5)
    strip.set(xticks=middles, xticklabels=[f"{s:g}" for s in steps], yticks=[])
    strip.spines[:].set_visible(False)
    strip.set_title(f"{kind}: one patch, and how far the features of all go")
    return figure
