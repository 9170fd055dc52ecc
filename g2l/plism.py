"""PLISM: the same tiles of tissue in 13 stainings on 7 scanners, and whether a model knows them.

`load_plism` reads the data set as the hub has it (owkin/plism-dataset): a file STAINING_SCANNER_
to_GMH_S60.tif.h5 of every slide, in it a dataset tile_LEVEL_X_Y of every tile. `compare` takes the
measures of plismbench (Filiot et al., arXiv 2501.16239) for every pair of slides, `summary` their
medians with intervals, and `plism_table` shows them.
"""

import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray

from g2l.benchmarks import Benchmark
from g2l.errors import UserError
from g2l.files import files_below
from g2l.images import ImageSource
from g2l.multicentre import unlabelled
from g2l.patches import open_h5
from g2l.protocols import FEW, resamplings
from g2l.report import markdown

SLIDE = r"([^_]+)_([^_]+)_to_.+\.h5"  # staining and scanner in the name of a file
TOP = (1, 3, 5, 10)
MEASURES = ("cosine", "of other tiles", *(f"top-{k}" for k in TOP))
KINDS = ("scanner", "staining", "both", "all")  # what differs in a pair of slides
# plismbench's board: the mean of the medians of these.
BOARD = {
    "all": "cosine",
    "scanner": "top-10",
    "staining": "top-10",
    "both": "top-10",
}
BLOCK = 2048  # tiles compared at once


def plism_slides(folder: Path) -> list[tuple[str, str, Path]]:
    """Staining, scanner and file of each slide of PLISM below a folder; empty for other data.

    A slide that is there twice counts once.
    """
    found = {}
    for path in files_below(folder) if folder.is_dir() else ():
        if match := re.fullmatch(SLIDE, path.name):
            found[match[1], match[2]] = path
    return [(*kind, path) for kind, path in found.items()]


def load_plism(folder: Path, count: int, seed: int) -> tuple[list[Benchmark], ndarray, ndarray]:
    """`count` tiles that all slides have: a benchmark a slide, pairs' kinds, and tiles' blocks.

    kinds (4, P) bool says of each pair of slides (in the order of itertools.combinations) which of
    KINDS it is, blocks (n,) which tiles lie in one connected piece of tissue. UserError where
    there are fewer than two slides or three tiles, and for a damaged file.
    """
    slides = plism_slides(folder)
    common: set[str] = set()
    for number, (_, _, path) in enumerate(slides):
        try:
            with open_h5(path, "r") as file:
                common = common & set(file) if number else set(file)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); fetch it again") from error
    names = sorted(common, key=place_of)
    asked = min(count, len(names))
    if len(slides) < 2 or asked < 3:
        raise UserError(
            f"{folder}: {len(slides)} slides of PLISM with {len(names)} tiles in common, of which "
            f"{asked} are asked for; two slides and three tiles are needed to find one again"
        )
    drawn = np.sort(np.random.default_rng(seed).permutation(len(names))[:count])
    tiles = [names[i] for i in drawn]
    parts = []
    for staining, scanner, path in slides:
        images = ImageSource(tiles, partial(read_tile, path), [path] * len(tiles))
        parts.append(unlabelled(f"plism-{staining}_{scanner}", images, tiles))
    pairs = list(itertools.combinations(slides, 2))
    stain, scan = (np.array([a[i] == b[i] for a, b in pairs]) for i in (0, 1))
    kinds = np.stack([stain, scan, ~stain & ~scan, np.full(len(pairs), True)])
    return parts, kinds, blocks_of(names)[drawn]


def place_of(name: str) -> list[int]:
    """Column and row of a tile by its name; UserError for another name."""
    match = re.fullmatch(r"tile_\d+_(\d+)_(\d+)", name)
    if not match:
        raise UserError(f"{name}: no name of a tile of PLISM; expected tile_LEVEL_X_Y")
    return [int(match[1]), int(match[2])]


def read_tile(path: Path, name: str) -> ndarray:
    """One tile (H, W, 3) uint8 of a slide."""
    with open_h5(path, "r") as file:
        return file[name][:]


def blocks_of(names: list[str]) -> ndarray:
    """Numbers (n,) of the connected pieces of tissue that tiles lie in, touching at corners too."""
    from scipy.ndimage import label

    column, row = np.array([place_of(name) for name in names]).T
    grid = np.zeros((column.max() + 1, row.max() + 1), bool)
    grid[column, row] = True
    return label(grid, np.ones((3, 3)))[0][column, row]


def compare(x: list[ndarray], device: str) -> ndarray:
    """MEASURES (P, 6, n) of every pair of slides and tile, from features x of slides, (n, D) each.

    cosine of a tile to itself in the other slide, mean cosine to other tiles there, and whether it
    is among the k nearest of all other tiles of both slides, mean of the two directions.
    """
    import torch

    slides = [torch.nn.functional.normalize(torch.from_numpy(part), dim=1) for part in x]
    n = len(x[0])
    found = []
    for pair in itertools.combinations(slides, 2):
        one, two = (part.to(device) for part in pair)
        directions = []
        for here, there in ((one, two), (two, one)):
            every = torch.cat([there, here]).T
            each = []
            for rows in torch.arange(n, device=device).split(BLOCK):
                near = here[rows] @ every
                line = torch.arange(len(rows), device=device)
                own = near[line, rows]
                others = (near[:, :n].sum(1) - own) / (n - 1)
                near[line, rows] = near[line, n + rows] = -torch.inf
                before = (near >= own[:, None]).sum(1)  # a tie is no recognition
                each.append(torch.stack([own, others, *((before < k).to(own) for k in TOP)]))
            directions.append(torch.cat(each, 1))
        found.append(torch.stack(directions).mean(0).cpu().numpy())
    return np.stack(found)


def summary(values: ndarray, kinds: ndarray, blocks: ndarray) -> tuple[dict, ndarray]:
    """Median and quartiles over pairs, (3,) by (kind, measure), and the board's score.

    values: of `compare`. The score (1 + RESAMPLES,) is first of the tiles as they are, then of
    resampled blocks of tissue, the same for all models. What no pair is of is nan.
    """
    names, block = np.unique(blocks, return_inverse=True)
    times = resamplings(len(names))
    inside = np.eye(len(names))[block]  # (n, blocks)
    weight = times @ inside.sum(0)
    found = {}
    score = []
    for kind, pairs in zip(KINDS, kinds, strict=True):
        for number, measure in enumerate(MEASURES):
            each = values[pairs, number]
            if not len(each):
                found[kind, measure] = np.full(3, np.nan)
                continue
            found[kind, measure] = np.percentile(each.mean(1), [50, 25, 75])
            if BOARD[kind] == measure:
                score.append(np.median(times @ (each @ inside).T / weight[:, None], 1))
    whole = np.mean(score, 0) if len(score) == len(BOARD) else np.full(len(times), np.nan)
    return found, whole


def interval(draws: ndarray, blocks: ndarray) -> list[float]:
    """Value, and the ends of the 95 % interval of its resamples; these nan for a few blocks."""
    if len(np.unique(blocks)) < FEW:
        return [float(draws[0]), np.nan, np.nan]
    return [float(draws[0]), *np.percentile(draws[1:], [2.5, 97.5]).tolist()]


def plism_table(found: dict[str, tuple[dict, list[float]]], gains: dict, about: str) -> str:
    """plism.md: the score of each model and its paired differences, then each measure by kind.

    found: medians and score with its interval by model; gains: the same of pairs of models.
    """
    board = []
    every = []
    for model, (medians, score) in found.items():
        board.append([model, with_ends(score)])
        for kind in KINDS:
            texts = []
            for measure in MEASURES:
                middle, low, high = medians[kind, measure]
                texts.append(f"{middle:.3f} ({high - low:.3f})")
            every.append([model, kind, *texts])
    for (one, other), gain in gains.items():
        board.append([f"{one} − {other}", with_ends(gain)])
    return (
        f"# PLISM: the same tissue in another staining, on another scanner\n\n{about} A pair's "
        "slides differ in the *scanner*, the *staining* or *both*. top-k: a tile is among the k "
        "nearest of all tiles of the pair. Cosine means little where that *of other tiles* is "
        "near it. *chance* is what random features score by the same code.\n\n*score*: "
        "plismbench's, the mean of four medians over pairs (cosine of all, top-10 of each kind), "
        "with its 95 % interval over blocks of tissue. Its board takes 8,139 tiles a slide; fewer "
        "are found more easily. *nan*: no two slides here differ so, and the score needs each "
        "kind.\n\n"
        + markdown(["model", "score"], board)
        + "\n## Each measure, median (interquartile range) over pairs\n\n"
        + markdown(["model", "differs", *MEASURES], every)
    )


def with_ends(values: list[float]) -> str:
    """A value and its interval, where there is one."""
    value, low, high = values
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")
