"""How fast a network runs here: FLOPs counted, the matmul ceiling measured, images a second, batch
size."""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def _blank(model, count: int) -> Tensor:
    """(count, 3, S, S) of zeros on the model's device."""
    return torch.zeros(count, 3, model.input_size, model.input_size, device=model.device)


def fitting_batch_size(model) -> int:
    """Images per forward pass: 32 on a CPU.

    On a GPU a multiple of 8, at most 256, that fills 80 % of its free memory.
    """
    device = model.device
    if device.type != "cuda":
        return 32
    x = _blank(model, 8)
    with torch.inference_mode():
        for _ in range(2):  # the first call also loads libraries
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            type(model).forward(model, x)  # never the compiled one: this shape is of no use later
    each = (torch.cuda.max_memory_allocated(device) - before) / len(x)
    torch.cuda.empty_cache()
    return int(np.clip(0.8 * torch.cuda.mem_get_info(device)[0] / each // 8 * 8, 8, 256))


def flops_per_image(model) -> float:
    """Floating-point operations of one image's forward pass, counted: multiply and add are two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    x = _blank(model, 1)
    counter = FlopCounterMode(display=False)
    # The counter asks for the gradients of parameters that are given on, such as a pooling query.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        type(model).forward(model, x)
    return float(counter.get_total_flops())


@functools.lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random numbers: what a network reaches at best."""
    n = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # a training run's random numbers stay its own
    a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device))


def timed(call: Callable, device: torch.device) -> list[float]:
    """Seconds of 2 to 20 runs of `call`, the device waited for, after a warm-up; 3 s if that do."""
    cuda = device.type == "cuda"
    warm = 3 if cuda else 1  # allocation, compilation, clocks
    times: list[float] = []
    while len(times) < warm + 2 or (len(times) < warm + 20 and sum(times[warm:]) < 3):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[warm:]


def milliseconds(model, batch_size: int | None = None) -> float:
    """Median time per image of a forward pass; batches of 32 on a GPU, of 4 on a CPU by default."""
    device = model.device
    x = _blank(model, batch_size or (32 if device.type == "cuda" else 4))
    with torch.inference_mode():
        return 1e3 * float(np.median(timed(lambda: model(x), device))) / len(x)


COLUMNS = "parameters precision input batch GFLOP/image ms/image images/s TFLOP/s ceiling".split()
COLUMNS += ["MFU", "memory"]


def speed(model, batch_size: int | None = None) -> list[str]:
    """Throughput of one model on its device: the `COLUMNS` that `python -m g2l.models` prints."""
    device = model.device
    cuda = device.type == "cuda"
    batch_size = batch_size or (fitting_batch_size(model) if cuda else 4)
    flops = flops_per_image(model)
    ceiling = matmul_ceiling(device, model.dtype)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    each = milliseconds(model, batch_size)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0
    reached = 1e3 * flops / each
    return [
        f"{model.parameters_count / 1e6:,.1f} M",
        str(model.dtype).removeprefix("torch."),
        str(model.input_size),
        str(batch_size),
        f"{flops / 1e9:,.1f}",
        f"{each:.2f}",
        f"{1e3 / each:,.1f}",
        f"{reached / 1e12:.3g}",
        f"{ceiling / 1e12:.3g}",
        f"{reached / ceiling:.0%}",
        f"{peak:.1f} GiB" if cuda else "-",
    ]
