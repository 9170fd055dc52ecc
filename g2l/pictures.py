"""TODO."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from g2l.benchmarks import Benchmark
from g2l.features import display
from g2l.files import atomic, safe
from g2l.images import open_slide, read_image
from g2l.report import means, role
from g2l.results import Study


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure whole or not at all, and let go of it."""
    import matplotlib.pyplot as plt

    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def draw_figure1(args: Study) -> None:
    """figure1.png: kNN accuracy, mean of the benchmarks that every model has, against parameters and time per image."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    mean = means(args.rows)
    score = lambda n, b: mean.get(("knn", "accuracy", display(n), b), (None,))[0]  # noqa: E731
    names = [b.name for b in args.found if all(score(n, b.name) is not None for n in args.models)]
    if not names:
        print(
            "figure1.png: no benchmark has all models, so there is nothing to compare",
            file=sys.stderr,
        )
        return
    points = [
        (
            n,
            np.mean([score(n, b) for b in names]),
            args.cards[n]["parameters"] / 1e6,
            args.cards[n]["ms_per_image"],
        )
        for n in args.models
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2 + 0.18 * len(points)), sharey=True)
    handles = []
    for i, (name, y, *sizes) in enumerate(points):
        part = role(name, args)
        marker = (
            "^"
            if part == "teacher"
            else "s"
            if part == "before distillation"
            else "*"
            if part
            else "o"
        )
        for axis, x in zip(axes, sizes, strict=True):
            dot = axis.scatter(
                x,
                y,
                s=210 if marker == "*" else 110,
                color=f"C{i % 10}",
                marker=marker,
                zorder=3,
                edgecolor="white",
                label=f"{display(name)}, {part}" if part else display(name),
            )
        handles.append(dot)
    for axis, label, column in zip(
        axes,
        ("parameters (millions)", f"time per image (ms, {args.device_used})"),
        (2, 3),
        strict=True,
    ):
        x = [p[column] for p in points]
        if max(x) > 5 * min(x):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(0, 1.2 * max(x))
        axis.set_xlabel(label)
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    low, high = (f(p[1] for p in points) for f in (min, max))
    gap = max(
        0.15 * (high - low), 0.05 - (high - low) / 2
    )  # a span of 0.1 at least: noise is not to look like news
    axes[0].set_ylim(low - gap, high + gap)
    axes[0].set_ylabel(
        "kNN accuracy"
        + (f", mean of {len(names)} benchmarks" if len(names) > 1 else f" on {names[0]}")
    )
    columns = 2 if len(handles) > 3 else 1
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05 * -(-len(handles) // columns), 1, 1))
    save_figure(figure, Path(args.results) / "figure1.png")


def picture(benchmark: Benchmark, i: int) -> np.ndarray:
    """One (H, W, 3) picture of item i: the image, the whole region, or the slide's thumbnail."""
    if benchmark.level == "slide":
        with open_slide(benchmark.images.files[i]) as slide:
            return slide.thumbnail(256)
    return (
        read_image(benchmark.images.files[i])
        if benchmark.level == "region"
        else benchmark.images[i]
    )


def draw_benchmark(
    benchmark: Benchmark, predictions: dict[str, dict], args: Study
) -> None:
    """Below results/pictures: confusion matrices and CKA matrix of all models, and for each model a kNN gallery."""
    import matplotlib.pyplot as plt

    folder, classes, labels = Path(args.results) / "pictures", benchmark.classes, benchmark.labels
    names, n = list(predictions), len(benchmark.classes)
    side = max(2.6, 0.55 * n + 1.3)
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(side * len(names), side),
        squeeze=False,
        sharey=True,
        constrained_layout=True,
    )
    for axis, name in zip(axes[0], names, strict=True):
        table = np.zeros((n, n))
        np.add.at(table, (labels, predictions[name]["knn"]), 1)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(share):
            if value >= 0.005:
                axis.text(
                    j,
                    i,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.6 else "black",
                )
        axis.set_title(display(name), fontsize=9)
        axis.set_xticks(range(n), classes, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(n), classes, fontsize=8)
        axis.set_xlabel("said")
    axes[0, 0].set_ylabel("true class")
    figure.suptitle(f"{benchmark.name}: kNN, percent of each true class", fontsize=10)
    save_figure(figure, folder / f"confusion-{safe(benchmark.name)}.png")

    pairs = {
        (r["model"], r["other"]): r["value"]
        for r in args.rows
        if r["protocol"] == "cka" and r["metric"] == "unbiased" and r["benchmark"] == benchmark.name
    }
    shown = [display(name) for name in names]
    if len(shown) > 1:
        matrix = np.array([[pairs.get((a, b), 1.0) for b in shown] for a in shown])
        figure, axis = plt.subplots(
            figsize=(1.1 * len(shown) + 2.4, 1.0 * len(shown) + 1.6), constrained_layout=True
        )
        axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(matrix):
            axis.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="black" if value > 0.6 else "white",
            )
        axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right", fontsize=8)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.set_title(f"{benchmark.name}: unbiased CKA of every pair of models", fontsize=10)
        save_figure(figure, folder / f"cka-{safe(benchmark.name)}.png")

    for name in names:
        path = folder / f"gallery-{safe(benchmark.name)}-{safe(display(name))}.png"
        draw_gallery(benchmark, name, predictions[name], path)


def draw_gallery(benchmark: Benchmark, name: str, predicted: dict, path: Path) -> None:
    """Three queries that kNN got right and three that it got wrong, each with its neighbours from other folds."""
    labels, classes, guess, neighbors = (
        benchmark.labels,
        benchmark.classes,
        predicted["knn"],
        predicted["neighbors"],
    )
    certain, rng, rows = (labels[neighbors] == guess[:, None]).mean(1), np.random.default_rng(0), []
    for hit in (
        True,
        False,
    ):  # right ones at random, wrong ones with the surest vote: they are worth looking at
        pool = np.flatnonzero((guess == labels) == hit)
        pool = rng.permutation(pool) if hit else pool[np.argsort(-certain[pool], kind="stable")]
        first = [
            pool[labels[pool] == c][:1] for c in rng.permutation(len(classes))
        ]  # differ in class
        rows += list(dict.fromkeys(np.concatenate([*first, pool]).astype(int).tolist()))[:3]
    colors, lines = {"query": "black", "the query's class": "#2a9d3a", "another": "#d62728"}, []
    for row in rows:
        said = "right" if guess[row] == labels[row] else f"said {classes[guess[row]]}"
        lines.append([(picture(benchmark, row), f"{classes[labels[row]]}\n{said}", "black")])
        lines[-1] += [
            (
                picture(benchmark, i),
                classes[labels[i]],
                colors["the query's class" if labels[i] == labels[row] else "another"],
            )
            for i in neighbors[row, :6]
            if i >= 0
        ]
    draw_sheet(
        path,
        f"{benchmark.name}, {display(name)}: a query and its nearest neighbours from other folds",
        colors,
        lines,
    )


def draw_sheet(
    path: Path,
    title: str,
    colors: dict[str, str],
    lines: list[list[tuple[np.ndarray, str, str]]],
    side: int = 112,
) -> None:
    """A picture of lines of images (pixels, caption of one or two lines, frame colour), the first one set apart.

    colors: what each frame colour means.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    small, large, cell = ImageFont.load_default(13), ImageFont.load_default(15), side + 56
    widths = [
        36 + max(map(len, lines), default=1) * (side + 12),
        24 + int(large.getlength(title)),
        12 + sum(36 + int(small.getlength(meaning)) for meaning in colors),
    ]
    sheet = Image.new("RGB", (max(widths), 64 + len(lines) * cell), "white")
    draw, x = ImageDraw.Draw(sheet), 12
    draw.text((12, 8), title, "black", large)
    for meaning, color in colors.items():
        draw.rectangle((x, 36, x + 12, 48), fill=color)
        draw.text((x + 18, 34), meaning, "#555555", small)
        x += 36 + int(small.getlength(meaning))
    for y, line in zip(range(64, 64 + len(lines) * cell, cell), lines, strict=True):
        for j, (pixels, caption, color) in enumerate(line):
            x = 12 + j * (side + 12) + (12 if j else 0)
            for row, text in enumerate(caption.split("\n")):
                while small.getlength(text) > side + 8:
                    text = text[:-2] + "…"
                draw.text((x - 4, y + 16 * row), text, "black", small)
            draw.rectangle((x - 4, y + 36, x + side + 3, y + 36 + side + 7), fill=color)
            sheet.paste(
                ImageOps.pad(Image.fromarray(pixels), (side, side), color="white"), (x, y + 40)
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        sheet.save(temporary)
