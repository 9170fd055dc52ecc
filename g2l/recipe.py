"""TODO."""

from __future__ import annotations

import argparse
import math
from collections import deque

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from g2l.models import Model
from g2l.stream import feature_spread

LOSSES = ("logsum", "mse", "cosine", "smooth-l1", "kl", "correlation")


def token_rows(model: Model, images: torch.Tensor, tokens: str) -> torch.Tensor:
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
        student: Model,
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
        return token_rows(self.student, images, self.tokens)

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
        return self.loss(student, teacher), feature_spread(student)


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
