"""Table 3 and its pictures, drawn from recorded measurements.

`table3` writes a section for each benchmark and way of sampling. `Readings` holds what was measured
on one of them, and each part of a section is a function of it: the index, what stands behind it,
intervals over patients, classes and centres one by one, and the patches themselves. The pictures
follow.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from g2l.benchmarks import Benchmark
from g2l.files import aligned, safe
from g2l.paper import FIGURES, paper_figure
from g2l.pathorob import LEAST, QUARTETS
from g2l.pictures import COLORS, canvas, draw_sheet, key_below
from g2l.protocols import FEW, RESAMPLES
from g2l.report import escaped, markdown, ranked, score
from g2l.results import read_metrics
from g2l.robust import DECIDING, KS, bounded_of, index_of
from g2l.shifts import SHIFTS, shift, unit

two = functools.partial(score, digits=2)
KINDS = {
    (True, False): ("same tissue, other centre", "#009e73"),
    (True, True): ("same tissue, same centre", "#56b4e9"),
    (False, True): ("other tissue, same centre", "#d55e00"),
    (False, False): ("neither", "#bbbbbb"),
}


def proven(results: Path) -> list[dict]:
    """The rows of the robustness index that still hold.

    Each row carries as `proof` keys of what it depends on: what was read of its benchmark, the
    patches drawn, weights and preprocessing of its models. Where a later row has another key for
    one of these, it no longer holds.
    """
    rows = [row for row in read_metrics(results) if row["protocol"] == "robustness"]
    rows = [row for row in rows if "proof" in row]  # an earlier version wrote none
    latest: dict[str, str] = {}
    for row in rows:
        latest |= row["proof"]
    return [row for row in rows if row["proof"].items() <= latest.items()]


def table3(rows: list[dict]) -> str:
    """table3.md from measurements that are `proven`: a section per benchmark and way of sampling.

    With TIGER the paper's numbers stand at its end; of other patches they say nothing.
    """
    text = (
        "# Table 3: robustness index\n\nNeighbours of the same class / neighbours of the same "
        "centre, summed over all patches. **1 is no threshold**: *chance* is what features that "
        "know nothing score on the same sample, and where every model ends as k grows. Above "
        "chance the tissue weighs more than the centre, below it the centre.\n\n"
    )
    parts = sections(rows)
    text += "".join(map(section, parts.values()))
    return text + (paper_table() if any(name == "tiger" for name, _ in parts) else "")


def sections(rows: list[dict]) -> dict[tuple[str, str], Readings]:
    """What was measured on each benchmark in each way of sampling, where a model is left."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["settings"]), []).append(row)
    held = {key: Readings(part) for key, part in found.items()}
    return {key: part for key, part in held.items() if part.models}


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
    """What was measured on one benchmark in one way of sampling."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.benchmark = rows[0]["benchmark"]
        self.settings = rows[0]["settings"]
        self.models = {row["model"]: row for row in self.of("seen")}
        self.ks = sorted({row["k"] for row in self.of("index", model="chance")})
        self.k = self.ks[:3][-1]  # at which all but the first table is read
        self.cells = self.of("cell")
        self.deciding = self.of("deciding")[0]["value"]
        self.readable = self.deciding >= DECIDING
        self.blind = self.values("index", "chance", k=self.k).mean()

    def of(self, metric: str, **want: Any) -> list[dict]:
        """The rows of a metric whose fields are as wanted."""
        want["metric"] = metric
        return [row for row in self.rows if want.items() <= row.items()]

    def values(self, metric: str, model: str, **want: Any) -> ndarray:
        """Values of one model, nan where they are not defined."""
        return np.array([row["value"] for row in self.of(metric, model=model, **want)], float)

    def show(self, metric: str, model: str, **want: Any) -> str:
        """Their mean, and for what chance was drawn for their standard deviation."""
        values = self.values(metric, model, **want)
        if not len(values):
            return two(None)
        drawn = model == "chance" and metric not in ("index", "bounded")
        return two(values.mean(), np.std(values) if drawn else 0)


def section(held: Readings) -> str:
    """The part of table3.md on one benchmark and way of sampling."""
    parts = [
        what_was_drawn(held),
        index_table(held),
        behind(held),
        over_patients(held),
        shortcuts(held),
        one_by_one(held, "class", "class"),
        one_by_one(held, "center", "centre"),
    ]
    files = [file for row in held.of("pictures") for file in row["files"]]
    parts += ["### Pictures\n"][: len(files)]
    for file in files:
        title = f"{file.removesuffix('.png')} of {escaped(held.benchmark)}"
        parts.append(f"![{title}](robustness/{safe(held.benchmark)}/{file})\n")
    parts.append(patches_table(held))
    return "\n".join(parts) + "\n"


def what_was_drawn(held: Readings) -> str:
    """Heading of a section, and its sample in words."""
    counts: Counter[str] = Counter()
    for cell in held.cells:
        counts[cell["class"]] += cell["value"]
    kinds = ", ".join(f"{escaped(kind)} {count}" for kind, count in counts.items())
    samples = len({row["seed"] for row in held.of("index")})
    spread = "One sample."
    if samples > 1:
        spread = f"Mean ± standard deviation of {samples} seeded samples."
    text = (
        f"## {escaped(held.benchmark)}\n\n{held.settings[0].upper()}{held.settings[1:]}. "
        f"{counts.total()} patches were drawn: {kinds}. {spread}\n"
    )
    if held.readable:
        return text
    return text + (
        f"\n**No reading is given.** Only {held.deciding:.0%} of the patches can choose "
        "between a neighbour of their class in another centre and one of another class in "
        "their own. "
        f"Below {DECIDING:.0%} the index says how the data were collected, not what a model "
        "sees. Centres that hold several classes usually mend it, for instance institutions "
        "instead of TCGA's tissue source sites.\n"
    )


def index_table(held: Readings) -> str:
    """The index of every model over k, as the paper's Table 3, above what chance gives.

    Behind each model stands the beginning of its fingerprint of weights and preprocessing.
    """
    columns = [index_column(held, k) for k in held.ks]
    names = []
    prints = []
    seen = []
    known = []
    for name, row in held.models.items():
        met = row.get("pretrained", [])
        known += met
        names.append(name + " †" * bool(row["value"]) + " ‡" * bool(met))
        prints.append(row["fingerprint"][:8])
        if row["value"]:
            seen.append(f"{escaped(name)}: {row['value']} of {row['patients']}")
    rows = zip([*names, "*chance*"], *columns, [*prints, ""], strict=True)
    text = markdown(["model", *(f"k = {k}" for k in held.ks), "fingerprint"], [*map(list, rows)])
    if seen:
        of = f"of this benchmark ({', '.join(seen)})"
        text += f"\n† was distilled on patients {of}; they can be left out.\n"
    if known:
        text += f"\n‡ {escaped('; '.join(known))}.\n"
    return text


def index_column(held: Readings, k: int) -> list[str]:
    """The index of every model at one k, the best marked if that can be read; then chance."""
    values = []
    texts = []
    for name, row in held.models.items():
        found = held.values("index", name, k=k)
        spread = np.std(found, ddof=1) if len(found) > 1 else 0
        paper = ""
        if held.benchmark == "tiger":
            paper = paper_figure("index", str(k), row["paper"], {})
        texts.append(two(found.mean(), spread) + paper)
        values.append(found.mean() if np.isfinite(found).all() else None)
    if len(texts) > 1 and held.readable:
        texts = ranked(values, texts)
    return [*texts, held.show("index", "chance", k=k)]


def behind(held: Readings) -> str:
    """The bounded index, and how well class and centre are told."""
    rows = []
    for name in [*held.models, "chance"]:
        cells = [held.show(m, name, k=held.k) for m in ("bounded", "knn_class", "knn_center")]
        cells += [held.show(m, name) for m in ("probe_class", "probe_center")]
        index = held.values("index", name, k=held.k).mean()
        rows.append([name, two(index / held.blind), *cells])
    return (
        f"### What stands behind it, k = {held.k}\n\nPathoROB's bounded index; balanced accuracy "
        f"of the vote of {held.k} neighbours (tied: the class that is nearer in sum), and of a "
        "linear probe on unseen patients. The class should be found; the centre is found as far as "
        "the features hold it. Chance is what random features score in the same way, mean ± "
        "standard deviation of several draws.\n\n"
        + markdown(
            "model\tindex / chance\tbounded\tkNN class\tkNN centre\tprobe class\tprobe centre", rows
        )
    )


def over_patients(held: Readings) -> str:
    """Each index with its interval against chance, then the difference of each pair of models."""
    rows: list[Sequence[str]] = []
    for row in held.of("index_interval", k=held.k) + held.of("index_difference", k=held.k):
        name = row["model"]
        other = row["other"]
        interval = "–"
        reading = "too few patients to tell"
        if row["low"] is not None:
            start = 0 if other else held.blind
            word = "above" if row["low"] > start else "not clearly apart from"
            word = "below" if row["high"] < start else word
            reading = f"{word} {other or 'chance'}" if held.readable else "withheld"
            interval = f"{two(row['low'])} to {two(row['high'])}"
        pair = f"{name} − {other}" if other else name
        rows.append([pair, two(row["value"]), interval, reading])
    return (
        f"### Over patients, k = {held.k}\n\n95 % intervals of {RESAMPLES} resamplings of the "
        f"patients, the same for all models; fewer than {FEW} patients allow none.\n\n"
        + markdown("model\tindex\tinterval\treading", rows)
    )


def shortcuts(held: Readings) -> str:
    """PathoROB's average performance drop and clustering score."""
    rows = []
    for name in [*held.models, "chance"]:
        cells = [held.show(metric, name) for metric in ("balanced", "confounded", "drop")]
        for row in held.of("drop", model=name) if name != "chance" else ():
            cells[2] += f" [{two(row['low'])}, {two(row['high'])}]"
        rows.append([name, *cells, held.show("clusters", name)])
    return (
        "### Where class and centre go together\n\nPathoROB's other measures, on two classes in "
        f"two centres at a time: mean of up to {QUARTETS} such quartets of {LEAST} patches a cell "
        "and more (–: none; a larger sample may have them). A linear probe is trained where the "
        "centre says nothing of the class (*balanced*) up to where it says all (*confounded*), and "
        "judged on unseen patients of whom it says nothing, where .5 is chance. *Performance "
        "drop*: what is lost on the way, relative, with its 95 % interval over the patients "
        "judged; what knows nothing has nothing to lose. *Clustering score*: agreement of k-means "
        "with the class less that with the centre, 1 at best, 0 by chance.\n\n"
        + markdown("model\tbalanced\tconfounded\tperformance drop\tclustering score", rows)
    )


def one_by_one(held: Readings, field: str, title: str) -> str:
    """The index of the patches of each class, or of each centre."""
    names = [*held.models, "chance"]
    metric = f"index_by_{field}"
    rows = []
    for kind in (row[field] for row in held.of(metric, model="chance")):
        shown = [held.show(metric, name, **{field: kind}) for name in names]
        rows.append([kind, *shown])
    return f"### By {title}\n\nIndex of the patches of each {title}, k = {held.k}.\n\n" + markdown(
        [title, *names], rows
    )


def patches_table(held: Readings) -> str:
    """How many patches of each centre and class were drawn."""
    rows: dict[str, list[str]] = {}
    empty = 0
    for cell in held.cells:
        empty += not cell["available"]
        text = f"{cell['value']} of {cell['available']}" if cell["available"] else "–"
        rows.setdefault(cell["center"], [cell["center"]]).append(text)
    classes = dict.fromkeys(cell["class"] for cell in held.cells)
    return (
        "### Patches\n\nDrawn in the first sample, of those there are; "
        f"{empty} of {len(held.cells)} cells are empty (–).\n\n"
        + markdown(["centre", *classes], list(rows.values()))
    )


def shift_table(name: str, count: int, steps: dict[str, list], found: dict) -> str:
    """shifts.md: how far the features of changed patches go, by kind and strength of the change.

    found: `displacement` by (model, kind, strength).
    """
    text = (
        f"# Shifts of stain and scanner\n\n{count} patches of {escaped(name)}. Distance of a "
        "changed patch to itself over the median distance of two patches (1: as far as any "
        "other), and the share still nearest to themselves.\n\n"
    )
    for kind, strengths in steps.items():
        rows = []
        for model in dict.fromkeys(model for model, _, _ in found):
            values = [found[model, kind, s] for s in strengths]
            rows.append([model, *(f"{v['distance']:.2f} ({v['first']:.0%})" for v in values)])
        head = ["model", *map("{:g}".format, strengths)]
        text += f"## {kind}: {SHIFTS[kind]['meaning']}\n\n{markdown(head, rows)}\n"
    return text


def plain(text: str) -> str:
    """Markdown for a terminal: without markup, columns as wide as their widest cells."""
    marks = r"(?m)\\(\W)|^\| ---.*\n|^\| | \|$|\*+|</?u>|^#+ "
    text = re.sub(marks, r"\1", text.replace(" | ", "\t"))
    told: list[str] = []
    for in_table, part in itertools.groupby(text.split("\n"), lambda line: "\t" in line):
        lines = list(part)
        told += [aligned([line.split("\t") for line in lines])] if in_table else lines
    return "\n".join(told)


def draw_index(title: str, counts: dict[str, list[ndarray]]):
    """Index and bounded index of each model over k: mean and range of the samples, and chance."""
    figure, axes = canvas(1, 2, 5.2, 4)
    rules = {"robustness index": index_of, "bounded index": bounded_of}
    for axis, (label, rule) in zip(axes[0], rules.items(), strict=True):
        for name, samples in counts.items():
            curves = np.array([rule(count.sum(1)) for count in samples])
            k = np.arange(1, curves.shape[1] + 1)
            look = ("k-.",) if name == "chance" else ()
            (line,) = axis.plot(k, curves.mean(0), *look, label=name)
            color = line.get_color()
            axis.fill_between(k, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
        axis.set(xlabel="neighbours k", ylabel=label, xticks=[1, *KS])
        axis.grid()
    axes[0, 1].set_ylim(0, 1)
    key_below(figure, axes[0, 0])
    figure.suptitle(
        f"{title}: tissue against centre among nearest neighbours (shaded: range of samples)"
    )
    return figure


def draw_map(title: str, benchmark: Benchmark, x: dict[str, ndarray], rows: ndarray, method: str):
    """Embeddings x of each model of `rows` in two dimensions, coloured by class and by centre."""
    views = {
        "class": np.array(benchmark.classes)[benchmark.labels[rows]],
        "centre": np.array(benchmark.centers)[rows],
    }
    figure, axes = canvas(len(x), 2, 5.2, 3.4)
    for (name, array), pair in zip(x.items(), axes, strict=True):
        flat = flatten(array, method)
        for axis, (by, values) in zip(pair, views.items(), strict=True):
            looks = itertools.cycle(itertools.product("osD^v", COLORS))
            for value, (marker, color) in zip(np.unique(values), looks, strict=False):
                places = flat[values == value].T
                axis.scatter(*places, s=9, lw=0, label=value, color=color, marker=marker)
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

    flat = PCA(min(50, *x.shape), random_state=0).fit_transform(unit(x))
    if method == "tsne":
        perplexity = min(30, (len(x) - 1) / 3)
        flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat)
    return flat[:, :2]


def draw_misled(name: str, benchmark: Benchmark, sample: ndarray, rows: ndarray):
    """The queries of a sample that their neighbours mislead most, at most one per patient.

    Their five nearest neighbours `rows` (n, 5) most often share the centre but not the tissue.
    """
    labels = benchmark.labels[sample]
    centers = np.array(benchmark.centers)[sample]
    tissue = labels[rows] == labels[:, None]
    place = centers[rows] == centers[:, None]
    misled = (~tissue & place & (rows >= 0)).sum(1)
    queries: dict[str, int] = {}
    for i in np.argsort(-misled, kind="stable")[: np.count_nonzero(misled)]:
        queries.setdefault(benchmark.groups[sample[i]], i)
    lines = []
    for i in list(queries.values())[:6]:
        frames = [KINDS[same][0] for same in zip(tissue[i], place[i], strict=True)]
        line = []
        for j, frame in zip([i, *rows[i]], ["query", *frames], strict=True):
            if j >= 0:
                text = f"{benchmark.classes[labels[j]]}\n{centers[j]}"
                line.append((benchmark.images[int(sample[j])], text, frame))
        lines.append(line)
    title = f"{name}: neighbours that share the centre but not the tissue"
    if not lines:
        title = f"{name}: no neighbour shares the centre of its query but not the tissue"
    return draw_sheet(title, {"query": "black"} | dict(KINDS.values()), lines)


def draw_shift(kind: str, strengths: list[float], image: ndarray, found: dict):
    """One patch at every strength above the models' curves of cosine, distance and recognition.

    found: `displacement` by (model, kind, strength), the strength that changes nothing among them.
    """
    nothing = SHIFTS[kind]["nothing"]
    steps = sorted({*strengths, nothing})
    figure, axes = canvas(1, 3, 4.2, 5)
    labels = {
        "cosine": "cosine to itself unchanged\n(dotted: mean of two patches)",
        "distance": "distance to itself / median distance",
        "first": "share still nearest to itself",
    }
    for axis, (metric, label) in zip(axes[0], labels.items(), strict=True):
        for name in dict.fromkeys(name for name, _, _ in found):
            curve = [found[name, kind, s][metric] for s in steps]
            (line,) = axis.plot(steps, curve, marker="o", ms=3, label=name)
            if metric == "cosine":
                others = found[name, kind, nothing]["others"]
                axis.axhline(others, color=line.get_color(), ls=":", lw=1)
        axis.set(xlabel=SHIFTS[kind]["meaning"], ylabel=label)
        axis.grid()
    axes[0, 2].set_ylim(-0.02, 1.02)
    key_below(figure, axes[0, 1])
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.66), w_pad=0.1)
    strip = figure.add_axes((0.03, 0.72, 0.94, 0.22))
    shown = [image if s == nothing else shift(image, kind, s) for s in steps]
    height, width = image.shape[:2]
    middles = width * (np.arange(len(steps)) + 0.5)
    strip.imshow(np.hstack(shown))
    strip.vlines(middles - width / 2, 0, height, "white", linewidth=4)
    strip.set(xticks=middles, xticklabels=map("{:g}".format, steps), yticks=[])
    strip.spines[:].set_visible(False)
    strip.set_title(f"{kind}: one patch, and how far the features of all go")
    return figure
