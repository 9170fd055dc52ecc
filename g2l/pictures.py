"""Pictures of the evaluation, and what all pictures share: figures, sheets of images, colours.

Figure 1 sets accuracy against size and time. Each benchmark has its confusion matrices, the CKA of
every pair of models, and a gallery for each model: queries with the neighbours that voted. A
picture carries the key of what it shows, so that one which is missing or shows something else is
drawn again.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from g2l.benchmarks import Benchmark
from g2l.errors import warn
from g2l.features import display
from g2l.field import CURVE
from g2l.files import atomic, safe
from g2l.images import open_slide, read_image
from g2l.report import means, role
from g2l.results import Study

COLORS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#8c564b",
    "#7f7f7f",
)
FRAMES = {"query": "black", "the query's class": "#2a9d3a", "another class": "#d62728"}
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # a ninth line is dashed
    "axes.prop_cycle": f"cycler(linestyle=['-', '--', ':']) * cycler(color={COLORS})",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $5
}


def canvas(
    rows: int,
    columns: int,
    width: float,
    height: float,
    **more: Any,
):
    """A figure and its axes (rows, columns), each `width` x `height` inches; needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot

    size = (width * columns, height * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **more)


def key_below(figure, axis) -> None:
    """The key of an axis's lines, below the figure, where it hides none of them."""
    handles, labels = axis.get_legend_handles_labels()
    inches = 0.5 + 0.055 * max(map(len, labels))
    columns = max(1, int(figure.get_figwidth() // inches))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def save_figure(
    figure,
    path: Path,
    key: str = "",
) -> None:
    """Write a figure whole or not at all, with the key of what it shows; let go of it."""
    from matplotlib import pyplot

    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight", metadata={"Comment": key})
    pyplot.close(figure)


def is_drawn(path: Path, key: str) -> bool:
    """Whether a picture is there, whole, and shows what `key` stands for."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return key != "" and image.info.get("Comment") == key
    except OSError:
        return False


def draw_figure1(study: Study, on: str) -> None:
    """figure1.png: kNN accuracy with its 95 % interval against parameters and time per image.

    on: the benchmark; the first that every model has if it was not measured, "mean" for all of
    these. Intervals are Student's over the folds.
    """
    mean = means(study.rows)
    scores = {}
    for benchmark in study.found:
        keys = [("knn", "accuracy", display(n), benchmark.name) for n in study.models]
        if all(key in mean for key in keys):
            scores[benchmark.name] = np.array([mean[key] for key in keys])
    if not scores:
        warn("figure1.png: no benchmark has all models, so there is nothing to compare")
        return
    name = on if on in scores else next(iter(scores))
    if on == "mean":
        name = f"mean of {len(scores)} benchmarks"
        scores[name] = np.array(list(scores.values()))
    heights, margins = with_margins(scores[name])
    figure, axes = canvas(1, 2, 4.5, 4.2 + 0.18 * len(heights), sharey=True)
    for axis, field, unit, label in (
        (axes[0, 0], "parameters", 1e6, "parameters (millions)"),
        (axes[0, 1], "ms_per_image", 1, f"time per image (ms, {study.device_used})"),
    ):
        sizes = [study.cards[model][field] / unit for model in study.models]
        against(axis, sizes, heights, margins, study)
        axis.set_xlabel(label)
    axes[0, 0].set_ylabel(f"kNN accuracy, {name}, with 95 % interval over folds")
    key_below(figure, axes[0, 1])
    save_figure(figure, study.results / "figure1.png")


def with_margins(scores: ndarray) -> tuple[ndarray, ndarray]:
    """Mean and half its 95 % interval of scores ([benchmarks,] models, 3): mean, sd and folds."""
    from scipy.stats import t

    value, sd, folds = np.moveaxis(scores.reshape(-1, *scores.shape[-2:]), -1, 0)
    margins = t.ppf(0.975, np.maximum(folds - 1, 1)) * sd / np.sqrt(folds)
    return value.mean(0), np.sqrt((margins**2).sum(0)) / len(value)


def against(
    axis,
    x: list[float],
    y: ndarray,
    margins: ndarray,
    study: Study,
) -> None:
    """One half of Figure 1: a mark per model."""
    marks = {"teacher": "^", "before distillation": "s", "": "o"}
    for i, name in enumerate(study.models):
        part = role(name, study)
        mark = marks.get(part, "*")
        label = f"{display(name)}, {part}" if part else display(name)
        axis.errorbar(
            x[i],
            y[i],
            margins[i],
            fmt=mark,
            ms=9,
            capsize=4,
            color=f"C{i}",
            label=label,
        )
    axis.set_xscale("log", subs=(2, 5))  # more numbers would lie over each other
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.margins(0.15)
    axis.grid()


def draw_benchmark(
    benchmark: Benchmark,
    predictions: dict[str, dict],
    study: Study,
    key: str,
) -> None:
    """Below results/pictures: confusion and CKA matrices of all models, their curves over k and
    maps of their layers where these were measured, and a gallery for each.

    key: of what the pictures show; those that are there with it stay as they are.
    """
    folder = study.results / "pictures"
    mean = means(study.rows)
    draws = {"confusion": draw_confusion, "cka": draw_cka}
    if "k-curve" in study.protocols:
        draws["k-curve"] = draw_curve
    for kind, draw in draws.items():
        path = folder / f"{kind}-{safe(benchmark.name)}.png"
        if not is_drawn(path, key) and (kind != "cka" or len(predictions) > 1):
            save_figure(draw(benchmark, predictions, mean), path, key)
    maps = [row for row in study.rows if row.get("map")]
    path = folder / f"layers-{safe(benchmark.name)}.png"
    if maps and not is_drawn(path, maps[0]["key"]):
        save_figure(draw_layers(benchmark, maps), path, maps[0]["key"])
    for name, predicted in predictions.items():
        path = folder / f"gallery-{safe(benchmark.name)}-{safe(display(name))}.png"
        if not is_drawn(path, key):
            save_figure(draw_gallery(benchmark, name, predicted), path, key)


def draw_confusion(
    benchmark: Benchmark,
    predictions: dict[str, dict],
    _: dict,
):
    """The confusion matrix of each model's kNN, in percent of each true class."""
    n = len(benchmark.classes)
    side = max(2.6, 0.55 * n + 1.3)
    figure, axes = canvas(1, len(predictions), side, side, sharey=True)
    for axis, (name, predicted) in zip(axes[0], predictions.items(), strict=True):
        table = np.zeros((n, n))
        np.add.at(table, (benchmark.labels, predicted["knn"]), 1)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        heat(axis, 100 * share, 100, "{:.0f}", benchmark.classes)
        axis.set(title=display(name), xlabel="predicted class")
    axes[0, 0].set_ylabel("true class")
    figure.suptitle(f"{benchmark.name}: kNN, percent of each true class")
    return figure


def draw_cka(
    benchmark: Benchmark,
    predictions: dict[str, dict],
    mean: dict,
):
    """The unbiased CKA of every pair of models."""
    names = [display(name) for name in predictions]
    keys = [[("cka", "unbiased", a, benchmark.name, b) for b in names] for a in names]
    matrix = np.array([[mean.get(key, (1.0,))[0] for key in row] for row in keys])
    side = 1.1 * len(names) + 2
    figure, axes = canvas(1, 1, side, side)
    heat(axes[0, 0], matrix, 1, "{:.2f}", names)
    figure.suptitle(f"{benchmark.name}: unbiased CKA of every pair of models")
    return figure


def draw_curve(
    benchmark: Benchmark,
    predictions: dict[str, dict],
    mean: dict,
):
    """Accuracy of each model's kNN over k, above what features that know nothing reach."""
    figure, axes = canvas(1, 1, 4.5, 3.6)
    for name in [*map(display, predictions), "chance"]:
        keys = [("k curve", f"k = {k}", name, benchmark.name) for k in CURVE]
        heights = [mean.get(key, (np.nan,))[0] for key in keys]  # NaN: a larger k than was taken
        axes[0, 0].plot(CURVE, heights, marker="o", label=name)
    axes[0, 0].set(xlabel="k", ylabel="accuracy, all folds together")
    key_below(figure, axes[0, 0])
    figure.suptitle(f"{benchmark.name}: kNN over k")
    return figure


def draw_layers(benchmark: Benchmark, maps: list[dict]):
    """The unbiased CKA of every layer of each model (up) with every layer of the teacher."""
    figure, axes = canvas(1, len(maps), 3.6, 3.8)
    for axis, row in zip(axes[0], maps, strict=True):
        table = np.array(row["map"], float)  # None, where a layer is constant, becomes NaN
        shown = axis.imshow(
            table, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto",
            extent=(0.5, table.shape[1] + 0.5, 0.5, table.shape[0] + 0.5),
        )  # fmt: skip
        axis.set(title=row["model"], xlabel=f"layer of {row['teacher']}", ylabel="layer")
    figure.colorbar(shown, ax=axes[0].tolist(), label="unbiased CKA")
    figure.suptitle(f"{benchmark.name}: layers of each model and of the teacher")
    return figure


def heat(
    axis,
    values: ndarray,
    top: float,
    form: str,
    names: list[str],
) -> None:
    """A matrix of numbers from 0 to `top` as colours, each with its text; rows and columns have
    names.
    """
    axis.imshow(values, cmap="Blues", vmin=0, vmax=top)
    for (i, j), value in np.ndenumerate(values):
        ink = "white" if value > 0.6 * top else "black"
        if value >= 0.005 * top:
            axis.text(j, i, form.format(value), ha="center", va="center", color=ink)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)


def draw_gallery(
    benchmark: Benchmark,
    name: str,
    predicted: dict,
):
    """Three queries that kNN got right and three that it got wrong, each with its neighbours."""
    labels = benchmark.labels
    guess = predicted["knn"]
    neighbors = predicted["neighbors"]
    lines = []
    for row in worth_seeing(labels, guess, neighbors):
        right = guess[row] == labels[row]
        told = "right" if right else f"predicted {benchmark.classes[guess[row]]}"
        text = f"{benchmark.classes[labels[row]]}\n{told}"
        line = [(picture(benchmark, row), text, "query")]
        for i in neighbors[row, :6][neighbors[row, :6] >= 0]:
            frame = "the query's class" if labels[i] == labels[row] else "another class"
            line.append((picture(benchmark, i), benchmark.classes[labels[i]], frame))
        lines.append(line)
    return draw_sheet(
        f"{benchmark.name}, {display(name)}: a query and its nearest neighbours from other folds",
        FRAMES,
        lines,
    )


def worth_seeing(
    labels: ndarray,
    guess: ndarray,
    neighbors: ndarray,
) -> list[int]:
    """Three rows predicted right, at random, and three wrong, by the surest vote, of many classes.

    Rows of neighbours (N, k) are those that voted for `guess` (N,).
    """
    luck = np.random.default_rng(0).random(len(labels))
    sure = (labels[neighbors] == guess[:, None]).mean(1)
    rows = []
    for order, hits in (
        (luck, guess == labels),
        (luck - sure * neighbors.size, guess != labels),
    ):
        pool = np.flatnonzero(hits)
        pool = pool[np.argsort(order[pool])]
        first = pool[np.sort(np.unique(labels[pool], return_index=True)[1])]
        rows += list(dict.fromkeys([*first.tolist(), *pool.tolist()]))[:3]
    return rows


def picture(benchmark: Benchmark, i: int) -> ndarray:
    """One (H, W, 3) picture of item i: the image, the whole region, or the slide's thumbnail."""
    source: Any = benchmark.images
    if benchmark.level == "slide":
        with open_slide(source.files[i]) as slide:
            return slide.thumbnail(256)
    return read_image(source.files[i]) if benchmark.level == "region" else source[i]


def draw_sheet(
    title: str,
    colors: dict[str, str],
    lines: list[list[tuple]],
):
    """A figure of lines of images, each (pixels (H, W, 3), caption, a key of `colors` for its
    frame).
    """
    from matplotlib.patches import Patch

    figure, axes = canvas(max(1, len(lines)), max(map(len, lines), default=1), 1.25, 1.6)
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(axes, lines, strict=False):
        for axis, (pixels, caption, frame) in zip(row, line, strict=False):
            axis.axis("on")
            axis.imshow(pixels)
            axis.set(xticks=[], yticks=[])
            short = [text if len(text) < 20 else f"{text[:17]}…" for text in caption.split("\n")]
            axis.set_title("\n".join(short), loc="left", fontsize=7)
            axis.spines[:].set(visible=True, color=colors[frame], linewidth=3)
    key = [Patch(color=color, label=meaning) for meaning, color in colors.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key))
    figure.suptitle(title)
    return figure
