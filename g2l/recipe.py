"""The recipe: what is compared, the losses, the schedules, the stop rule, and one step of training.

`look` is what a model says of images, `Distiller` the student with its projectors and loss, `build`
makes it for a student and its teachers, `Step` is what one optimisation step does with them, and
`projected` is the student with its projector kept. `args` is the recipe, with the names that
distill.py's flags have.
"""

import copy
import math
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from g2l.augment import Params, augment
from g2l.errors import UserError
from g2l.models import Model, Network, resized
from g2l.patches import PatchIndex
from g2l.ranks import agree, rank_and_world
from g2l.registry import PLUS
from g2l.speed import flops_per_image
from g2l.stream import embeddings_of, feature_spread
from g2l.teacher_cache import TeacherCache, stream_key
from g2l.views import StudentView, parse_views, slide_means

LOSSES = (
    "logsum",
    "mse",
    "cosine",
    "smooth-l1",
    "kl",
    "correlation",
)  # of rows, projected
BESIDE = ("patch-cosine", "relation")  # terms that go beside one of them
TOKENS = ("pos_embed", "cls_token", "reg_token", "dist_token")


def parse_terms(words: Sequence[str]) -> dict[str, float]:
    """`NAME` or `NAME:WEIGHT`, once or more, as {name: weight}.

    Raises UserError for another name, a weight that is none, and where no loss of rows is named,
    without which a projector learns nothing.
    """
    terms: dict[str, float] = {}
    for word in " ".join(words).split():
        name, _, text = word.partition(":")
        try:
            weight = float(text or 1)
        except ValueError:
            weight = math.nan
        if name not in LOSSES + BESIDE or name in terms or not 0 < weight < math.inf:
            known = ", ".join(LOSSES + BESIDE)
            raise UserError(f"loss {word}: expected NAME or NAME:WEIGHT, each once, of {known}")
        terms[name] = weight
    if not terms.keys() & set(LOSSES):
        raise UserError(f"loss {' '.join(terms)}: goes beside one of {', '.join(LOSSES)}")
    return terms


def joined(values: Sequence) -> str:
    """The values of a list as one text."""
    return PLUS.join(map(str, values))


def is_dense(args: Namespace) -> bool:
    """Whether patch tokens are compared, too."""
    return args.tokens != "cls" or "patch-cosine" in parse_terms(args.loss)


class Said(NamedTuple):
    """What a model says of B images."""

    whole: Tensor  # (B, D): its embedding
    patches: Tensor | None = None  # (B, n, C): its patch tokens, where they are compared

    def rows(self, tokens: str) -> Tensor:
        """The rows that a loss of rows compares: (B, D), (B * n, C) or (B * (1 + n), C)."""
        if self.patches is None or tokens == "cls":
            return self.whole
        if tokens == "patch":
            return self.patches.flatten(0, 1)
        return torch.cat([self.whole[:, None], self.patches], 1).flatten(0, 1)


def look(
    model: Model,
    images: Tensor,
    args: Namespace,
    grid: tuple[int, int] | None = None,
) -> Said:
    """float (B, 3, S, S) in [0, 1] -> what the model says of them.

    Patch tokens (of a convolutional network: the cells of its last map) are resampled to `grid`,
    bilinearly with antialias, where theirs is another. With tokens="all" the first row is the
    network's own pooling (the class token, where that is its embedding), so that models without a
    class token have one too; registers have no counterpart.
    """
    x = model.normalize(images)
    if not is_dense(args):
        return Said(model(x))
    net: Any = model.net
    with model.autocast(x):
        features = net.forward_features(x)
        pooled = net.forward_head(features, pre_logits=True)
    whole = pooled if args.tokens == "all" else model.embed(features)
    cells = model.grid(features)
    if grid:
        cells = resized(cells, grid)
    return Said(whole, cells.flatten(2).transpose(1, 2))


class Distiller(nn.Module):
    """The student, a projector to each teacher's width (linear, no bias), and their loss.

    The projectors lie side by side, as columns of one matrix; those of the term patch-cosine in a
    second one. `width`, `widths`: of the rows of the student and of each teacher; `cells`: of their
    patch tokens, the student's first; `grid`: rows and columns of the student's patches.
    """

    grid: tuple[int, int] | None = None

    def __init__(
        self,
        student: Model,
        width: int,
        widths: Sequence[int],
        args: Namespace,
        cells: Sequence[int] = (),
    ):
        super().__init__()
        self.student = student
        self.args = args
        self.widths = list(widths)
        self.terms = parse_terms(args.loss)
        several = args.sync and rank_and_world()[1] > 1
        self.group = torch.distributed.group.WORLD if several else None
        random = torch.Generator().manual_seed(args.seed)
        total = sum(widths)
        self.projector = _uniform(width, total, random)
        affine = args.normalize == "student-affine"
        self.scale = nn.Parameter(torch.ones(total)) if affine else None
        self.shift = nn.Parameter(torch.zeros(total)) if affine else None
        self.patch_projector: nn.Parameter | None = None
        self.cells = list(cells[1:])
        if "patch-cosine" in self.terms:
            self.patch_projector = _uniform(cells[0], sum(self.cells), random)

    def loss(self, student: Said, teachers: Sequence[Said]) -> Tensor:
        """What student and teachers say of the same images -> scalar, fp32: terms and teachers
        summed, each with its weight."""
        weights = self.args.teacher_weight
        total = torch.zeros((), device=student.whole.device)
        for number, teacher in enumerate(teachers):
            share = weights[number % len(weights)]
            for kind, weight in self.terms.items():
                total = total + share * weight * self._term(kind, student, teacher, number)
        if self.args.tokens == "patch":  # several ranks wait for the gradient of every parameter
            total = total + 0 * student.whole.sum()
        return total

    def _term(self, kind: str, student: Said, teacher: Said, number: int) -> Tensor:
        """One term of the loss to teacher `number`, fp32."""
        if kind == "relation":
            return relation(student.whole, teacher.whole)
        if kind == "patch-cosine" and self.patch_projector is not None:
            projector = self.patch_projector.split(self.cells, 1)[number]
            return _plain_cosine(student.rows("patch"), projector, teacher.rows("patch"))
        args = self.args
        rows = student.rows(args.tokens)  # (R, Ds)
        wanted = teacher.rows(args.tokens)  # (R, Dt)
        projector = self.projector.split(self.widths, 1)[number]
        affine = []
        for part in (self.scale, self.shift):
            affine.append(None if part is None else part.split(self.widths)[number])
        scale, shift = affine
        if kind == "logsum":
            return kernels.log_sum_loss(
                rows,
                projector,
                wanted,
                alpha=args.alpha,
                normalize=args.normalize,
                reduction=args.reduction,
                scale=scale,
                shift=shift,
                group=self.group,
            )
        with torch.autocast(rows.device.type, enabled=False):
            s = rows.float() @ projector
            t = wanted.float()
            if args.normalize != "none":
                s = F.batch_norm(s, None, None, scale, shift, training=True, eps=1e-4)
            if args.normalize == "both":
                t = F.batch_norm(t, None, None, training=True, eps=1e-4)
            return _compare(kind, s, t, args.alpha)

    def forward(self, images: Tensor, teachers: Sequence[Said]) -> tuple[Tensor, Tensor]:
        """-> (loss, spread of the student's rows)."""
        student = look(self.student, images, self.args)
        spread = feature_spread(student.rows(self.args.tokens))
        return self.loss(student, teachers), spread


def _uniform(width: int, columns: int, random: torch.Generator) -> nn.Parameter:
    """A projector as nn.Linear would begin it."""
    drawn = torch.rand(width, columns, generator=random) * 2 - 1
    return nn.Parameter(drawn * width**-0.5)


def _plain_cosine(student: Tensor, projector: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean cosine of rows (R, Ds) @ projector and rows (R, Dt), not normalised before."""
    with torch.autocast(student.device.type, enabled=False):
        projected = student.float() @ projector
        return 1 - F.cosine_similarity(projected, teacher.float()).mean()


def relation(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the images of a batch lie from one another, in the student's own space as in the
    teacher's: rows (B, Ds) and (B, Dt) -> scalar.

    Distance-wise relational distillation (Park et al., CVPR 2019): the Huber loss of Euclidean
    distances, each over their mean.
    """
    with torch.autocast(student.device.type, enabled=False):
        s = F.pdist(student.float())
        t = F.pdist(teacher.float())
        return F.smooth_l1_loss(s / s.mean(), t / t.mean())


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


@dataclass
class StopRule:
    """The paper's: the loss exceeded the mean of the last `window` more than `patience` times.

    "consecutive" counts steps in a row, "cumulative" counts all; "off" never stops. Neither stops
    before `minimum` steps.
    """

    kind: str
    window: int
    patience: int
    minimum: int
    count: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.window)

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
        return {
            "recent": list(self.recent),
            "count": self.count,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.recent.extend(state["recent"])
        self.count = state["count"]
        self.steps = state["steps"]


def build(args: Namespace, teachers: Sequence[Model], student: Model) -> tuple[Distiller, float]:
    """The distiller for this student and its teachers, and the FLOPs of one step on one rank.

    A backward pass is counted as two forward. Raises UserError where tokens cannot be compared.
    """
    models = [student, *teachers]
    device = student.device
    if student.net.num_classes:
        raise UserError(f"{student.name}: has a projector of its own; take the student beside it")
    student.eval()
    flops = 2 * flops_per_image(student) + sum(map(flops_per_image, models))
    sample = torch.zeros(1, 3, args.crop, args.crop, device=device)
    widths = []
    cells = []
    for model in models:
        with torch.no_grad():
            said = look(model, sample, args)
        if said.patches is not None:
            cells.append(said.patches.shape[-1])
            if args.tokens == "all" and cells[-1] != said.whole.shape[-1]:
                raise UserError(
                    f"{model.name}: its pooled features have {said.whole.shape[-1]} numbers"
                    f" and its patch tokens {cells[-1]}",
                    mend="tokens",
                )
        widths.append(said.rows(args.tokens).shape[-1])
    distiller = Distiller(student, widths[0], widths[1:], args, cells).to(device)
    if cells:
        with torch.no_grad():
            shape = student.grid(student.net.forward_features(sample)).shape
        distiller.grid = (shape[2], shape[3])
    student.train()
    if distiller.group and device.type == "cuda":
        student.net = nn.SyncBatchNorm.convert_sync_batchnorm(student.net)
    distiller.requires_grad_(True)
    return distiller, flops * args.batch_size * args.accumulate


class Step:
    """Teachers, student and optimizer, and what a step does with them. It waits for none."""

    def __init__(
        self,
        teachers: Sequence[Model],
        distiller: Distiller,
        args: Namespace,
        device: torch.device,
        precision: torch.dtype,
        world: int = 1,
    ):
        self.view: Callable[[Tensor, Params], Tensor] | None = None  # crops -> the student's
        # Of each teacher, where asked for: (slides, dim), taken off its targets by slide, and what
        # is kept of what it says of each sample.
        self.centres: list[Tensor] = []
        self.caches: list[TeacherCache] = []
        self.teachers = list(teachers)
        self.distiller = distiller
        self.args = args
        self.device = device
        self.autocast = precision == torch.bfloat16
        self.layout = torch.contiguous_format
        models = [*teachers, distiller.student]
        if not all(model.num_prefix_tokens for model in models):
            self.layout = torch.channels_last  # a third faster for convolutions, on a CPU too
        for model in models:
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
        self,
        batches: Sequence[tuple[Tensor, Params]],
        lr: float,
        weight_decay: float,
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
            targets = [self._target(number, crops, params) for number in range(len(self.teachers))]
        seen = self.view(crops, params) if self.view else crops
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            model = self.parallel or self.distiller
            return model(seen, targets)

    def _target(self, number: int, crops: Tensor, params: Params) -> Said:
        """What a teacher says of the crops; from its cache, if there is one and it has them."""
        known = self.caches[number].get(params) if self.caches else None
        if known is not None:
            said = Said(known.to(self.device, non_blocking=True))
        else:
            said = look(self.teachers[number], crops, self.args, self.distiller.grid)
            if self.caches:
                # Rounded as they are kept, so that the run that computes them and those that read
                # them agree to the last digit.
                said = Said(said.whole.half())
                self.caches[number].put(params, said.whole)
        if self.centres:
            centre = self.centres[number][params.slide.to(self.device)]
            said = said._replace(whole=said.whole - centre)
        return said


def set_targets(step: Step, index: PatchIndex, held: np.ndarray, identity: dict) -> None:
    """What the student sees and what it has to match, where that is not the paper's."""
    args = step.args
    if kinds := parse_views(args.student_view):
        step.view = StudentView(kinds, args.seed, index, ~held)
    if args.teacher_center == "slide":
        for teacher in step.teachers:
            means = slide_means(teacher, index, args.crop, args.seed, args.batch_size)
            step.centres.append(means.to(step.device))
    if args.teacher_cache:
        # Rank 0 alone knows all of the identity.
        marks = agree(str(identity.get("teacher weights")).split())
        for teacher, mark in zip(step.teachers, marks, strict=True):
            key = agree(stream_key(identity | {"teacher weights": mark}))
            step.caches.append(TeacherCache(Path(args.teacher_cache), key, teacher.dim))


def projected(distiller: Distiller, images: Tensor, batch: int) -> Network:
    """The student's network with the projector as its head, which gives the projected features,
    standardised by their mean and spread over images (N, 3, S, S), uint8.

    Raises UserError where timm's head for this network does not take the embedding.
    """
    student = distiller.student
    features = embeddings_of(student, images, batch)
    width, columns = distiller.projector.shape
    with torch.no_grad():
        net = copy.deepcopy(student.net).eval()
        net.reset_classifier(columns)
        head = net.get_classifier()
        taken = head.in_features if isinstance(head, nn.Linear) else 0
        if not taken == width == features.shape[1]:
            raise UserError(
                f"{student.name}: timm's head for it does not take its embedding",
                mend="head",
            )
        rows = features.double() @ distiller.projector.double()
        spread = rows.std(0, correction=0) + 1e-6
        head.to(features.device)
        head.weight.copy_((distiller.projector / spread).T)
        head.bias.copy_(-rows.mean(0) / spread)
    return net


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
