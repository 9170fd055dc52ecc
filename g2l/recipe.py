"""The recipe: what is compared, the losses, the schedules, the stop rule, and one step of training.

`Distiller` is the student with its projector and loss, `build` makes it for a pair of models, and
`Step` is what one optimisation step does with it and the teacher. `args` is the recipe, with the
names that distill.py's flags have.
"""

import math
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from g2l.augment import Params, augment
from g2l.errors import UserError
from g2l.models import Model
from g2l.ranks import rank_and_world
from g2l.speed import flops_per_image
from g2l.stream import feature_spread
from g2l.teacher_cache import TeacherCache

LOSSES = ("logsum", "mse", "cosine", "smooth-l1", "kl", "correlation")
TOKENS = ("pos_embed", "cls_token", "reg_token", "dist_token")


def token_rows(model: Model, images: Tensor, tokens: str) -> Tensor:
    """float (B, 3, S, S) in [0, 1] -> the rows compared.

    (B, dim), or with tokens="all" (B * (1 + patches), C). Of all tokens the first is the network's
    own pooling (the class token, where that is its embedding), so that models without a class token
    have one too; registers have no counterpart.
    """
    x = model.normalize(images)
    if tokens == "cls":
        return model(x)
    out = model.tokens(x)
    net: Any = model.net
    with model.autocast(x):
        pooled = net.forward_head(out, pre_logits=True)
    return torch.cat([pooled[:, None], out[:, model.num_prefix_tokens :]], 1).flatten(0, 1)


class Distiller(nn.Module):
    """The student, the projector to the teacher's width (linear, no bias), and their loss."""

    def __init__(self, student: Model, width: int, teacher_width: int, args: Namespace):
        super().__init__()
        self.student = student
        self.args = args
        several = args.sync and rank_and_world()[1] > 1
        self.group = torch.distributed.group.WORLD if several else None
        random = torch.Generator().manual_seed(args.seed)
        uniform = torch.rand(width, teacher_width, generator=random) * 2 - 1
        self.projector = nn.Parameter(uniform * width**-0.5)
        affine = args.normalize == "student-affine"
        self.scale = nn.Parameter(torch.ones(teacher_width)) if affine else None
        self.shift = nn.Parameter(torch.zeros(teacher_width)) if affine else None

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Rows of the student (R, Ds) and of the teacher (R, Dt) -> scalar, fp32."""
        args = self.args
        if args.loss == "logsum":
            return kernels.log_sum_loss(
                student,
                self.projector,
                teacher,
                alpha=args.alpha,
                normalize=args.normalize,
                reduction=args.reduction,
                scale=self.scale,
                shift=self.shift,
                group=self.group,
            )
        with torch.autocast(student.device.type, enabled=False):
            s = student.float() @ self.projector
            t = teacher.float()
            if args.normalize != "none":
                s = F.batch_norm(s, None, None, self.scale, self.shift, training=True, eps=1e-4)
            if args.normalize == "both":
                t = F.batch_norm(t, None, None, training=True, eps=1e-4)
            return _compare(args.loss, s, t, args.alpha)

    def forward(self, images: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """-> (loss, spread of the student's rows)."""
        student = token_rows(self.student, images, self.args.tokens)
        return self.loss(student, teacher), feature_spread(student)


def _compare(kind: str, s: Tensor, t: Tensor, alpha: float) -> Tensor:
    """The losses that are there for comparison, of normalised rows (R, Dt)."""
    if kind == "mse":
        return F.mse_loss(s, t)
    if kind == "smooth-l1":
        return F.smooth_l1_loss(s, t)
    if kind == "cosine":
        return 1 - F.cosine_similarity(s, t).mean()
    if kind == "kl":  # features as logits
        s = s.log_softmax(1)
        t = t.log_softmax(1)
        return F.kl_div(s, t, log_target=True, reduction="batchmean")
    correlation = (s * t).mean(0)  # of each feature over the batch: the recipe's second form
    return ((correlation - 1).abs().pow(alpha).sum() + 1e-5).log()


def param_groups(module: nn.Module, decay_all: bool) -> list[dict]:
    """AdamW's groups: weight decay for matrices, none for 1-D parameters and tokens (`TOKENS`)."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        matrix = parameter.ndim > 1 and not any(part in name for part in TOKENS)
        (decay if decay_all or matrix else plain).append(parameter)
    return [
        {"params": decay, "decays": True},
        {"params": plain, "decays": False, "weight_decay": 0.0},
    ]


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step, steps - 1."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2


class StopRule:
    """The paper's: the loss exceeded the mean of the last `window` more than `patience` times.

    "consecutive" counts steps in a row, "cumulative" counts all; "off" never stops. Neither stops
    before `minimum` steps.
    """

    def __init__(self, kind: str, window: int = 100, patience: int = 10, minimum: int = 0):
        self.kind = kind
        self.patience = patience
        self.minimum = minimum
        self.recent: deque[float] = deque(maxlen=window)
        self.count = 0
        self.steps = 0

    def update(self, loss: float) -> bool:
        """Take the next step's loss; True when training should end."""
        full = len(self.recent) == self.recent.maxlen
        above = full and loss > math.fsum(self.recent) / len(self.recent)
        self.count = self.count + above if above or self.kind == "cumulative" else 0
        self.recent.append(loss)
        self.steps += 1
        return self.kind != "off" and self.count > self.patience and self.steps >= self.minimum

    def state_dict(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"recent": list(self.recent), "count": self.count, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.recent.extend(state["recent"])
        self.count = state["count"]
        self.steps = state["steps"]


def build(args: Namespace, teacher: Model, student: Model) -> tuple[Distiller, float]:
    """The distiller for this pair, and the FLOPs of one step on one rank.

    A backward pass is counted as two forward. Raises UserError where tokens cannot be compared.
    """
    device = next(teacher.parameters()).device
    student.eval()
    flops = flops_per_image(teacher) + 3 * flops_per_image(student)
    sample = torch.zeros(1, 3, args.crop, args.crop, device=device)
    try:
        with torch.no_grad():
            rows, teacher_width = token_rows(teacher, sample, args.tokens).shape
            others, width = token_rows(student, sample, args.tokens).shape
    except ValueError as error:  # no vision transformer
        raise UserError(str(error), "tokens") from None
    if rows != others:
        text = f"for the same crop {args.teacher} has {rows} tokens and {args.student} {others}"
        raise UserError(text, "tokens")
    student.train()
    distiller = Distiller(student, width, teacher_width, args).to(device)
    if distiller.group and device.type == "cuda":
        student.net = nn.SyncBatchNorm.convert_sync_batchnorm(student.net)
    distiller.requires_grad_(True)
    return distiller, flops * args.batch_size * args.accumulate


class Step:
    """Teacher, student and optimizer, and what a step does with them. It does not wait for them."""

    def __init__(
        self,
        teacher: Model,
        distiller: Distiller,
        args: Namespace,
        device: torch.device,
        precision: torch.dtype,
        world: int = 1,
    ):
        self.view: Callable[[Tensor, Params], Tensor] | None = None  # crops -> the student's
        self.centres: Tensor | None = None  # (slides, width), taken off the targets of each slide
        self.cache: TeacherCache | None = None  # of what the teacher says of each sample
        self.teacher = teacher
        self.distiller = distiller
        self.args = args
        self.device = device
        self.autocast = precision == torch.bfloat16
        self.layout = torch.contiguous_format
        if not (teacher.num_prefix_tokens and distiller.student.num_prefix_tokens):
            self.layout = torch.channels_last  # a third faster for convolutions, on a CPU too
        for model in (teacher, distiller.student):
            model.to(memory_format=self.layout)
            if args.compile:
                # Block by block: one short compilation serves all blocks, and DDP still overlaps
                # with the backward pass.
                for module in getattr(model.net, "blocks", [model.net]):
                    module.compile()
        groups = param_groups(distiller, args.decay_all)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
        self.parallel = None
        if world > 1:
            # Batch-norm buffers are rank 0's at every step: a checkpoint holds all there is.
            self.parallel = nn.parallel.DistributedDataParallel(
                distiller,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            if device.type == "cpu":
                self.parallel.register_comm_hook(None, _ordered_mean)

    def __call__(
        self, batches: Sequence[tuple[Tensor, Params]], lr: float, weight_decay: float
    ) -> Tensor:
        """One step on one (images, params) per accumulated micro-batch.

        Returns float (3,) on the device: loss, norm of the gradient, spread of the features.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        total = torch.zeros((), device=self.device)
        for number, (images, params) in enumerate(batches, 1):
            # Ranks add their gradients up once a step, after its last micro-batch.
            apart = self.parallel if number < len(batches) else None
            with apart.no_sync() if apart else nullcontext():
                loss, spread = self._forward(images, params)
                (loss / len(batches)).backward()
            total += loss.detach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.args.grad_clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.args.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([total / len(batches), norm, spread])

    def _forward(self, images: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, P, P) -> (loss, spread) of both models' views of one augmentation."""
        images = images.to(self.device, non_blocking=True)
        crops = augment(images, self.args.crop, params).contiguous(memory_format=self.layout)
        with torch.no_grad():
            target = self._target(crops, params)
            if self.centres is not None:
                target = target - self.centres[params.slide.to(self.device)]
        seen = self.view(crops, params) if self.view else crops
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            model = self.parallel or self.distiller
            return model(seen, target)

    def _target(self, crops: Tensor, params: Params) -> Tensor:
        """What the teacher says of the crops; from the cache, if there is one and it has them."""
        if self.cache is None:
            return token_rows(self.teacher, crops, self.args.tokens)
        known = self.cache.get(params)
        if known is None:
            # Rounded as they are kept, so that the run that computes them and those that read them
            # agree to the last digit.
            known = token_rows(self.teacher, crops, self.args.tokens).half()
            self.cache.put(params, known)
        return known.to(self.device, non_blocking=True)


def _ordered_mean(_, bucket):
    """Mean of a bucket over the ranks, added in the order of the ranks. For DDP on CPUs.

    It is what makes a resumed run of three ranks equal an unbroken one bit for bit: gloo's ring
    adds in an order that depends on a gradient's place in its bucket, and DDP arranges its buckets
    anew after the first step of each process. The one switch against that, find_unused_parameters,
    walks the whole graph at every step and warns that it need not.
    """
    world = torch.distributed.get_world_size()
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world)]
    torch.distributed.all_gather(parts, bucket.buffer())
    done = torch.futures.Future()
    done.set_result(sum(parts[1:], parts[0]) / world)
    return done
