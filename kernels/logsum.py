"""Projector, batch norm and Log-Sum loss in one operator.

    y = student @ weight                      (B, Dt), fp32 accumulators that are never rounded on their way to the loss
    d = norm(y) - norm(teacher)               norm: batch norm with the statistics of this batch
    loss = log(sum |d|^alpha + eps)           over the whole batch ("batch"), or per row and then the mean ("row")

The recipe is that of Miles and Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation" (2024).

Because the loss is a scalar, the gradient at the projector's output is known in the forward pass up to one factor,
alpha / (sum + eps), and batch norm's backward is linear in it. So the forward pass leaves that gradient behind,
unscaled, and the backward pass is two matrix products and a multiplication by a scalar that never leaves the device.
Many rows on a GPU leave only the statistics behind and compute the projection a second time: less memory, more work.
"""

import math

import torch
import torch.distributed as dist

from kernels.dispatch import use_triton

NORMALIZE = ("both", "student", "student-affine", "none")
REDUCTION = ("batch", "row")
FUSED_ROWS = 256  # up to here one Triton program holds all rows of its columns
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def log_sum_loss(
    student: torch.Tensor,
    weight: torch.Tensor,
    teacher: torch.Tensor,
    *,
    alpha: float = 4.0,
    normalize: str = "both",
    reduction: str = "batch",
    eps: float = 1e-5,
    norm_eps: float = 1e-4,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Log-Sum distillation loss of `student @ weight` against `teacher`; gradients to student, weight, scale and shift.

    student    (B, Ds) CLS or token rows of the student; any strides.
    weight     (Ds, Dt) the projector, without bias (batch norm would take it out again).
    teacher    (B, Dt) rows of the frozen teacher; must not require grad.
    alpha      exponent >= 1; 4 in the paper.
    normalize  "both": batch norm without affine on projection and teacher (the cited recipe's code); "student": on the
               projection only; "student-affine": the same, then times `scale` (Dt,) plus `shift` (Dt,); "none".
    reduction  "batch": one log over rows and features; "row": one log per row, then the mean.
    eps        added to each sum before its log; norm_eps: added to the variances.
    group      process group whose ranks together form the batch: statistics and sum are reduced over it and every rank
               returns the loss of the whole. Its gradient is that of the sum of the ranks' (equal) losses, as with
               autograd's own collectives: the mean over ranks, which DDP takes, is the gradient of one process that
               sees the whole batch.

    Returns a scalar, fp32 (fp64 for fp64 inputs). Under autocast the operands of the matrix product are rounded to its
    type; accumulators, statistics and loss stay in fp32. NaN in, NaN out: nothing here waits for the device.
    """
    _check(student, weight, teacher, alpha, normalize, reduction, eps, norm_eps, scale, shift)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
        )
    operand = torch.promote_types(student.dtype, weight.dtype)
    if torch.is_autocast_enabled(student.device.type) and operand != torch.float64:
        operand = torch.get_autocast_dtype(student.device.type)
    options = (float(alpha), normalize, reduction, float(eps), float(norm_eps), operand)
    if group is not None:
        return _Synchronised.apply(student, weight, teacher, scale, shift, *options, group)
    inputs = (student, weight) if scale is None else (student, weight, scale, shift)
    need_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    run = _forward_op if torch.compiler.is_compiling() else _Eager.apply
    return run(student, weight, teacher, scale, shift, *options, need_grad)[0]


def _check(student, weight, teacher, alpha, normalize, reduction, eps, norm_eps, scale, shift):
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if reduction not in REDUCTION:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTION)}, got {reduction!r}")
    for name, value in (("scale", scale), ("shift", shift)):
        if (value is not None) != (normalize == "student-affine"):
            raise ValueError(f"{name}: needed with normalize='student-affine' and only there")
    tensors = {
        "student": student,
        "weight": weight,
        "teacher": teacher,
        "scale": scale,
        "shift": shift,
    }
    for name, tensor in tensors.items():
        if name in ("scale", "shift") and tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != student.device:
            raise ValueError(f"{name}: on {tensor.device}, but student is on {student.device}")
        if tensor.dim() != (1 if name in ("scale", "shift") else 2):
            raise ValueError(f"{name}: wrong number of dimensions, shape {tuple(tensor.shape)}")
    if student.shape[0] == 0 or student.shape[1] == 0:
        raise ValueError(f"student: empty, shape {tuple(student.shape)}")
    if weight.shape[0] != student.shape[1] or weight.shape[1] == 0:
        raise ValueError(
            f"weight: expected shape ({student.shape[1]}, features), got {tuple(weight.shape)}"
        )
    if teacher.shape[0] != student.shape[0] or teacher.shape[1] != weight.shape[1]:
        raise ValueError(
            f"teacher: expected {student.shape[0]} rows of {weight.shape[1]}, got {tuple(teacher.shape)}"
        )
    if normalize != "none" and student.shape[0] < 2:
        raise ValueError("student: batch norm needs at least 2 rows")
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None and value.shape[0] != weight.shape[1]:
            raise ValueError(f"{name}: expected {weight.shape[1]} values, got {value.shape[0]}")
    if teacher.requires_grad:
        raise ValueError(
            "teacher: requires grad, but no gradient flows to it; pass teacher.detach()"
        )
    for name, value, least in (("alpha", alpha, 1), ("eps", eps, 0), ("norm_eps", norm_eps, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not least <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least {least}, got {value}")


# --- plain PyTorch: the reference, and what runs on a CPU -----------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _project(student, weight, operand):
    """Product of operands rounded to `operand` with fp32 (fp64) accumulators and result, whatever autocast says."""
    a, b = student.to(operand).to(_wide(operand)), weight.to(operand).to(_wide(operand))
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b)


def _powers(d, alpha):
    """(|d|^alpha, its derivative without the factor alpha); multiplications where alpha is 4, pow being much slower."""
    if alpha == 4:
        square = d * d
        return square * square, square * d
    size = d.abs()
    return size.pow(alpha), size.pow(alpha - 1) * d.sign()


def _reference(
    student,
    weight,
    teacher,
    scale,
    shift,
    alpha,
    normalize,
    reduction,
    eps,
    norm_eps,
    operand,
    need_grad,
):
    """The forward operator in PyTorch: loss, factor, unscaled gradients of y (B, Dt) and of shift, scale (2, Dt)."""
    wide = _wide(operand)
    y = _project(student, weight, operand)
    t = teacher.to(wide)
    if normalize == "none":
        d = y - t
    else:
        affine = (None, None) if scale is None else (scale.to(wide), shift.to(wide))
        d, mean, rstd = torch.native_batch_norm(y, *affine, None, None, True, 0.0, norm_eps)
        if normalize == "both":
            t = torch.native_batch_norm(t, None, None, None, None, True, 0.0, norm_eps)[0]
        d -= t
    powers, g = _powers(d, alpha)
    if reduction == "batch":
        total = powers.sum() + eps
        loss, factor = total.log(), alpha / total
    else:
        totals = powers.sum(1) + eps
        loss, factor = totals.log().mean(), torch.full_like(totals[0], alpha)
        g /= (totals * totals.shape[0]).unsqueeze(1)
    if not need_grad:
        return loss, factor, y.new_empty(0, y.shape[1]), y.new_empty(0, y.shape[1])
    if normalize == "none":
        return loss, factor, g, y.new_empty(0, y.shape[1])
    mask = [True, scale is not None, scale is not None]
    grad_y, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
        g, y, affine[0], None, None, mean, rstd, True, norm_eps, mask
    )
    sums = y.new_empty(0, y.shape[1]) if scale is None else torch.stack((d_shift, d_scale))
    return loss, factor, grad_y, sums


def _reference_backward(grad, factor, grad_y, student, weight, operand, need_student, need_weight):
    wide, coefficient = grad_y.dtype, grad * factor
    d_student, d_weight = student.new_empty(0), weight.new_empty(0)
    scaled = grad_y * coefficient
    with torch.autocast(grad_y.device.type, enabled=False):
        if need_student:
            d_student = torch.mm(scaled, weight.to(operand).to(wide).T).to(student.dtype)
        if need_weight:
            d_weight = torch.mm(student.to(operand).to(wide).T, scaled).to(weight.dtype)
    return d_student, d_weight


# --- operators ------------------------------------------------------------------------------------------------------
# Opaque on purpose: torch.compile takes them whole, also without a GPU, where traceable Triton operators fail.


def _recomputes(student, reduction) -> bool:
    """Whether the backward pass projects again: many rows, or a scale per row, in Triton."""
    return use_triton(student.device) and (student.shape[0] > FUSED_ROWS or reduction == "row")


def _takes_triton(student, operand) -> bool:
    return operand != torch.float64 and use_triton(
        student.device
    )  # Triton has no useful fp64 product


def _forward(
    student: torch.Tensor,
    weight: torch.Tensor,
    teacher: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    alpha: float,
    normalize: str,
    reduction: str,
    eps: float,
    norm_eps: float,
    operand: torch.dtype,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss, factor, grad_y (B, Dt), columns (0, 2 or 6, Dt), rows (B,); the last three empty where not needed."""
    options = (alpha, normalize, reduction, eps, norm_eps, operand, need_grad)
    if not _takes_triton(student, operand):
        loss, factor, grad_y, columns = _reference(student, weight, teacher, scale, shift, *options)
        return loss, factor, grad_y, columns, loss.new_empty(0)
    from kernels import logsum_triton

    run = (
        logsum_triton.tiled_forward
        if _recomputes(student, reduction)
        else logsum_triton.fused_forward
    )
    return run(student, weight, teacher, scale, shift, *options)


_forward_op = torch.library.custom_op("g2l::log_sum_forward", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    student,
    weight,
    teacher,
    scale,
    shift,
    alpha,
    normalize,
    reduction,
    eps,
    norm_eps,
    operand,
    need_grad,
):
    rows, features = teacher.shape
    loss = student.new_empty((), dtype=_wide(operand))
    tiled = _takes_triton(student, operand) and _recomputes(student, reduction)
    grad_rows = rows if need_grad and not tiled else 0
    columns = (6 if tiled else 2 if scale is not None else 0) if need_grad else 0
    weights = rows if need_grad and tiled and reduction == "row" else 0
    return (
        loss,
        torch.empty_like(loss),
        loss.new_empty(grad_rows, features),
        loss.new_empty(columns, features),
        loss.new_empty(weights),
    )


def _backward(
    grad: torch.Tensor,
    factor: torch.Tensor,
    grad_y: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    student: torch.Tensor,
    weight: torch.Tensor,
    teacher: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    alpha: float,
    normalize: str,
    operand: torch.dtype,
    need_student: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of student and weight, each empty where not needed."""
    if not _takes_triton(student, operand):
        return _reference_backward(
            grad, factor, grad_y, student, weight, operand, need_student, need_weight
        )
    from kernels import logsum_triton

    if grad_y.shape[0]:
        return logsum_triton.fused_backward(
            grad, factor, grad_y, student, weight, operand, need_student, need_weight
        )
    return logsum_triton.tiled_backward(
        grad,
        factor,
        columns,
        rows,
        student,
        weight,
        teacher,
        scale,
        shift,
        alpha,
        normalize,
        operand,
        need_student,
        need_weight,
    )


_backward_op = torch.library.custom_op("g2l::log_sum_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(
    grad,
    factor,
    grad_y,
    columns,
    rows,
    student,
    weight,
    teacher,
    scale,
    shift,
    alpha,
    normalize,
    operand,
    need_student,
    need_weight,
):
    return (
        student.new_empty(student.shape if need_student else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _save(ctx, inputs, output):
    student, weight, teacher, scale, shift, alpha, normalize, _, _, _, operand, need_grad = inputs
    _, factor, grad_y, columns, rows = output
    ctx.options = (alpha, normalize, operand)
    ctx.need_grad = need_grad
    ctx.set_materialize_grads(False)  # else autograd would fill a zero gradient as large as grad_y
    ctx.save_for_backward(factor, grad_y, columns, rows, student, weight, teacher, scale, shift)


def _gradients(ctx, backward, grad):
    factor, grad_y, columns, rows, student, weight, teacher, scale, shift = ctx.saved_tensors
    none = (None,) * 12
    if grad is None:
        return none
    if not ctx.need_grad:
        raise RuntimeError("the forward pass was told that no gradient is needed")
    need_student, need_weight = ctx.needs_input_grad[:2]
    d_student, d_weight = backward(
        grad,
        factor,
        grad_y,
        columns,
        rows,
        student,
        weight,
        teacher,
        scale,
        shift,
        *ctx.options,
        need_student,
        need_weight,
    )
    d_scale = d_shift = None
    if scale is not None:
        d_shift, d_scale = (columns[-2:] * (grad * factor)).to(scale.dtype)
        d_shift = d_shift.to(shift.dtype)
    return (
        d_student if need_student else None,
        d_weight if need_weight else None,
        None,
        d_scale,
        d_shift,
        *none[5:],
    )


_forward_op.register_autograd(
    lambda ctx, grad, *_: _gradients(ctx, _backward_op, grad), setup_context=_save
)


def _refuse_graph():
    if torch.is_grad_enabled():
        raise RuntimeError(
            "log_sum_loss has no second derivative: call backward or grad without create_graph=True"
        )


class _Eager(torch.autograd.Function):
    """The same without the dispatcher, for eager code: an operator's first call imports Dynamo, which takes seconds."""

    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad, *_):
        _refuse_graph()
        return _gradients(ctx, _backward, grad)


# --- one batch over several processes ---------------------------------------------------------------------------------


class _Synchronised(torch.autograd.Function):
    """The same loss with statistics and sum over a process group, in PyTorch: three reductions forward, one back."""

    @staticmethod
    def forward(ctx, student, weight, teacher, scale, shift, *options):
        alpha, normalize, reduction, eps, norm_eps, operand, group = options
        wide = _wide(operand)
        y = _project(student, weight, operand)
        t = teacher.to(wide)
        width = y.shape[1]
        sums = torch.cat((y.sum(0), t.sum(0), y.new_tensor([y.shape[0]])))
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        xhat = y
        if normalize != "none":
            mean = sums[:-1] / count
            centred = torch.cat((y, t), 1) - mean
            squares = centred.square().sum(0)
            dist.all_reduce(squares, group=group)
            rstd = (squares / count + norm_eps).rsqrt()
            xhat, that = (centred * rstd).split(width, 1)
            rstd = rstd[:width]
            t = that if normalize == "both" else t
        wide_scale = scale.to(wide) if scale is not None else None
        d = xhat - t if scale is None else xhat * wide_scale + shift.to(wide) - t
        powers, g = _powers(d, alpha)
        totals = powers.sum(1) + eps
        if reduction == "row":
            g /= (totals * count).unsqueeze(1)
        local = (g.sum(0), (g * xhat).sum(0))
        value = powers.sum() if reduction == "batch" else totals.log().sum()
        shared = torch.cat((*local, value.reshape(1)))
        dist.all_reduce(shared, group=group)
        loss = (shared[-1] + eps).log() if reduction == "batch" else shared[-1] / count
        factor = (
            alpha / (shared[-1] + eps) if reduction == "batch" else torch.full_like(loss, alpha)
        )
        if normalize != "none":
            mean_g, mean_gx = (shared[:-1] / count).split(width)
            g = (g - mean_g - xhat * mean_gx) * (rstd if scale is None else rstd * wide_scale)
        ctx.group, ctx.operand = group, operand
        ctx.save_for_backward(factor, g, *local, student, weight, scale, shift)
        return loss

    @staticmethod
    def backward(ctx, grad):
        _refuse_graph()
        factor, g, d_shift, d_scale, student, weight, scale, shift = ctx.saved_tensors
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        need_student, need_weight = ctx.needs_input_grad[:2]
        d_student, d_weight = _reference_backward(
            grad, factor, g, student, weight, ctx.operand, need_student, need_weight
        )
        d_scale = (d_scale * grad * factor).to(scale.dtype) if scale is not None else None
        d_shift = (d_shift * grad * factor).to(shift.dtype) if shift is not None else None
        return (
            d_student if need_student else None,
            d_weight if need_weight else None,
            None,
            d_scale,
            d_shift,
            *(None,) * 7,
        )
