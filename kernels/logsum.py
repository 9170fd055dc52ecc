"""Projector, batch norm and Log-Sum loss in one operator.

    y = student @ weight              (B, Dt), fp32 accumulators, never rounded before the loss
    d = norm(y) - norm(teacher)       norm: batch norm with the statistics of this batch
    loss = log(sum |d|^alpha + eps)   over the batch ("batch"), or per row, then the mean ("row")

The recipe is that of Miles and Mikolajczyk, "Understanding the Role of the Projector in Knowledge
Distillation" (2024).

Because the loss is a scalar, the gradient at the projector's output is known in the forward pass up
to one factor, alpha / (sum + eps), and batch norm's backward is linear in it. So the forward pass
leaves that gradient behind, unscaled, and the backward pass is two matrix products times a scalar
that never leaves the device. Many rows on a GPU leave only the statistics behind and compute the
projection again: less memory, more work.

In order below: the public function and module, the checks, plain PyTorch, the operators, the same
loss over a process group.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import check_tensor, pinned_products, use_triton

NORMALIZE = ("both", "student", "student-affine", "none")
REDUCTION = ("batch", "row")
FUSED_ROWS = 256  # up to here one Triton program holds all rows of its columns


class Options(NamedTuple):
    """All that shapes the loss beside its tensors, as log_sum_loss describes it."""

    alpha: float
    normalize: str
    reduction: str
    eps: float
    norm_eps: float
    operand: torch.dtype  # type of the operands of the matrix products
    need_grad: bool


def log_sum_loss(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 4.0,
    normalize: str = "both",
    reduction: str = "batch",
    eps: float = 1e-5,
    norm_eps: float = 1e-4,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Log-Sum distillation loss of `student @ weight` against `teacher`.

    Gradients flow to student, weight, scale and shift.

    student    (..., Ds) CLS or token rows of the student; all leading dimensions are the batch.
    weight     (Ds, Dt) the projector, the transpose of nn.Linear's; without bias, which batch norm
               would take out again.
    teacher    (..., Dt) rows of the frozen teacher; must not require grad.
    alpha      exponent >= 1; 4 in the paper.
    normalize  "both": batch norm without affine on projection and teacher (the cited recipe's
               code); "student": on the projection only; "student-affine": the same, then times
               `scale` (Dt,) plus `shift` (Dt,); "none".
    reduction  "batch": one log over rows and features; "row": one log per row, then the mean.
    eps        added to each sum before its log; norm_eps: added to the variances.
    group      process group whose ranks together form the batch: statistics and sum are reduced
               over it and every rank returns the loss of the whole. Its gradient is that of the sum
               of the ranks' (equal) losses, as with autograd's own collectives: the mean over
               ranks, which DDP takes, is the gradient of one process that sees the whole batch.

    Tensors may have any strides. Returns a scalar, fp32 (fp64 for fp64 inputs). Under autocast the
    operands of the matrix products are rounded to its type; accumulators, statistics and loss stay
    in fp32. NaN in, NaN out: nothing here waits for the device. There is no second derivative.

    Raises TypeError or ValueError, which names the argument.
    """
    _check_options(alpha, normalize, reduction, eps, norm_eps, scale, shift, group)
    _check_tensors(student, weight, teacher, scale, shift, normalize)
    operand = torch.promote_types(student.dtype, weight.dtype)
    if torch.is_autocast_enabled(student.device.type) and operand != torch.float64:
        operand = torch.get_autocast_dtype(student.device.type)
    inputs = (student.flatten(0, -2), weight, teacher.flatten(0, -2), scale, shift)
    need_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    options = (
        float(alpha),
        normalize,
        reduction,
        float(eps),
        float(norm_eps),
        operand,
        need_grad,
    )
    if group is not None:
        return _Synchronised.apply(group, *inputs, *options)
    run = _forward_op if torch.compiler.is_compiling() else _Eager.apply
    return run(*inputs, *options)[0]


class LogSumLoss(torch.nn.Module):
    """log_sum_loss with its projector (and scale and shift, where it has them) as parameters.

    student_width, teacher_width: Ds and Dt; `options` are keywords of log_sum_loss.
    """

    def __init__(self, student_width: int, teacher_width: int, **options):
        super().__init__()
        self.options = options
        bound = student_width**-0.5
        weight = torch.empty(student_width, teacher_width).uniform_(-bound, bound)
        self.weight = torch.nn.Parameter(weight)
        self.scale = self.shift = None
        if options.get("normalize") == "student-affine":
            self.scale = torch.nn.Parameter(torch.ones(teacher_width))
            self.shift = torch.nn.Parameter(torch.zeros(teacher_width))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Rows (..., Ds) and (..., Dt) -> the loss."""
        return log_sum_loss(
            student,
            self.weight,
            teacher,
            scale=self.scale,
            shift=self.shift,
            **self.options,
        )


def _check_options(alpha, normalize, reduction, eps, norm_eps, scale, shift, group):
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if reduction not in REDUCTION:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTION)}, got {reduction!r}")
    for name, value in (("scale", scale), ("shift", shift)):
        if (value is not None) != (normalize == "student-affine"):
            raise ValueError(f"{name}: needed with normalize='student-affine' and only there")
    for name, value, least in (
        ("alpha", alpha, 1),
        ("eps", eps, 0),
        ("norm_eps", norm_eps, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not least <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least {least}, got {value}")
    if not isinstance(group, (dist.ProcessGroup, type(None))):
        raise TypeError(f"group: expected a process group or None, got {type(group).__name__}")


def _check_tensors(student, weight, teacher, scale, shift, normalize):
    tensors = {"student": student, "weight": weight, "teacher": teacher}
    if scale is not None:
        tensors |= {"scale": scale, "shift": shift}
    for name, tensor in tensors.items():
        check_tensor(name, tensor, "student", student)
    if teacher.requires_grad:
        raise ValueError("teacher: requires grad, but gets no gradient; pass teacher.detach()")
    if student.dim() < 2 or student.numel() == 0:
        raise ValueError(f"student: expected (rows, features), got {tuple(student.shape)}")
    _check_shapes(tensors, normalize)


def _check_shapes(tensors, normalize):
    *batch, width = tensors["student"].shape
    weight = tuple(tensors["weight"].shape)
    if len(weight) != 2 or weight[0] != width or weight[1] == 0:
        linear = ", which is nn.Linear's layout: pass weight.T" if weight[-1:] == (width,) else ""
        raise ValueError(f"weight: expected shape ({width}, features), got {weight}{linear}")
    features = weight[1:]
    shapes = {"teacher": (*batch, *features), "scale": features, "shift": features}
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensors[name].shape)}")
    if normalize != "none" and math.prod(batch) < 2:
        raise ValueError("student: batch norm needs at least 2 rows")


# --- plain PyTorch: the reference, and what runs on a CPU ----------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a, b):
    """a @ b with fp32 (fp64) products, accumulators and result.

    Neither autocast nor a switch for TF32 or bf16 products changes that.
    """
    with torch.autocast(a.device.type, enabled=False), pinned_products("ieee"):
        return torch.mm(a.to(_wide(a.dtype)), b.to(_wide(b.dtype)))


def _powers(d, alpha):
    """(|d|^alpha, its derivative without the factor alpha); pow is much slower than products."""
    if alpha == 4:
        square = d * d
        return square * square, square * d
    size = d.abs()
    return size.pow(alpha), size.pow(alpha - 1) * d.sign()


def _reference(student, weight, teacher, scale, shift, o):
    """The forward operator in PyTorch -> loss, factor, unscaled gradient of y, sums of it.

    grad_y is (B, Dt); its sums, the unscaled gradients of shift and scale, (2, Dt). Both are empty
    where no gradient is needed, the sums also without an affine part.
    """
    y = _product(student.to(o.operand), weight.to(o.operand))
    t = teacher.to(y.dtype)
    affine = (None, None) if scale is None else (scale.to(y.dtype), shift.to(y.dtype))
    if o.normalize == "none":
        d = y - t
    else:
        d, mean, rstd = torch.native_batch_norm(y, *affine, None, None, True, 0.0, o.norm_eps)
        if o.normalize == "both":
            t = torch.native_batch_norm(t, None, None, None, None, True, 0.0, o.norm_eps)[0]
        d -= t
    powers, g = _powers(d, o.alpha)
    if o.reduction == "batch":
        total = powers.sum() + o.eps
        loss = total.log()
        factor = o.alpha / total
    else:
        totals = powers.sum(1) + o.eps
        loss = totals.log().mean()
        factor = torch.full_like(totals[0], o.alpha)
        g /= (totals * totals.shape[0]).unsqueeze(1)
    sums = y.new_empty(0, y.shape[1])
    if not o.need_grad:
        return loss, factor, torch.empty_like(sums), sums
    if o.normalize != "none":
        mask = [True, scale is not None, scale is not None]
        g, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
            g, y, affine[0], None, None, mean, rstd, True, o.norm_eps, mask
        )
        if scale is not None:
            sums = torch.stack((d_shift, d_scale))
    return loss, factor, g, sums


def _reference_backward(grad, factor, grad_y, student, weight, operand, need_student, need_weight):
    d_student = student.new_empty(0)
    d_weight = weight.new_empty(0)
    scaled = grad_y * (grad * factor)
    if need_student:
        d_student = _product(scaled, weight.to(operand).T).to(student.dtype)
    if need_weight:
        d_weight = _product(student.to(operand).T, scaled).to(weight.dtype)
    return d_student, d_weight


# --- operators -----------------------------------------------------------------------------------
# Opaque on purpose: torch.compile takes them whole, also without a GPU, where traceable Triton
# operators fail.

_INPUTS = "Tensor student, Tensor weight, Tensor teacher, Tensor? scale, Tensor? shift"
_OPTIONS = (
    "float alpha, str normalize, str reduction, float eps, float norm_eps, ScalarType operand, "
    "bool need_grad"
)


def _path(student, o) -> str:
    """Which code runs: "torch", or in Triton "fused" (few rows) or "tiled".

    Triton has no useful fp64 product. A sum by row would need one more sweep and is plain PyTorch.
    """
    if o.operand == torch.float64 or o.reduction == "row" or not use_triton(student.device):
        return "torch"
    return "fused" if student.shape[0] <= FUSED_ROWS else "tiled"


def _forward(student, weight, teacher, scale, shift, *options):
    """-> loss, factor, and three tensors for the backward pass, which depend on the path.

    The factor is alpha / (sum + eps); in Triton a second number is the unit of gradients there.
    torch: gradient at the projection (B, Dt), its sums (0 or 2, Dt), nothing. fused: the same, and
    shares of the student's gradient. tiled: weight as operand if that is a copy, columns (6, Dt).
    """
    o = Options(*options)
    path = _path(student, o)
    if path == "torch":
        saved = _reference(student, weight, teacher, scale, shift, o)
        return *saved, saved[0].new_empty(0)
    import kernels.logsum_triton as logsum_triton

    run = logsum_triton.fused_forward if path == "fused" else logsum_triton.tiled_forward
    return run(student, weight, teacher, scale, shift, o)


_forward_op = torch.library.custom_op(
    "g2l::log_sum_forward",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(student, weight, teacher, scale, shift, *options):
    o = Options(*options)
    path = _path(student, o)
    rows, features = teacher.shape
    loss = student.new_empty((), dtype=_wide(o.operand))
    grads = o.need_grad  # 0 or 1 times what a gradient needs
    first = loss.new_empty(grads * rows, features)
    columns = grads * 2
    third = (0,)
    if path == "fused":
        from kernels.logsum_triton import SHARE

        third = (grads * math.ceil(features / SHARE), *student.shape)
    if path == "tiled":
        copied = weight.dtype != o.operand or not weight.is_contiguous()
        first = student.new_empty(weight.shape if copied else (0,), dtype=o.operand)
        columns = 6
    elif scale is None:
        columns = 0
    second = loss.new_empty(columns, features)
    factor = loss.new_empty(() if path == "torch" else (2,))
    return loss, factor, first, second, loss.new_empty(third)


def _backward(grad, factor, first, second, third, student, weight, *rest):
    """-> gradients of student and weight, each empty where not needed."""
    *inputs, need_student, need_weight = rest
    o = Options(*inputs[3:])
    if _path(student, o) == "torch":
        inputs = (grad, factor, first, student, weight, o.operand)
        return _reference_backward(*inputs, need_student, need_weight)
    from kernels.logsum_triton import backward

    saved = (grad, factor, first, second, third, student, weight, *inputs[:3])
    return backward(*saved, o, need_student, need_weight)


_backward_op = torch.library.custom_op(
    "g2l::log_sum_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor factor, Tensor first, Tensor second, Tensor third, "
    f"{_INPUTS}, {_OPTIONS}, bool need_student, bool need_weight) -> (Tensor, Tensor)",
)


@_backward_op.register_fake
def _(*arguments):
    student, weight = arguments[5:7]
    need_student, need_weight = arguments[-2:]
    return (
        student.new_empty(student.shape if need_student else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _save(ctx, inputs, output):
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)  # else autograd would fill a zero gradient as large as y
    ctx.save_for_backward(*output[1:], *inputs[:5])


def _gradients(ctx, backward, grad):
    none = (None,) * (5 + len(ctx.options))
    if grad is None:
        return none
    factor, _, sums, _, _, _, _, scale, shift = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    found = backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    d_student, d_weight = (x if need else None for x, need in zip(found, needs, strict=True))
    d_scale, d_shift = _affine_gradients(sums, grad, factor, scale, shift)
    return d_student, d_weight, None, d_scale, d_shift, *none[5:]


def _affine_gradients(sums, grad, factor, scale, shift):
    """Gradients of scale and shift; the last two rows of `sums` are those of shift, scale, bare."""
    if scale is None:
        return None, None
    d_shift, d_scale = sums[-2:] * (grad * factor.flatten()[0])
    return d_scale.to(scale.dtype), d_shift.to(shift.dtype)


_forward_op.register_autograd(
    lambda ctx, grad, *_: _gradients(ctx, _backward_op, grad), setup_context=_save
)


class _Constant(torch.autograd.Function):
    """A gradient that says, where autograd would take it for a constant, that it is none."""

    @staticmethod
    def forward(gradient, *inputs):
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("log_sum_loss has no second derivative")


def _once(gradients, *inputs):
    """The same gradients; under create_graph and torch.func they refuse to be differentiated."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(None if x is None else _Constant.apply(x, *inputs) for x in gradients)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, whose first call imports Dynamo: that takes seconds."""

    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad, *_):
        student, weight = ctx.saved_tensors[4:6]
        return _once(_gradients(ctx, _backward, grad), student, weight)


# --- one batch over several processes ------------------------------------------------------------


class _Synchronised(torch.autograd.Function):
    """Statistics and sum over a process group, in PyTorch: three reductions forward, one back."""

    @staticmethod
    def forward(ctx, group, student, weight, teacher, scale, shift, *options):
        o = Options(*options)
        y = _product(student.to(o.operand), weight.to(o.operand))
        t = teacher.to(y.dtype)
        width = y.shape[1]
        sums = torch.cat((y.sum(0), t.sum(0), y.new_full((1,), y.shape[0])))
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        x = y
        gain = 1
        rstd = 1
        if o.normalize != "none":
            centred = torch.cat((y, t), 1) - sums[:-1] / count
            squares = centred.square().sum(0)
            dist.all_reduce(squares, group=group)
            rstd = (squares / count + o.norm_eps).rsqrt()
            x, that = (centred * rstd).split(width, 1)
            rstd = rstd[:width]
            t = that if o.normalize == "both" else t
        d = x - t
        if scale is not None:
            gain = scale.to(y.dtype)
            d = x * gain + shift.to(y.dtype) - t
        powers, g = _powers(d, o.alpha)
        totals = powers.sum(1) + o.eps
        by_row = o.reduction == "row"
        if by_row:
            g /= (totals * count).unsqueeze(1)
        own = (g.sum(0), (g * x).sum(0))
        value = totals.log().sum() if by_row else powers.sum()
        shared = torch.cat((*own, value.reshape(1)))
        dist.all_reduce(shared, group=group)
        total = shared[-1] + o.eps
        loss = shared[-1] / count if by_row else total.log()
        factor = torch.full_like(loss, o.alpha) if by_row else o.alpha / total
        if o.normalize != "none":
            mean_g, mean_gx = (shared[:-1] / count).split(width)
            g = (g - mean_g - x * mean_gx) * (rstd * gain)
        ctx.group = group
        ctx.operand = o.operand
        ctx.save_for_backward(factor, g, torch.stack(own), student, weight, scale, shift)
        return loss

    @staticmethod
    def backward(ctx, grad):
        factor, g, sums, student, weight, scale, shift = ctx.saved_tensors
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        needs = ctx.needs_input_grad[1:3]
        found = _reference_backward(grad, factor, g, student, weight, ctx.operand, *needs)
        products = (x if need else None for x, need in zip(found, needs, strict=True))
        affine = _affine_gradients(sums, grad, factor, scale, shift)
        gradients = (None, *products, None, *affine)
        return *_once(gradients, student, weight), *(None,) * len(Options._fields)
