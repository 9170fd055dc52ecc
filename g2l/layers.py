"""CKA of every layer of a model with every layer of the teacher: where each says what.

A layer's features are the means of its tokens (or of its map) over the places of an image, so that
networks of any kind compare (the question of Kornblith et al. 2019, and their map). `layer_rows`
looks at the images that g2l/dense.py draws, and asks `kernels.cka` for all pairs at once. Random
features go through the same code.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from g2l.benchmarks import Benchmark
from g2l.dense import batches, drawn
from g2l.errors import UserError, warn
from g2l.features import data_stamp, display
from g2l.files import digest
from g2l.models import Model
from g2l.protocols import BLIND_DRAWS, BLIND_WIDTH
from g2l.results import Study, record, recorded
from kernels import cka

VERSION = 1  # raised on purpose when the same input would give other numbers


def layer_rows(benchmark: Benchmark, models: Sequence[str], study: Study) -> list[dict]:
    """A row of results for each model, recorded: `map` (its layers, the teacher's) and, as its
    value, CKA of the last layers. None for regions and slides, and without a teacher, which is
    told.
    """
    teacher = study.teacher
    if benchmark.level != "patch":
        return []
    if teacher is None or teacher not in models:
        warn(f"{benchmark.name}: no teacher, so nothing is said of layers")
        return []
    prints = [study.cards[name]["fingerprint"] for name in models]
    about = [
        benchmark.name,
        benchmark.groups,
        data_stamp(benchmark),
        teacher,
    ]
    key = digest(VERSION, models, prints, about)
    if found := recorded(study.results, key):
        return found
    sample, _ = drawn(benchmark)
    if len(sample) < 4:
        raise UserError(f"{benchmark.name}: CKA of layers needs 4 images, {len(sample)} are there")
    layers = {name: look(study.load(name), sample) for name in models}
    target = layers[teacher]
    rows = []
    for name, own in layers.items():
        table = torch.as_tensor(cka(own, target)).cpu().numpy()
        held = table.round(4).astype(object)
        held[np.isnan(table)] = None  # of a constant layer
        row = {
            "model": display(name),
            "value": float(table[-1, -1]),
            "map": held.tolist(),
            "teacher": display(teacher),
        }
        rows.append(row)
    shape = len(sample), BLIND_WIDTH
    for draw in range(BLIND_DRAWS):
        luck = torch.Generator().manual_seed(draw)
        blind = torch.randn(shape, generator=luck).to(target[0].device)
        value = float(torch.as_tensor(cka(blind, target[-1])))
        rows.append({"model": "chance", "draw": draw, "value": value})
    base = {
        "benchmark": benchmark.name,
        "protocol": "layers",
        "metric": "last layers",
    }
    return record(study.results, [base | row for row in rows], key=key)


def look(model: Model, sample: Benchmark) -> list[Tensor]:
    """Features (N, C) of every image after each layer, in the network's order; on its device."""
    if not hasattr(model.net, "forward_intermediates"):
        raise UserError(f"{model.name}: a network that does not show its layers")
    parts: list[list[Tensor]] = []
    for _, _, x in batches(model, sample):
        with torch.inference_mode(), model.autocast(x):
            maps = model.net.forward_intermediates(
                x,
                intermediates_only=True,
                output_fmt="NCHW",
            )
        parts.append([layer.float().mean((2, 3)) for layer in maps])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]
