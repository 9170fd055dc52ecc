"""Projector, batch norm and Log-Sum loss in one operator.

    y = student @ weight                      (B, Dt), fp32 accumulators that are never rounded on their way to the loss
    d = norm(y) - norm(teacher)               norm: batch norm with the statistics of this batch
    loss = log(sum |d|^alpha + eps)           over the whole batch ("batch"), or per row and then the mean ("row")

The recipe is that of Miles and Mikolajczyk, "Understanding the role of the projector in knowledge distillation" (AAAI 2024).

Because the loss is a scalar, the gradient at the projector's output is known in the forward pass up to one factor,
alpha / (sum + eps), and batch norm's backward is linear in it. So the forward pass leaves that gradient behind unscaled and
the backward pass is two matrix products and a multiplication by a scalar that never leaves the device.
"""

import torch
import torch.distributed as dist

NORMALIZE = ("both", "student", "student-affine", "none")
REDUCTION = ("batch", "row")
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
    """Log-Sum distillation loss of `student @ weight` against `teacher`, differentiable in student, weight, scale, shift.

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
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    device = student.device.type
    operand = torch.promote_types(student.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and operand != torch.float64:
        operand = torch.get_autocast_dtype(device)
    return _plain(student.to(operand), weight.to(operand), teacher, scale, shift, alpha, normalize, reduction, eps, norm_eps)


def _check(student, weight, teacher, alpha, normalize, reduction, eps, norm_eps, scale, shift):
    tensors = {"student": student, "weight": weight, "teacher": teacher}
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if reduction not in REDUCTION:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTION)}, got {reduction!r}")
    if (normalize == "student-affine") != (scale is not None and shift is not None) or (scale is None) != (shift is None):
        raise ValueError("scale, shift: both are needed with normalize='student-affine', neither otherwise")
    if scale is not None:
        tensors |= {"scale": scale, "shift": shift}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != student.device:
            raise ValueError(f"{name}: on {tensor.device}, but student is on {student.device}")
        if tensor.dim() != (1 if name in ("scale", "shift") else 2):
            raise ValueError(f"{name}: wrong number of dimensions, shape {tuple(tensor.shape)}")
    if student.shape[1] != weight.shape[0]:
        raise ValueError(f"weight: expected {student.shape[1]} rows, one for each student feature, got {weight.shape[0]}")
    if teacher.shape != (student.shape[0], weight.shape[1]):
        expected = (student.shape[0], weight.shape[1])
        raise ValueError(f"teacher: expected shape {expected}, got {tuple(teacher.shape)}")
    if 0 in student.shape or 0 in weight.shape:
        raise ValueError(f"student: empty batch or features, shapes {tuple(student.shape)} and {tuple(weight.shape)}")
    if normalize != "none" and student.shape[0] < 2:
        raise ValueError("student: batch norm needs at least 2 rows")
    for name in ("scale", "shift"):
        if name in tensors and tensors[name].shape[0] != weight.shape[1]:
            raise ValueError(f"{name}: expected {weight.shape[1]} values, got {tensors[name].shape[0]}")
    if teacher.requires_grad:
        raise ValueError("teacher: requires grad, but no gradient flows to it; pass teacher.detach()")
    if not alpha >= 1:
        raise ValueError(f"alpha: expected a number of at least 1, got {alpha}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if not norm_eps >= 0:
        raise ValueError(f"norm_eps: expected a number of at least 0, got {norm_eps}")


def _plain(student, weight, teacher, scale, shift, alpha, normalize, reduction, eps, norm_eps):
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        y, t = student.to(exact) @ weight.to(exact), teacher.to(exact)
        if normalize != "none":
            y = torch.nn.functional.batch_norm(y, None, None, scale, shift, True, 0.0, norm_eps)
        if normalize == "both":
            t = torch.nn.functional.batch_norm(t, None, None, None, None, True, 0.0, norm_eps)
        powers = (y - t).abs().pow(alpha)
        if reduction == "batch":
            return (powers.sum() + eps).log()
        return (powers.sum(1) + eps).log().mean()
