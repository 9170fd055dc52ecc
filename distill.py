"""Stage 2: patches -> student. A giga-scale foundation model is distilled into a large one on one cancer, as G2L does.

    torchrun --nproc_per_node=3 distill.py --cancer brca         # H-optimus-0 into Hibou-L, the paper's setting
    python distill.py --cancer NAME --teacher A --student B --max-steps N
    python distill.py --profile                                  # where the time of a step goes, on synthetic patches

One step: a batch of patches -> one random crop, flips, colour jitter and blur per patch -> the frozen teacher and the
student see the same crop, each in its own normalisation -> the student's embedding goes through a linear projector to
the teacher's width -> batch norm on both -> log(sum |difference|^4). The projector is dropped afterwards:
runs/NAME/student is the bare student. Kill it at any moment and run the same command again: it goes on where it was.
With torchrun's --max-restarts it does so by itself; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, since otherwise
the new processes look for one another at the addresses of the old ones (pytorch issue 135712).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import kernels
import models
import tile
from tile import PatchError, UserError, atomic

# ---- augmentation: batched on the device, parameters drawn per patch on the host --------------------------------

JITTER = (
    0.15,
    0.15,
    0.10,
    0.05,
)  # brightness, contrast, saturation, hue: the paper's, in torchvision's meaning
JITTER_P, FLIP_P, BLUR_P = 0.5, 0.5, 0.1
BLUR_SIZE, BLUR_SIGMA = (
    9,
    (0.1, 2.0),
)  # the paper gives the kernel only; the range is torchvision's default


class Params(NamedTuple):
    """What is done to each of B patches; host tensors, so that the device is never asked what to do."""

    top: torch.Tensor  # (B,) int64, pixels
    left: torch.Tensor  # (B,) int64
    hflip: torch.Tensor  # (B,) bool
    vflip: torch.Tensor  # (B,) bool
    jitter: torch.Tensor  # (B,) bool
    factors: (
        torch.Tensor
    )  # (B, 4) float32: brightness, contrast, saturation factors; hue shift in turns
    order: torch.Tensor  # (B, 4) int64: which of the four comes first, second, ...
    blur: torch.Tensor  # (B,) bool
    sigma: torch.Tensor  # (B,) float32, pixels


def draw_params(seed: int, first: int, count: int, patch_size: int, crop: int) -> Params:
    """Augmentation of samples first .. first + count - 1 of the stream `seed`: a pure function of the sample's number.

    A counter-based generator gives each sample its own 16 numbers, whoever draws it and in whatever company.
    """
    bits = np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, 0xA06], counter=4 * first)
    u = np.random.Generator(bits).random((count, 16))
    span = patch_size - crop + 1
    factors = np.stack(
        [
            low + (high - low) * u[:, 5 + i]
            for i, (low, high) in enumerate(
                [*((1 - j, 1 + j) for j in JITTER[:3]), (-JITTER[3], JITTER[3])]
            )
        ],
        axis=1,
    )
    low, high = BLUR_SIGMA
    arrays = (
        (u[:, 0] * span).astype(np.int64),
        (u[:, 1] * span).astype(np.int64),
        u[:, 2] < FLIP_P,
        u[:, 3] < FLIP_P,
        u[:, 4] < JITTER_P,
        factors.astype(np.float32),
        np.argsort(u[:, 9:13], axis=1),
        u[:, 13] < BLUR_P,
        (low + (high - low) * u[:, 14]).astype(np.float32),
    )
    return Params(*map(torch.from_numpy, arrays))


def augment(
    images: torch.Tensor, crop: int, params: Params | torch.Generator | None = None
) -> torch.Tensor:
    """uint8 (B, 3, P, P) -> float32 (B, 3, crop, crop) in [0, 1]: crop, flips, colour jitter, blur, each per patch.

    `params` from `draw_params`, or a torch.Generator (None: torch's own) to draw them from. For given parameters each
    operation gives the pixels of torchvision's transform on a float image. On a GPU groups of patches that share an
    operation go through it together; on a CPU patches go one by one, which keeps them in the cache.
    """
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != 3
        or min(images.shape[2:]) < crop
    ):
        raise ValueError(
            f"images: expected uint8 (B, 3, P, P), P >= {crop}, got {images.dtype} {tuple(images.shape)}"
        )
    if not isinstance(params, Params):
        seed = int(torch.randint(2**62, (), generator=params))
        params = draw_params(seed, 0, len(images), min(images.shape[2:]), crop)
    device, host = images.device, Params(*(p.numpy() for p in params))
    views = []
    for i, image in enumerate(images):
        view = image[:, host.top[i] : host.top[i] + crop, host.left[i] : host.left[i] + crop]
        flips = [d for d, flip in ((1, host.vflip[i]), (2, host.hflip[i])) if flip]
        views.append(view.flip(flips) if flips else view)
    if device.type == "cpu":
        out = torch.empty(len(images), 3, crop, crop)
        for i, view in enumerate(views):
            out[i].copy_(view).div_(255)
            one = Params(*(p[i : i + 1] for p in params))
            if host.jitter[i]:
                out[i : i + 1] = color_jitter(out[i : i + 1], one.factors, one.order)
            if host.blur[i]:
                out[i : i + 1] = gaussian_blur(out[i : i + 1], one.sigma)
        return out
    return _together(torch.stack(views).float().div_(255), params)


def _together(out: torch.Tensor, params: Params) -> torch.Tensor:
    """Jitter and blur those of the images (B, 3, H, W) that are to be, in as few operations as there are kinds."""
    device = out.device
    for chosen, operation, values in (
        (params.jitter, color_jitter, (params.factors, params.order)),
        (params.blur, gaussian_blur, (params.sigma,)),
    ):
        rows = chosen.nonzero().flatten()
        if len(rows):
            where = _send(rows, device)
            out[where] = operation(out[where], *(v[rows] for v in values))
    return out


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small host tensor on the device, without waiting for the device."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def color_jitter(x: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """float (B, 3, H, W) -> the same, with the four adjustments in each patch's own order; host factors and order."""
    factors_there = _send(factors, x.device)
    for stage in range(4):
        for number, adjust in enumerate(
            (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        ):
            rows = (order[:, stage] == number).nonzero().flatten()
            if len(rows) == len(x):
                x = adjust(x, factors_there[:, number])
            elif len(rows):
                rows = _send(rows, x.device)
                x[rows] = adjust(x[rows], factors_there[rows, number])
    return x


def _gray(x: torch.Tensor) -> torch.Tensor:
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def adjust_brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale each image (B, 3, H, W) by its factor (B,)."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Move each image away from (factor > 1) or towards its mean grey."""
    factor = factor.view(-1, 1, 1, 1)
    return (x * factor).add_(_gray(x).mean((1, 2, 3), keepdim=True) * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Move each pixel away from (factor > 1) or towards its own grey."""
    factor = factor.view(-1, 1, 1, 1)
    return (x * factor).add_(_gray(x).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn each image's hue by shift (B,), in turns, at equal HSV saturation and value.

    Hue in sixths of a turn is a piecewise linear function of the channels, and so is its inverse: each channel lies
    between the smallest and largest by a trapezoid of the hue, which spares the six-way selection of the usual form.
    """
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    # Selection by lerp with weights 0 and 1 is exact, and on a CPU ten times as fast as torch.where.
    hue = torch.lerp(
        (r - g).add_(chroma, alpha=4), (b - r).add_(chroma, alpha=2), (high == g).to(x.dtype)
    )
    hue = (
        torch.lerp(hue, g - b, (high == r).to(x.dtype))
        .div_(chroma.clamp(min=1e-12))
        .add_(6 * shift.view(-1, 1, 1))
    )
    hue.sub_((hue / 6).floor_(), alpha=6)
    out = torch.empty_like(x)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        weight = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(low, chroma, weight, out=out[:, channel])
    return out


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor, size: int = BLUR_SIZE) -> torch.Tensor:
    """Gaussian blur of each image (B, 3, H, W) with its own sigma (B,), size x size taps, edges reflected."""
    offsets = torch.arange(size, dtype=torch.float32) - size // 2
    taps = torch.softmax(
        -0.5 * (offsets / sigma[:, None].float().cpu()) ** 2, dim=1
    )  # exp, divided by its sum
    taps = _send(taps, x.device).to(x.dtype)[..., None, None, None].unbind(1)
    height, width = x.shape[2:]
    x = F.pad(x, (size // 2,) * 4, mode="reflect")
    y = (
        x[:, :, :height] * taps[0]
    )  # columns, then rows; shifted sums are eight times as fast as conv2d on a CPU
    for i in range(1, size):
        y.addcmul_(x[:, :, i : i + height], taps[i])
    out = y[..., :width] * taps[0]
    for i in range(1, size):
        out.addcmul_(y[..., i : i + width], taps[i])
    return out


# ---- data: what is drawn depends on the seed and the sample's number alone ---------------------------------------


class Batches(torch.utils.data.Dataset):
    """Item m: this rank's share of micro-batch m as (uint8 (B, 3, P, P), Params, unreadable patches as text).

    Sample n of the run is the same patch with the same augmentation whatever the number of workers, and ranks, micro-
    batches and steps partition the sample numbers; so a run is resumed by its step alone, and N ranks see what one
    process with an N times larger batch sees. Held-out patients and unreadable patches are drawn again.
    """

    def __init__(
        self,
        index,
        held: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        crop: int,
        by: str,
        rank=0,
        world=1,
    ):
        self.index, self.held, self.seed, self.by, self.crop = index, held, seed, by, crop
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __getitem__(self, number: int):
        first = (number * self.world + self.rank) * self.batch_size
        patches, unreadable = [], []
        for n in range(first, first + self.batch_size):
            patches.append(self._read(n, unreadable))
        images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()
        return (
            images,
            draw_params(self.seed, first, self.batch_size, self.index.patch_size, self.crop),
            unreadable,
        )

    def _read(self, n: int, unreadable: list[str]) -> np.ndarray:
        failures = attempt = 0
        while failures < 20:
            i = self.index.draw(self.seed + (attempt << 32), n, by=self.by)
            attempt += 1
            if self.held[self.index.locate(i)[0]]:
                continue
            try:
                return self.index.read(i)
            except PatchError as error:
                unreadable.append(str(error))
                failures += 1
        return np.zeros(
            (self.index.patch_size,) * 2 + (3,), np.uint8
        )  # the trainer stops at this many unreadable


def hold_out(index, fraction: float, seed: int) -> np.ndarray:
    """bool (slides,): slides of a seeded `fraction` of the patients: at least 2 of 8 or more, 1 of 4, none of fewer."""
    patients = list(index.patients)
    held: set[str] = set()
    if fraction > 0 and len(patients) >= 4:
        order = np.random.default_rng([seed, 0x4E1D]).permutation(len(patients))
        held = {
            patients[i]
            for i in order[: max(1 + (len(patients) >= 8), round(fraction * len(patients)))]
        }
    return np.array([patient in held for patient in index.patient], bool)


class Heldout:
    """Fixed patches of held-out patients, centre-cropped, and what the teacher says of them: the yardstick of a run."""

    def __init__(
        self,
        index,
        held: np.ndarray,
        count: int,
        crop: int,
        seed: int,
        teacher: models.Model,
        batch: int,
    ):
        counts = np.asarray(index.counts)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        slides = np.flatnonzero((held if held.any() else ~held) & (counts > 0))
        rng = np.random.default_rng([seed, 0xE7A1])
        drawn = rng.choice(slides, 20 * count)  # a slide, then a patch of it, none twice
        chosen = list(dict.fromkeys((starts[drawn] + rng.integers(counts[drawn])).tolist()))[:count]
        patches, margin = [], (index.patch_size - crop) // 2
        problem = "their patients have no more; raise --hold-out, or take --hold-out 0"
        for i in chosen:
            try:
                patches.append(index.read(i)[margin : margin + crop, margin : margin + crop])
            except PatchError as error:
                problem = f"{error}; if the slides have moved, say where they are by --slides"
        if len(patches) < 4:
            raise UserError(
                f"--eval-patches {count}: only {len(patches)} held-out patches can be read: {problem}"
            )
        self.images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()
        self.batch, self.name = batch, "held-out CKA" if held.any() else "CKA on training slides"
        self.teacher = self.features(teacher)

    @torch.no_grad()
    def features(self, model: models.Model) -> torch.Tensor:
        """float32 (N, dim) embeddings in eval mode."""
        training, device = model.training, next(model.parameters()).device
        model.eval()
        parts = [part.to(device).float() / 255 for part in self.images.split(self.batch)]
        parts = [model(model.normalize(part)).float() for part in parts]
        model.train(training)
        return torch.cat(parts)

    def measure(self, student: models.Model) -> dict[str, float]:
        """Unbiased and biased linear CKA of the student to the teacher, and the spread of the student's features."""
        features = self.features(student)
        unbiased, biased = kernels.cka([features], [self.teacher], estimator="both")
        return {
            "cka": unbiased.item(),
            "cka_biased": biased.item(),
            "spread": _spread(features).item(),
        }


def _spread(features: torch.Tensor) -> torch.Tensor:
    """How far rows differ, relative to their size: 0 for a model that says the same of everything."""
    features = features.detach().float()
    return features.var(0).mean().sqrt() / (features.square().mean().sqrt() + 1e-12)


# ---- the objective ----------------------------------------------------------------------------------------------

LOSSES = ("logsum", "mse", "cosine", "smooth-l1", "kl", "correlation")


def rows(model: models.Model, images: torch.Tensor, tokens: str) -> torch.Tensor:
    """float (B, 3, S, S) in [0, 1] -> the rows compared: (B, dim), or with tokens="all" (B * (1 + patches), C).

    Of all tokens the first is the network's own pooling (the class token, where that is its embedding), so that models
    without a class token have one too; registers have no counterpart.
    """
    x = model.normalize(images)
    if tokens == "cls":
        return model(x)
    out = model.tokens(x)
    with model.autocast(x):
        pooled = model.net.forward_head(out, pre_logits=True)
    return torch.cat([pooled[:, None], out[:, model.num_prefix_tokens :]], 1).flatten(0, 1)


class Distiller(nn.Module):
    """The student, the projector to the teacher's width (linear, no bias), and the loss between the two."""

    def __init__(
        self,
        student: models.Model,
        width: int,
        teacher_width: int,
        args: argparse.Namespace,
        group=None,
    ):
        super().__init__()
        self.student, self.group, self.tokens = student, group, args.tokens
        self.kind, self.alpha, self.normalize, self.reduction = (
            args.loss,
            args.alpha,
            args.normalize,
            args.reduction,
        )
        random = torch.Generator().manual_seed(args.seed)
        self.projector = nn.Parameter(
            (torch.rand(width, teacher_width, generator=random) * 2 - 1) * width**-0.5
        )
        affine = args.normalize == "student-affine"
        self.scale = nn.Parameter(torch.ones(teacher_width)) if affine else None
        self.shift = nn.Parameter(torch.zeros(teacher_width)) if affine else None

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return rows(self.student, images, self.tokens)

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Rows of the student (R, Ds) and of the teacher (R, Dt) -> scalar, fp32."""
        if self.kind == "logsum":
            return kernels.log_sum_loss(
                student,
                self.projector,
                teacher,
                alpha=self.alpha,
                normalize=self.normalize,
                reduction=self.reduction,
                scale=self.scale,
                shift=self.shift,
                group=self.group,
            )
        with torch.autocast(student.device.type, enabled=False):
            s, t = student.float() @ self.projector, teacher.float()
            if self.normalize != "none":
                s = F.batch_norm(s, None, None, self.scale, self.shift, training=True, eps=1e-4)
            if self.normalize == "both":
                t = F.batch_norm(t, None, None, training=True, eps=1e-4)
            if self.kind == "mse":
                return F.mse_loss(s, t)
            if self.kind == "smooth-l1":
                return F.smooth_l1_loss(s, t)
            if self.kind == "cosine":
                return 1 - F.cosine_similarity(s, t).mean()
            if self.kind == "kl":  # features as logits
                return F.kl_div(
                    s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean"
                )
            correlation = (s * t).mean(
                0
            )  # of each feature over the batch: the recipe's second form
            return ((correlation - 1).abs().pow(self.alpha).sum() + 1e-5).log()

    def forward(
        self, images: torch.Tensor, teacher: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (loss, spread of the student's rows)."""
        student = self.features(images)
        return self.loss(student, teacher), _spread(student)


def param_groups(module: nn.Module, decay_all: bool) -> list[dict]:
    """AdamW's groups: weight decay for matrices, none for 1-D parameters and position, class and register tokens."""
    decay, plain = [], []
    for name, parameter in module.named_parameters():
        token = any(part in name for part in ("pos_embed", "cls_token", "reg_token", "dist_token"))
        (decay if decay_all or (parameter.ndim > 1 and not token) else plain).append(parameter)
    return [
        {"params": decay, "decays": True},
        {"params": plain, "decays": False, "weight_decay": 0.0},
    ]


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step, steps - 1."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2


class StopRule:
    """The paper's: stop when the loss exceeded the mean of the last `window` losses more than `patience` times.

    "consecutive" counts steps in a row, "cumulative" counts all; "off" never stops. Neither before `minimum` steps.
    """

    def __init__(self, kind: str, window: int = 100, patience: int = 10, minimum: int = 0):
        self.kind, self.patience, self.minimum = kind, patience, minimum
        self.recent, self.count, self.steps = deque(maxlen=window), 0, 0

    def update(self, loss: float) -> bool:
        """Take the next step's loss; True when training should end."""
        full = len(self.recent) == self.recent.maxlen
        above = full and loss > math.fsum(self.recent) / len(self.recent)
        self.count = self.count + above if above or self.kind == "cumulative" else 0
        self.recent.append(loss)
        self.steps += 1
        return self.kind != "off" and self.count > self.patience and self.steps >= self.minimum

    def state_dict(self) -> dict:
        return {"recent": list(self.recent), "count": self.count, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.recent.extend(state["recent"])
        self.count, self.steps = state["count"], state["steps"]


# ---- one step, the same for training and for --profile ------------------------------------------------------------


class Step:
    """Teacher, student and optimizer, and what one optimisation step does with them without waiting for the device."""

    def __init__(
        self, teacher, distiller, args, device, precision, world=1, mark=lambda name: None
    ):
        self.teacher, self.distiller, self.args, self.device, self.mark = (
            teacher,
            distiller,
            args,
            device,
            mark,
        )
        self.autocast = precision == torch.bfloat16
        convolutional = not (teacher.num_prefix_tokens and distiller.student.num_prefix_tokens)
        self.layout = torch.channels_last if convolutional else torch.contiguous_format
        self.optimizer = torch.optim.AdamW(
            param_groups(distiller, args.decay_all), lr=args.lr, fused=True
        )
        self.module = distiller
        if world > 1:
            # A rank's own batch-norm buffers are rank 0's at every step, so that a checkpoint holds all there is.
            self.module = nn.parallel.DistributedDataParallel(
                distiller,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            if device.type == "cpu":
                self.module.register_comm_hook(None, _ordered_mean)

    def __call__(self, batches, lr: float, weight_decay: float) -> torch.Tensor:
        """`batches`: one (images, params) per accumulated micro-batch. -> device (3,): loss, gradient norm, spread."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        count, losses, spread = self.args.accumulate, [], None
        for number, (images, params) in enumerate(batches):
            last = number == count - 1
            images = images.to(self.device, non_blocking=True)
            self.mark("data")
            crops = augment(images, self.args.crop, params).contiguous(memory_format=self.layout)
            self.mark("augmentation")
            with torch.no_grad():
                target = rows(self.teacher, crops, self.args.tokens)
            self.mark("teacher")
            sync = (
                contextlib.nullcontext()
                if last or self.module is self.distiller
                else self.module.no_sync()
            )
            with sync:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    if (
                        self.module is self.distiller
                    ):  # in two parts, so that they can be timed apart
                        student = self.distiller.features(crops)
                        self.mark("student forward")
                        loss, spread = self.distiller.loss(student, target), _spread(student)
                        self.mark("loss")
                    else:
                        loss, spread = self.module(crops, target)
                (loss / count if count > 1 else loss).backward()
            self.mark("backward")
            losses.append(loss.detach())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.args.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.args.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark("optimizer")
        return torch.stack([sum(losses) / count, norm, spread])


def _ordered_mean(_, bucket):
    """Mean of a bucket over the ranks, added in the order of the ranks, so that a resumed run has the same bits.

    Gloo's ring adds in an order that depends on a gradient's place in the bucket, and DDP rearranges its buckets after
    the first step of a process.
    """
    world = torch.distributed.get_world_size()
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world)]
    torch.distributed.all_gather(parts, bucket.buffer())
    done = torch.futures.Future()
    done.set_result(sum(parts[1:], parts[0]) / world)
    return done


# ---- the run folder: log, checkpoints, pictures -----------------------------------------------------------------

# Arguments that may differ when a run goes on; every other one would change what is computed, and is refused.
FREE = {
    "data",
    "slides",
    "runs",
    "name",
    "weights",
    "device",
    "precision",
    "compile",
    "workers",
    "max_unreadable",
    "eval_every",
    "checkpoint_steps",
    "checkpoint_minutes",
    "keep",
    "profile",
    "plain",
    "profile_steps",
}


class Run:
    """runs/NAME: one writer at a time, every file whole or absent."""

    def __init__(self, folder: Path, keep: int, main: bool):
        self.folder, self.keep, self.main, self.board = folder, keep, main, None
        self.checkpoints = [
            folder / ("checkpoint.pt" if i == 0 else f"checkpoint.{i}.pt") for i in range(keep)
        ]
        if not main:
            return
        self.lock = contextlib.ExitStack()
        if not self.lock.enter_context(tile.locked(folder / ".lock", wait=False)):
            raise UserError(
                f"{folder}: another process trains this run; wait for it or give another --name"
            )
        for left in folder.glob(".*.tmp.*"):  # by a process that was killed while it wrote
            left.unlink()

    def close(self) -> None:
        """Finish TensorBoard's file and let others train this run."""
        if self.board:
            self.board.close()
        if self.main:
            if [path.name for path in self.folder.glob("*")] == [
                ".lock"
            ]:  # refused before there was anything to keep
                (self.folder / ".lock").unlink()
                with contextlib.suppress(OSError):  # another process begins the run just now
                    self.folder.rmdir()
            self.lock.close()

    def config(self) -> dict:
        """What config.json of an earlier start says; {} if there is none."""
        try:
            return json.loads((self.folder / "config.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def write_config(self, config: dict) -> None:
        with atomic(self.folder / "config.json") as path:
            path.write_text(json.dumps(config, indent=2, default=str) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop what log.jsonl says of steps after `step`: they are about to be done again."""
        kept = []
        if step and (self.folder / "log.jsonl").exists():
            for line in (self.folder / "log.jsonl").read_text().splitlines():
                with contextlib.suppress(
                    ValueError
                ):  # the last line of a killed process may be half
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        with atomic(self.folder / "log.jsonl") as path:
            path.write_text("".join(kept))

    def log(self, rows: list[dict]) -> None:
        """Append rows to log.jsonl and TensorBoard."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder), purge_step=rows[0]["step"])
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, row["step"])

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def save(self, state: dict) -> str | None:
        """Write checkpoint.pt, the one before becoming checkpoint.1.pt and so on. Returns why it could not, or None."""
        try:
            with atomic(self.folder / "checkpoint.pt") as path:
                torch.save(state, path)
                for older, newer in zip(
                    self.checkpoints[:0:-1], self.checkpoints[-2::-1], strict=True
                ):
                    if newer.exists() and newer != self.checkpoints[0]:
                        os.replace(newer, older)
                    elif (
                        newer.exists()
                    ):  # the newest keeps its own name until it is replaced, so there always is one
                        older.unlink(missing_ok=True)
                        try:
                            os.link(newer, older)
                        except OSError:  # some network file systems have no links; for a moment only the older is there
                            os.replace(newer, older)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            return str(error).splitlines()[0]
        return None

    def load(self) -> dict | None:
        """The newest whole checkpoint, or None where there is none. A damaged one is set aside, saying so."""
        seen = False
        for path in self.checkpoints:
            if not path.exists():
                continue
            seen = True
            try:
                with zipfile.ZipFile(
                    path
                ) as archive:  # torch.load itself does not compare checksums
                    broken = archive.testzip()
                if broken:
                    raise zipfile.BadZipFile(f"checksum of {broken} differs")
                return torch.load(path, map_location="cpu", weights_only=True)
            except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, KeyError) as error:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                print(
                    f"{path}: damaged ({str(error).splitlines()[0]}); set aside as {aside.name}, "
                    "falling back to the one before",
                    file=sys.stderr,
                    flush=True,
                )
        if seen:
            raise UserError(
                f"{self.folder}: no whole checkpoint is left; remove the folder to begin anew, "
                "or give another --name"
            )
        return None

    def draw_loss(self) -> None:
        """loss.png: loss with its running mean, held-out CKA, and the schedules, over steps."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        log = self.rows()
        steps = [row for row in log if "loss" in row]
        evals = [row for row in log if "cka" in row]
        if not steps:
            return
        x, loss = [row["step"] for row in steps], np.array([row["loss"] for row in steps])
        window = max(1, min(100, len(loss) // 10))
        figure, (top, middle, bottom) = plt.subplots(
            3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 2, 1), constrained_layout=True
        )
        top.plot(x, loss, color="#b8c7e0", lw=0.8, label="loss")
        top.plot(
            x[window - 1 :],
            np.convolve(loss, np.full(window, 1 / window), "valid"),
            color="#1f4e9e",
            label=f"mean of {window} steps",
        )
        top.set_ylabel("loss")
        top.legend(frameon=False)
        middle.plot(
            [row["step"] for row in evals],
            [row["cka"] for row in evals],
            "o-",
            color="#a8324a",
            ms=3,
        )
        middle.set_ylabel("CKA to the teacher\n(unbiased, fixed patches)")
        bottom.plot(x, [row["lr"] for row in steps], color="#444444", label="learning rate")
        bottom.plot(
            x, [row["weight_decay"] for row in steps], color="#999999", label="weight decay"
        )
        bottom.set_yscale("log")
        bottom.legend(frameon=False)
        bottom.set_xlabel("step")
        with atomic(self.folder / "loss.png") as path:
            figure.savefig(path, dpi=110)
        plt.close(figure)

    def draw_sheet(self, images: torch.Tensor, crops: torch.Tensor, columns: int = 8) -> None:
        """augmented.png: patches as read, and below each what both models see of it."""
        from PIL import Image, ImageDraw

        count = min(len(images), 3 * columns)
        columns, gap, side, head = min(columns, count), 4, images.shape[-1], 16
        sheet = Image.new(
            "RGB", (columns * (side + gap), head + -(-count // columns) * 2 * (side + gap)), "white"
        )
        ImageDraw.Draw(sheet).text(
            (2, 2), "patches as read; below each, what both models see of it", fill="black"
        )
        for i in range(count):
            x, y = i % columns * (side + gap), head + i // columns * 2 * (side + gap)
            for image, offset in ((images[i], 0), ((crops[i] * 255).round().byte(), side + gap)):
                sheet.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (x, y + offset))
        with atomic(self.folder / "augmented.png") as path:
            sheet.save(path)


def refuse_changes(old: dict, new: dict, folder: Path) -> None:
    """Raise UserError naming whatever differs between the run's beginning and now."""
    changed = [
        f"{'--' + k.replace('_', '-') if k in new.get('flags', ()) else k} was {old[k]!r} and is now {new[k]!r}"
        for k in new
        if k in old and k != "flags" and old[k] != new[k]
    ]
    if changed:
        raise UserError(
            f"{folder} was begun otherwise: {'; '.join(changed)}. "
            "Give what it was begun with to go on, or another --name to begin anew"
        )


def describe_setting() -> dict:
    """Versions, code and machine: what it takes to run a run again."""
    import timm
    import torchvision

    try:
        revision = (
            subprocess.run(
                ["git", "describe", "--always", "--dirty", "--abbrev=40"],
                capture_output=True,
                text=True,
                cwd=Path(__file__).parent,
                timeout=20,
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        "revision": revision,
        "machine": platform.platform(),
        "command": " ".join(sys.argv),
    }


# ---- training ---------------------------------------------------------------------------------------------------


class Readings:
    """The numbers of each step: kept on the device, averaged over the ranks by blocks, read one block late.

    On a GPU a block is 20 steps and the host reads it while the next one runs; on a CPU nothing is gained by waiting.
    """

    def __init__(self, device: torch.device, world: int):
        self.device, self.world = device, world
        self.block, self.lag = (20, 1) if device.type == "cuda" else (1, 0)
        self.open: list[torch.Tensor] = []
        self.sent: deque = deque()

    def add(self, values: torch.Tensor) -> None:
        self.open.append(values)

    def send(self) -> None:
        """Start the journey of the block's numbers to the host."""
        if not self.open:
            return
        values, self.open = torch.stack(self.open), []
        if self.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.world
        if self.device.type == "cuda":
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.sent.append((values, event.synchronize))
        else:
            self.sent.append((values, lambda: None))

    def receive(self, everything: bool = False) -> list[list[float]]:
        """Rows of numbers that have arrived, oldest first."""
        arrived = []
        while len(self.sent) > (0 if everything else self.lag):
            values, wait = self.sent.popleft()
            wait()
            arrived += values.tolist()
        return arrived


def train(args: argparse.Namespace) -> int:
    """Train, or go on training, and export the student. Returns the exit status."""
    rank, world, device = models.setup_distributed(args.device)
    run = Run(Path(args.runs) / (args.name or default_name(args)), args.keep, rank == 0)
    try:
        return _train(args, run, rank, world, device)
    finally:
        run.close()


def _train(args: argparse.Namespace, run: Run, rank: int, world: int, device: torch.device) -> int:
    main, cuda = rank == 0, device.type == "cuda"
    precision = pick_precision(args.precision, device)
    torch.backends.cudnn.benchmark = True

    def say(text: str) -> None:
        if main:
            print(text, flush=True)

    # What the run is, first as far as the command line says, so that a mistake costs no loading.
    identity = {k: v for k, v in vars(args).items() if k not in FREE}
    identity |= {"ranks": world, "precision": str(precision).removeprefix("torch.")}
    flags = [k for k in vars(args)]
    earlier = run.config() if main else {}
    finished = "finished" in earlier and (run.folder / "student" / "model.safetensors").exists()
    if finished or (earlier and any(path.exists() for path in run.checkpoints)):
        refuse_changes(earlier["identity"], {**identity, "flags": flags}, run.folder)
    if _agree(finished, rank, world):
        if main:
            say(
                f"{run.folder}: finished at step {earlier['finished']['step']}; student: {run.folder / 'student'}"
            )
        return 0

    index = tile.PatchIndex(
        Path(args.data) / "tiles" / args.cancer, Path(args.slides) if args.slides else None
    )
    held = hold_out(index, args.hold_out, args.seed)
    counts = np.asarray(index.counts)
    available, wanted = int(counts[~held].sum()), args.batch_size * args.accumulate * world
    if available < wanted:
        raise UserError(
            f"{args.data}/tiles/{args.cancer}: a step takes {wanted} patches (--batch-size x --accumulate "
            f"x ranks) and there are {available} to train on; tile more slides or lower one of them"
        )
    if index.patch_size < args.crop:
        raise UserError(
            f"--crop {args.crop}: larger than the patches, which are {index.patch_size} px; take --crop "
            f"{index.patch_size} or less, or tile with a larger --patch-size"
        )
    cohort = json.dumps(
        [list(index.slides), list(index.patient), counts.tolist(), index.patch_size]
    )
    say(
        f"{args.cancer}: {int(counts.sum()):,} patches of {index.patch_size} px from {len(index.slides)} slides of "
        f"{len(index.patients)} patients; "
        + (
            f"{int(held.sum())} slides held out to measure CKA"
            if held.any()
            else "none held out (--hold-out 0, or fewer than 4 patients), so CKA is measured on slides that are trained on"
        )
    )

    teacher, student = load_pair(args, device, precision)
    identity |= {"cohort": hashlib.sha256(cohort.encode()).hexdigest()[:16]}
    if main:
        identity |= {"teacher weights": teacher.fingerprint, "student weights": student.fingerprint}
    distiller, step_flops = build(args, teacher, student, device, world)
    steps = args.max_steps
    stop = StopRule(args.stop, args.stop_window, args.stop_patience, args.stop_min_steps)

    state = None
    if main:
        state = run.load()
        if state:
            refuse_changes(state["identity"], {**identity, "flags": flags}, run.folder)
    newest = _agree(state["step"] if state else 0, rank, world)
    if newest and not main:
        path = next((p for p in run.checkpoints if p.exists()), None)
        if path is None:
            raise UserError(
                f"{run.folder}: rank {rank} on {platform.node()} sees no checkpoint; --runs must be a "
                "folder that all machines share"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    if state:
        distiller.load_state_dict(state["distiller"])
    step_of = Step(teacher, distiller, args, device, precision, world)
    best, drawn, unreadable, first, spent, ended = {}, 0, 0, 0, 0.0, ""
    if state:
        step_of.optimizer.load_state_dict(state["optimizer"])
        stop.load_state_dict(state["stop"])
        best, first, spent, ended = state["best"], state["step"], state["seconds"], state["ended"]
        drawn, unreadable = state["drawn"], state["unreadable"][rank]
        say(f"going on from step {first} of {run.folder}")
    random = state["random"][rank] if state else None
    del state

    if main:
        config = {
            "arguments": vars(args),
            "identity": identity,
            "device": describe_device(device),
            "ranks": world,
            **describe_setting(),
            "cohort": {
                "slides": len(index.slides),
                "patches": int(counts.sum()),
                "patients": list(index.patients),
                "held out": [index.slides[i] for i in np.flatnonzero(held)],
            },
            "teacher": describe_model(teacher),
            "student": describe_model(student),
        }
        run.write_config(config)
        run.cut_log(first)
        heldout = Heldout(
            index, held, args.eval_patches, args.crop, args.seed, teacher, args.batch_size
        )

    dataset = Batches(
        index,
        held,
        seed=args.seed,
        batch_size=args.batch_size,
        crop=args.crop,
        by=args.sampling,
        rank=rank,
        world=world,
    )
    loader = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first * args.accumulate, steps * args.accumulate),
            pin_memory=cuda,
            num_workers=default_workers(args.workers, device),
            worker_init_fn=_quiet_worker,
        )
    )
    ceiling = models.matmul_ceiling(device, precision)
    images = world * args.accumulate * args.batch_size
    say(
        f"{teacher.name} ({teacher.parameters_count / 1e6:,.1f} M) into {student.name} "
        f"({student.parameters_count / 1e6:,.1f} M parameters); {images} patches a step, {steps} steps; "
        f"{str(precision).removeprefix('torch.')} on {describe_device(device)}; {step_flops / 1e9:,.1f} GFLOP a step "
        f"and rank, matmul ceiling {ceiling / 1e12:,.2f} TFLOP/s"
    )

    every = args.eval_every or max(1, min(500, steps // 10))
    readings, progress = (
        Readings(device, world),
        Progress(steps, first, step_flops, ceiling, images),
    )
    done, saved = first, time.monotonic()

    def measure(step: int) -> None:
        if not main:
            return
        result = heldout.measure(student)
        if result["spread"] < 1e-6:
            raise UserError(
                f"step {step}: the student gives the same features for every patch, so there is nothing to "
                "learn from; check --weights of the student, or lower --lr"
            )
        if result["cka"] > best.get("cka", -math.inf):
            best.update(cka=result["cka"], step=step)
        best.setdefault("before", result["cka"])
        best["last"] = result["cka"]
        run.log([{"step": step, **result}])
        progress.note(f"step {step}: {heldout.name} to the teacher {result['cka']:.4f}")

    def collect(rows: list[list[float]]) -> None:
        """Numbers that have arrived: log them, guard, and ask the stop rule."""
        nonlocal ended
        lines = []
        for loss, norm, spread in rows:
            step = stop.steps + 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}. The last checkpoint is "
                    "older; lower --lr, set --grad-clip 1 or take --precision fp32, under another --name"
                )
            if stop.update(loss) and not ended:
                ended = f"stop rule ({args.stop}) at step {step}"
            lines.append(
                {
                    "step": step,
                    "loss": loss,
                    "lr": cosine(args.lr, args.lr_end, step - 1, steps),
                    "weight_decay": cosine(
                        args.weight_decay, args.weight_decay_end, step - 1, steps
                    ),
                    "grad_norm": norm,
                    "spread": spread,
                    "above_mean": stop.count,
                    "images_per_second": progress.rate,
                    "mfu": progress.mfu,
                }
            )
        if main and lines:
            run.log(lines)
            progress.show(lines[-1])

    def save() -> None:
        nonlocal saved
        readings.send()
        collect(
            readings.receive(everything=True)
        )  # so nothing is saved that was not seen to be finite
        now = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None}
        states = _gather(now, rank, world)
        failures = _gather(unreadable, rank, world)
        saved = time.monotonic()
        if not main:
            return
        problem = run.save(
            {
                "step": done,
                "identity": identity,
                "distiller": distiller.state_dict(),
                "optimizer": step_of.optimizer.state_dict(),
                "stop": stop.state_dict(),
                "best": best,
                "random": states,
                "drawn": drawn,
                "unreadable": failures,
                "seconds": spent + progress.seconds,
                "ended": "" if ended == "signal" else ended,
            }
        )
        if problem:
            progress.note(
                f"checkpoint of step {done} not written ({problem}); the one before stays, training goes on"
            )

    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda number, frame: received.append(number)
        )  # seen after a step, on all ranks at once
    if first == 0:
        measure(0)
    # Last of all, so that nothing of the start, which a resumed run repeats, draws from the stream of the steps.
    torch.manual_seed(args.seed + rank)
    if random:
        torch.set_rng_state(random["cpu"])
        if cuda and random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"])
    while done < steps and not ended:
        batches, due = [], False
        for _ in range(args.accumulate):
            images, params, failures = next(loader)
            drawn += args.batch_size
            if failures:
                unreadable += len(failures)
                with open(run.folder / "unreadable.txt", "a") as file:
                    file.writelines(f"{line}\n" for line in failures)
                if unreadable > max(10, args.max_unreadable * drawn):
                    raise UserError(
                        f"{unreadable} of {drawn} patches could not be read, the last: {failures[-1]}; "
                        f"{run.folder / 'unreadable.txt'} has all. Mend them or raise --max-unreadable"
                    )
            batches.append((images, params))
        if done == 0 and main:
            run.draw_sheet(batches[0][0], augment(batches[0][0], args.crop, batches[0][1]))
        readings.add(
            step_of(
                batches,
                cosine(args.lr, args.lr_end, done, steps),
                cosine(args.weight_decay, args.weight_decay_end, done, steps),
            )
        )
        done += 1
        if done % readings.block == 0 or done == steps:
            readings.send()
            collect(readings.receive())
            late = (
                args.checkpoint_minutes > 0
                and time.monotonic() - saved > 60 * args.checkpoint_minutes
            )
            due, caught = _any([main and late, bool(received)], world)
            ended = "signal" if caught else ended
        if done % every == 0 or done == steps or (ended and ended != "signal"):
            measure(done)
        if (
            (due or (args.checkpoint_steps and done % args.checkpoint_steps == 0))
            and done < steps
            and not ended
        ):
            save()
    save()
    progress.end()
    if main:
        run.draw_loss()
    if ended == "signal":
        say(
            f"stopped by {signal.Signals(received[0]).name if received else 'a signal'} at step {done}; "
            "run the same command to go on"
        )
        return 128 + (received[0] if received else signal.SIGTERM)
    if main:
        finish(args, run, teacher, student, index, done, ended, best, config, heldout.name)
    total = sum(_gather(unreadable, rank, world))
    if total:
        say(
            f"{total} patches could not be read and were replaced, which the exit status tells too; they are named in "
            f"{run.folder / 'unreadable.txt'}"
        )
    return int(total > 0)


def finish(
    args,
    run: Run,
    teacher,
    student,
    index,
    done: int,
    ended: str,
    best: dict,
    config: dict,
    cka: str,
) -> None:
    """Export the student and say where it is."""
    try:
        models.save_student(
            student,
            run.folder / "student",
            metadata={
                "teacher": args.teacher,
                "student": args.student,
                "cancer": args.cancer,
                "run": run.folder.name,
                "steps": done,
                "patients": list(index.patients),
                "slides": list(index.slides),
                "loss": args.loss,
                "cka_before": best["before"],
                "cka_after": best["last"],
            },
        )
        run.write_config(
            {**config, "finished": {"step": done, "because": ended or "--max-steps", "best": best}}
        )
    except OSError as error:
        raise UserError(
            f"{run.folder / 'student'}: not written ({error}); make room and run the same command again, "
            "which exports from the checkpoint"
        ) from None
    print(
        f"{ended or 'done'}: {cka} to the teacher {best['before']:.4f} before and {best['last']:.4f} after "
        f"{done} steps\nloss curve: {run.folder / 'loss.png'}; patches as the models see them: "
        f"{run.folder / 'augmented.png'}\nstudent: {run.folder / 'student'}",
        flush=True,
    )


class Progress:
    """One line of progress: rewritten on a terminal, repeated now and then in a log."""

    def __init__(self, steps: int, first: int, flops: float, ceiling: float, images: int):
        self.steps, self.flops, self.ceiling, self.images = steps, flops, ceiling, images
        self.start = self.shown = time.monotonic()
        self.times = deque([(self.start, first)], maxlen=50)
        self.rate = self.mfu = 0.0
        self.terminal = sys.stdout.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def show(self, row: dict) -> None:
        now, step = time.monotonic(), row["step"]
        self.times.append((now, step))
        (then, before) = self.times[0]
        pace = (step - before) / max(1e-9, now - then)
        self.rate, self.mfu = (
            round(pace * self.images, 2),
            round(pace * self.flops / self.ceiling, 4),
        )
        if now - self.shown < (0.2 if self.terminal else 5) and step < self.steps:
            return
        self.shown = now
        left = int((self.steps - step) / pace) if pace else 0
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.1f}"
        line = (
            f"step {step}/{self.steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  {rate} img/s  "
            f"MFU {self.mfu:.0%}  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        print(
            f"\r{line}\033[K" if self.terminal else line,
            end="" if self.terminal else "\n",
            flush=True,
        )

    def note(self, text: str) -> None:
        print(f"\r{text}\033[K" if self.terminal else text, flush=True)

    def end(self) -> None:
        if self.terminal:
            print(flush=True)


def _quiet_worker(_: int) -> None:
    """Loading processes leave signals to the process that trains; it ends them when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End loading processes that are left; an interpreter that exits would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def _agree(value, rank: int, world: int):
    """Rank 0's value, on every rank."""
    box = [value]
    if world > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _any(flags: list[bool], world: int) -> list[bool]:
    """Each flag, true where it is true on any rank."""
    if world == 1:
        return flags
    total = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(
        total, op=torch.distributed.ReduceOp.MAX
    )  # by gloo: the GPU is not asked
    return [bool(v) for v in total.tolist()]


def _gather(value, rank: int, world: int) -> list:
    """Every rank's value, by rank."""
    out = [value]
    if world > 1:
        out = [None] * world
        torch.distributed.all_gather_object(out, value)
    return out


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """fp32 on a CPU; bf16 on a GPU that has it."""
    if name == "fp16":
        raise UserError(
            "--precision fp16: its range is too small for training without loss scaling; take bf16 or fp32"
        )
    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported()
            else torch.float32
        )
    return models.PRECISIONS[name]


def default_workers(workers: int | None, device: torch.device) -> int:
    """Loading processes per rank: enough to feed a GPU; on a CPU at most one, which shares the cores with training."""
    if workers is not None:
        return workers
    cores = (os.cpu_count() or 1) // max(1, torch.cuda.device_count())
    return max(1, min(12, cores - 1)) if device.type == "cuda" else int(cores > 2)


def default_name(args: argparse.Namespace) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{args.cancer}-{Path(args.student).name}")


def describe_device(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def describe_model(model: models.Model) -> dict:
    return {
        "name": model.name,
        "parameters": model.parameters_count,
        "dim": model.dim,
        "weights": model.weights,
    }


def load_pair(args: argparse.Namespace, device: torch.device, precision: torch.dtype):
    """Teacher, frozen, with weights in the precision of its matrix products; student in fp32."""
    weights = models.parse_weights(args.weights, [args.teacher, args.student])
    options = {"device": device, "input_size": args.crop}
    try:
        teacher = models.load_model(args.teacher, weights[args.teacher], dtype=precision, **options)
        student = models.load_model(
            args.student, weights[args.student], dtype=torch.float32, **options
        )
    except UserError as error:
        raise UserError(str(error).replace("--input-size", "--crop")) from None
    return teacher.requires_grad_(False), student.train()


def build(args, teacher, student, device, world: int) -> tuple[Distiller, float]:
    """The distiller for this pair, and the FLOPs of one step on one rank (a backward pass counted as two forward)."""
    from torch.utils.flop_counter import FlopCounterMode

    sample, shapes, flops = torch.zeros(2, 3, args.crop, args.crop, device=device), [], []
    student.eval()
    for model in (teacher, student):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            try:
                shapes.append(rows(model, sample, args.tokens).shape)
            except ValueError as error:
                raise UserError(f"--tokens {args.tokens}: {error}; take --tokens cls") from None
        flops.append(counter.get_total_flops() / 2)
    student.train()
    if shapes[0][0] != shapes[1][0]:
        raise UserError(
            f"--tokens all: {args.teacher} has {shapes[0][0] // 2} tokens for a crop of {args.crop} px and "
            f"{args.student} has {shapes[1][0] // 2}; take --tokens cls, or a pair with equal patch size"
        )
    group = None
    if args.sync and world > 1:
        group = torch.distributed.group.WORLD
        if device.type == "cuda":
            student.net = nn.SyncBatchNorm.convert_sync_batchnorm(student.net)
    distiller = Distiller(student, shapes[1][1], shapes[0][1], args, group).to(device)
    distiller.requires_grad_(True)
    for model in (teacher, student):
        if not (teacher.num_prefix_tokens and student.num_prefix_tokens):
            model.to(
                memory_format=torch.channels_last
            )  # a third faster for convolutions, on CPU too
        if args.compile:
            # Block by block: one short compilation serves all blocks, and DDP still overlaps with the backward pass.
            for module in getattr(model.net, "blocks", [model.net]):
                module.compile()
    return distiller, (flops[0] + 3 * flops[1]) * args.batch_size * args.accumulate


# ---- measuring speed --------------------------------------------------------------------------------------------


class Synthetic:
    """A patch index of noise, so that speed can be measured without a cohort."""

    slides, patients = ("noise",), ("noise",)

    def __init__(self, patch_size: int):
        self.patch_size, self.counts = patch_size, np.array([1 << 20])
        self.patches = np.random.default_rng(0).integers(
            0, 256, (8, patch_size, patch_size, 3), np.uint8
        )

    def draw(self, seed: int, n: int, by: str = "slide") -> int:
        return n % (1 << 20)

    def locate(self, i: int) -> tuple[int, int]:
        return 0, i

    def read(self, i: int) -> np.ndarray:
        return self.patches[i % 8]


class Plain(torch.utils.data.Dataset):
    """The same patches through torchvision's transforms, one image at a time in the loading processes."""

    def __init__(self, index, crop: int):
        from torchvision.transforms import v2

        self.index = index
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomCrop(crop),
                v2.RandomHorizontalFlip(FLIP_P),
                v2.RandomVerticalFlip(FLIP_P),
                v2.RandomApply([v2.ColorJitter(*JITTER)], JITTER_P),
                v2.RandomApply([v2.GaussianBlur(BLUR_SIZE, BLUR_SIGMA)], BLUR_P),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.index.read(i))


def profile(args: argparse.Namespace) -> int:
    """Print where the time of a step goes. Returns the exit status."""
    _, world, device = models.setup_distributed(args.device)
    if world > 1:
        raise UserError("--profile: measures one process; run it without torchrun")
    precision, cuda = pick_precision(args.precision, device), device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    args.weights = args.weights or ["random"]
    index = Synthetic(args.crop * 8 // 7)
    workers = default_workers(args.workers, device)
    images, ceiling = args.batch_size * args.accumulate, models.matmul_ceiling(device, precision)
    print(
        f"{describe_device(device)}, torch {torch.__version__}, {str(precision).removeprefix('torch.')}; measured "
        f"matmul ceiling {ceiling / 1e12:,.2f} TFLOP/s; {workers} loading processes, batch {args.batch_size}"
        f"{f' x {args.accumulate}' if args.accumulate > 1 else ''}, crop {args.crop}",
        flush=True,
    )

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def report(name: str, parts: dict[str, list[float]], step: float, flops: float) -> None:
        print(
            f"\n{name}: {1000 * step:,.1f} ms a step, {images / step:,.1f} images/s, "
            f"{flops / images / 1e9:,.2f} GFLOP an image, MFU {flops / step / ceiling:.1%} of the ceiling"
            + (
                f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:,.1f} GiB"
                if cuda
                else ""
            )
        )
        total = sum(statistics.median(times) for times in parts.values())
        for part, times in parts.items():
            print(
                f"  {part:16s} {1000 * statistics.median(times):9.2f} ms {statistics.median(times) / total:6.1%}"
            )

    def measure(step, marks: dict[str, list[float]]) -> float:
        """Seconds a step takes: first in parts, with the device waited for after each, then whole and undisturbed."""
        for _ in range(3):
            step(lambda name: None)
        for _ in range(args.profile_steps):
            last, sums = clock(), {}

            def mark(name: str, sums=sums) -> None:
                nonlocal last
                now = clock()
                sums[name], last = sums.get(name, 0.0) + now - last, now

            step(mark)
            for name, seconds in sums.items():
                marks.setdefault(name, []).append(seconds)
        start = clock()
        for _ in range(args.profile_steps):
            step(lambda name: None)
        return (clock() - start) / args.profile_steps

    teacher, student = load_pair(args, device, precision)
    distiller, flops = build(args, teacher, student, device, 1)
    print(
        f"{args.teacher} ({teacher.parameters_count / 1e6:,.1f} M) into {args.student} "
        f"({student.parameters_count / 1e6:,.1f} M)",
        flush=True,
    )
    one = Step(teacher, distiller, args, device, precision)
    dataset = Batches(
        index,
        np.zeros(1, bool),
        seed=args.seed,
        batch_size=args.batch_size,
        crop=args.crop,
        by="slide",
    )
    loader = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(1 << 20),
            num_workers=workers,
            pin_memory=cuda,
            worker_init_fn=_quiet_worker,
        )
    )

    def ours(mark) -> None:
        one.mark = mark
        one([next(loader)[:2] for _ in range(args.accumulate)], args.lr, args.weight_decay)

    parts: dict[str, list[float]] = {}
    seconds = measure(ours, parts)
    report("this step" + (", compiled" if args.compile else ""), parts, seconds, flops)
    if not args.plain:
        return 0

    from timm.layers import set_fused_attn, use_fused_attn

    one = loader = teacher = student = distiller = None  # room for the other
    _end_workers()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    args.compile, before = False, use_fused_attn()
    set_fused_attn(False)  # read by layers as they are built
    teacher, student = load_pair(args, device, torch.float32)
    set_fused_attn(before)
    for model in (teacher, student):
        model.to(memory_format=torch.contiguous_format)
    distiller = Distiller(student, student.dim, teacher.dim, args).to(device)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=args.lr, foreach=False, fused=False)
    stream = iter(
        torch.utils.data.DataLoader(
            Plain(index, args.crop),
            batch_size=args.batch_size,
            num_workers=workers,
            shuffle=False,
            pin_memory=cuda,
            worker_init_fn=_quiet_worker,
        )
    )

    def plain(mark) -> None:
        optimizer.zero_grad()
        for _ in range(args.accumulate):
            crops = next(stream).to(device)
            mark("data, augmented")
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                with torch.no_grad():
                    target = teacher(teacher.normalize(crops))
                mark("teacher")
                features = student(student.normalize(crops))
                mark("student forward")
                s, t = (
                    F.batch_norm(x.float(), None, None, training=True, eps=1e-4)
                    for x in (features @ distiller.projector, target)
                )
                loss = ((s - t).abs() ** args.alpha).sum().log() / args.accumulate
                mark("loss")
            loss.backward()
            mark("backward")
        optimizer.step()
        loss.item()
        mark("optimizer")

    parts = {}
    plain_seconds = measure(plain, parts)
    report(
        "the same step written plainly (eager, autocast over fp32 weights, unfused attention, optimizer and loss, "
        "torchvision's transforms)",
        parts,
        plain_seconds,
        flops,
    )
    print(f"\nthis step is {plain_seconds / seconds:.2f} times as fast as the plain one")
    return 0


# ---- command line -----------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=tile.Help
    )
    group = parser.add_argument_group("what")
    group.add_argument("--cancer", default="brca", help="cohort: the name given to tile.py")
    group.add_argument("--data", default="data", help="folder that tile.py filled")
    group.add_argument(
        "--slides", help="folder of the slides, where they are not where tile.py found them"
    )
    group.add_argument("--runs", default="runs", help="folder of runs")
    group.add_argument("--name", help="name of the run; by default cancer and student")
    group.add_argument(
        "--teacher",
        default="h-optimus-0",
        help="a name that models.py lists, timm:NAME, or a folder",
    )
    group.add_argument("--student", default="hibou-l", help="likewise")
    group = parser.add_argument_group("recipe (defaults: the paper's, where it says)")
    group.add_argument(
        "--max-steps",
        type=int,
        default=10_000,
        help="optimizer steps; the cosine schedules span them",
    )
    group.add_argument("--batch-size", type=int, default=32, help="patches per process and step")
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="micro-batches per step; 3 on one GPU computes what three GPUs do with local statistics",
    )
    group.add_argument(
        "--crop", type=int, default=224, help="side of the random crop, pixels; both models see it"
    )
    group.add_argument(
        "--lr",
        type=float,
        default=1e-4,
        help="learning rate at the start; random students want 1e-3",
    )
    group.add_argument("--lr-end", type=float, default=1e-6, help="learning rate at the end")
    group.add_argument("--weight-decay", type=float, default=0.05, help="at the start")
    group.add_argument("--weight-decay-end", type=float, default=0.5, help="at the end")
    group.add_argument(
        "--decay-all", action="store_true", help="weight decay on 1-D parameters and tokens too"
    )
    group.add_argument(
        "--grad-clip",
        type=float,
        default=0.0,
        help="largest norm of the gradient, 0 for no limit; 1 tames a run whose loss turned NaN",
    )
    group.add_argument(
        "--sampling",
        choices=("slide", "patch"),
        default="slide",
        help="draw a slide uniformly and then a patch of it, or patches uniformly",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of patches, augmentation, projector and held-out patients",
    )
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss", choices=LOSSES, default="logsum", help="all but logsum are there for comparison"
    )
    group.add_argument(
        "--alpha", type=float, default=4.0, help="exponent of logsum and correlation"
    )
    group.add_argument(
        "--normalize",
        choices=("both", "student", "student-affine", "none"),
        default="both",
        help="batch norm after the projector and on the teacher",
    )
    group.add_argument(
        "--reduction",
        choices=("batch", "row"),
        default="batch",
        help="one log over the batch, or one per sample and their mean",
    )
    group.add_argument(
        "--tokens",
        choices=("cls", "all"),
        default="cls",
        help="compare embeddings, or those and all patch tokens (ViTs with equal patch size)",
    )
    group.add_argument(
        "--sync",
        action="store_true",
        help="statistics and sum of the loss over all ranks, and "
        "on GPUs the statistics of batch norm inside the student",
    )
    group = parser.add_argument_group("when to stop")
    group.add_argument(
        "--stop",
        choices=("consecutive", "cumulative", "off"),
        default="consecutive",
        help="how to count steps whose loss exceeds the mean of the last --stop-window",
    )
    group.add_argument("--stop-window", type=int, default=100, help="steps")
    group.add_argument("--stop-patience", type=int, default=10, help="stop at more than this count")
    group.add_argument(
        "--stop-min-steps", type=int, default=1000, help="never stop before this step"
    )
    models.add_model_arguments(parser)
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers",
        type=int,
        help="loading processes per rank; default: up to 12 for a GPU, 1 on a CPU of more than 2 cores",
    )
    group.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        help="stop when more than this fraction of patches (and more than 10) cannot be read",
    )
    group.add_argument(
        "--hold-out", type=float, default=0.05, help="fraction of patients kept for measuring CKA"
    )
    group.add_argument(
        "--eval-patches",
        type=int,
        default=256,
        help="fixed held-out patches for CKA to the teacher",
    )
    group.add_argument(
        "--eval-every",
        type=int,
        default=0,
        help="steps between measurements; 0: a tenth of the run, at most 500",
    )
    group.add_argument(
        "--checkpoint-minutes", type=float, default=10, help="between checkpoints; 0: none by time"
    )
    group.add_argument(
        "--checkpoint-steps", type=int, default=0, help="between checkpoints; 0: none by steps"
    )
    group.add_argument(
        "--keep", type=int, default=2, help="checkpoints kept, in case the newest is damaged"
    )
    group = parser.add_argument_group("measuring speed")
    group.add_argument(
        "--profile",
        action="store_true",
        help="time the parts of a step on synthetic patches (random weights unless given), and exit",
    )
    group.add_argument(
        "--plain",
        action="store_true",
        help="with --profile: time the same step written plainly too, and print the ratio",
    )
    group.add_argument("--profile-steps", type=int, default=10, help="steps timed")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a number that cannot be."""
    for name, low in (
        ("max_steps", 1),
        ("batch_size", 2),
        ("accumulate", 1),
        ("crop", BLUR_SIZE // 2 + 1),
        ("keep", 1),
        ("eval_patches", 4),
        ("stop_window", 1),
        ("profile_steps", 1),
        ("seed", 0),
    ):
        if getattr(args, name) < low:
            why = ", since batch norm needs two samples" if name == "batch_size" else ""
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}{why}"
            )
    for name, low in (
        ("lr", 0),
        ("lr_end", 0),
        ("weight_decay", 0),
        ("weight_decay_end", 0),
        ("grad_clip", 0),
        ("alpha", 1),
        ("stop_patience", 0),
        ("stop_min_steps", 0),
        ("max_unreadable", 0),
        ("eval_every", 0),
        ("checkpoint_minutes", 0),
        ("checkpoint_steps", 0),
        ("workers", 0),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: expected a number of at least {low}"
            )
    if not 0 <= args.hold_out <= 0.5:
        raise UserError(f"--hold-out {args.hold_out}: expected a fraction from 0 to 0.5")
    if args.sync and args.loss != "logsum":
        raise UserError(f"--sync: only --loss logsum is computed over all ranks, not {args.loss}")
    if args.plain and not args.profile:
        raise UserError("--plain: only together with --profile")


KILLED = (
    "a loading process was killed, by the system if memory was short: lower --workers, and run the same command "
    "again to go on from the last checkpoint"
)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        try:
            check(args)
            status = profile(args) if args.profile else train(args)
        finally:
            _end_workers()  # before anything is said: the death of one is a signal that raises, wherever one is
        models.leave_distributed()  # not after an error: it would wait for what other ranks will never send
        return status
    except UserError as error:
        return _fail(str(error))
    except (ConnectionError, EOFError):  # of the pipes to loading processes
        return _fail(KILLED)
    except OSError as error:
        return _fail(
            f"{error}; what was saved before is whole: mend it and run the same command again"
        )
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        return _fail(
            f"{reason}: lower --batch-size, and raise --accumulate for as many patches a step"
        )
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            _end_workers()
            return _fail(KILLED)
        if not torch.distributed.is_initialized() or "onnection" not in str(error):
            raise
        return _fail("another rank ended, so this one does too; its message says why")


def _fail(message: str) -> int:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"error: {rank}{message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
