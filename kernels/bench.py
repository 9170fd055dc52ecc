"""Time the kernels against what else is installed: eager PyTorch, torch.compile, scikit-learn, ...

    python -m kernels.bench [logsum|cka|knn] [--quick] [--json FILE] [--device cpu|cuda]

A `Case` is one problem with all who solve it, ours first; three functions make them. Every row of
the table: median and 20 to 80 % spread of the time, share of the roofline (from copy and product
rates measured on this device in the same run), peak memory beside the input, and the error against
fp64. A speed-up is printed only where our result is right; a rival's wrong result is marked.
"""

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels import cka, knn, log_sum_loss
from kernels.dispatch import pinned_products


@dataclass
class Case:
    """One problem: `runs` by name, ours first; `error` of a result, right up to `limit`.

    flops and moved (bytes from and to memory) give the floor, at the measured rate named `rate`.
    """

    kernel: str
    shape: str
    runs: dict[str, Callable]
    error: Callable[[Any], Any]
    limit: float
    flops: float
    moved: float
    rate: str


# --- measuring ------------------------------------------------------------------------------------


def measure(runs: dict, device: torch.device, seconds: float) -> dict[str, dict]:
    """Median, 20th and 80th percentile in ms of about `seconds` each; peak MB over the start's.

    The runs take turns, so that a change of the machine's load meets all of them alike. On a GPU a
    buffer larger than its L2 is written before each run, so that inputs come from memory, and the
    device is kept busy for a millisecond, so that launches are queued meanwhile and the time is the
    device's, as in a training step; `host_ms` is how long the host took to launch.
    """
    memory = {}
    for name, run in runs.items():
        run()
        memory[name] = _peak(run, device)
    gpu = device.type == "cuda"
    flush = torch.empty(2**26 if gpu else 0, dtype=torch.int32, device=device)
    times: dict[str, list] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    for rounds in range(200):
        if rounds >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name].append(_timed_on_gpu(run, flush) if gpu else _timed(run))
    result = {}
    for name in runs:
        device_ms, host_ms = zip(*times[name], strict=True)
        low, median, high = np.percentile(device_ms, [20, 50, 80]).tolist()
        result[name] = {"ms": median, "ms_20": low, "ms_80": high, "peak_mb": memory[name]}
        result[name]["host_ms"] = float(np.median(host_ms))
    return result


def _timed(run):
    time.sleep(0.1)  # idle threads of the library before spin on a core for a while
    start = time.perf_counter()
    run()
    took = 1e3 * (time.perf_counter() - start)
    return took, took


def _timed_on_gpu(run, flush):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(2**21)  # cycles
    start.record()
    before = time.perf_counter()
    run()
    host = time.perf_counter() - before
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop), 1e3 * host


def _peak(run, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():  # not Linux
        return float("nan")
    reset.write_text("5")  # the peak of resident memory is that of now
    before = _resident("VmRSS")
    run()
    return max(0.0, _resident("VmHWM") - before) / 1e3


def _resident(field):
    """Kilobytes, by the kernel's account of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def ceilings(device: torch.device) -> dict:
    """Rates as the library reaches them: copies in GB/s (read and written), products in TFLOP/s."""
    gpu = device.type == "cuda"
    a = torch.zeros((2**30 if gpu else 2**26) // 4, device=device)
    b = torch.empty_like(a)
    rates = {"copy": 2 * a.nbytes / 1e6 / _median(lambda: b.copy_(a), device)}
    size = 8192 if gpu else 1536
    x = torch.randn(size, size, device=device)
    half = x.bfloat16()
    for name, operand in (("fp32", x), ("tf32", x), ("bf16", half)):
        with pinned_products("tf32" if name == "tf32" else "ieee"):
            took = _median(lambda operand=operand: operand @ operand, device)
        rates[name] = 2 * size**3 / 1e9 / took
    return rates


def _median(run, device):
    return measure({"it": run}, device, 0.3)["it"]["ms"]


def compare(case: Case, rates: dict, device: torch.device, seconds: float) -> list[dict]:
    """Check and time every run of a case, print its lines, return its rows."""
    floor = max(case.flops / rates[case.rate] / 1e9, case.moved / rates["copy"] / 1e6)  # ms
    errors = {name: float(case.error(run())) for name, run in case.runs.items()}
    rows: list[dict] = []
    for name, times in measure(case.runs, device, seconds).items():
        row = {"kernel": case.kernel, "shape": case.shape, "name": name, **times}
        row |= {"error": errors[name], "right": errors[name] <= case.limit}
        row |= {"roofline": floor / times["ms"], "floor_ms": floor, "speedup_of_ours": None}
        rows.append(row)
        if len(rows) > 1 and rows[0]["right"]:
            row["speedup_of_ours"] = row["ms"] / rows[0]["ms"]
        show(row)
    return rows


def show(row: dict) -> None:
    speed = "" if row["speedup_of_ours"] is None else f"{row['speedup_of_ours']:.2f}x"
    wrong = "" if row["right"] else " WRONG"
    times = []
    for value in (row["ms"], row["ms_20"], row["ms_80"]):
        times.append(f"{value:.3g}" if value < 100 else f"{value:,.0f}")
    spread = f"{times[0]} ({times[1]} to {times[2]})"
    print(
        f"| {row['kernel']} | {row['shape']} | {row['name']} | {spread} "
        f"| {100 * row['roofline']:.0f} % | {row['peak_mb']:.0f} | {row['error']:.1e}{wrong} "
        f"| {speed} |",
        flush=True,
    )


# --- the three kernels ----------------------------------------------------------------------------


def eager_loss(student: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor):
    """The same loss as anyone would write it."""
    y = torch.nn.functional.batch_norm(student @ weight, None, None, training=True, eps=1e-4)
    t = torch.nn.functional.batch_norm(teacher, None, None, training=True, eps=1e-4)
    return ((y - t).abs().pow(4).sum() + 1e-5).log()


def logsum_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    gpu = device.type == "cuda"
    sizes = [32, 8192] if gpu else [32]
    if not quick:
        sizes = [32, 128, 512, 1024, 8192, 16448] if gpu else [32, 512]
    operand = torch.bfloat16 if gpu else torch.float32
    for batch in sizes:
        torch.manual_seed(0)
        student = torch.randn(batch, 1024, device=device, requires_grad=True)
        weight = (torch.randn(1024, 1536, device=device) / 32).requires_grad_()
        y = torch.nn.functional.batch_norm((student @ weight).detach(), None, None, training=True)
        teacher = y + 0.1 * torch.randn_like(y)
        exact = [x.detach().to(operand).double().requires_grad_() for x in (student, weight)]
        loss = eager_loss(exact[0], exact[1], teacher.double())
        truth = torch.autograd.grad(loss, exact)

        def step(loss, inputs=(student, weight), teacher=teacher):
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                value = loss(*inputs, teacher)
            return torch.autograd.grad(value, inputs)

        def error(grads, truth=truth):
            return max((a - b).norm() / b.norm() for a, b in zip(grads, truth, strict=True))

        rivals: dict[str, Callable] = {
            "ours": log_sum_loss,
            "eager": eager_loss,
            "torch.compile": torch.compile(eager_loss, dynamic=False),
        }
        runs: dict[str, Callable] = {}
        for name, function in rivals.items():
            runs[name] = lambda step=step, function=function: step(function)
        width = operand.itemsize
        yield Case(
            kernel="logsum, forward + backward",
            shape=f"{batch} x 1024 -> 1536",
            runs=runs,
            error=error,
            limit=0.03 if gpu else 1e-4,
            flops=3 * 2 * batch * 1024 * 1536,
            moved=(2 * width + 4) * 1024 * 1536 + 2 * width * batch * (1024 + 1536),
            rate="bf16" if gpu else "fp32",
        )


def formula_cka(x, y):
    """Biased linear CKA in features, as published; numpy or torch."""
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm if isinstance(x, np.ndarray) else torch.linalg.norm
    return norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def gram_cka(xs, ys):
    """Unbiased CKA of all pairs with every Gram matrix computed once and kept."""
    n = len(xs[0])
    grams = []
    for x in (*xs, *ys):
        x = x - x.mean(0)
        grams.append((x @ x.T).fill_diagonal_(0))
    sums = torch.stack([gram.sum(1) for gram in grams]).double()
    flat = torch.stack(grams).flatten(1)
    total = sums.sum(1)
    hsic = (flat @ flat.T).double() + torch.outer(total, total) / ((n - 1) * (n - 2))
    hsic -= 2 / (n - 2) * (sums @ sums.T)
    own = hsic.diagonal().sqrt()
    return (hsic / own / own[:, None])[: len(xs), len(xs) :]


def off_by(truth) -> Callable:
    """Function of a result: its largest difference from the truth."""
    return lambda value: (torch.as_tensor(value).cpu() - truth.cpu()).abs().max()


def in_tf32(function, *inputs):
    with pinned_products("tf32"):
        return function(*inputs)


def cka_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    gpu = device.type == "cuda"
    sizes = [4537] if gpu else [2000]
    if not quick:
        sizes = [2000, 4537, 7909, 277524] if gpu else [2000, 4537]
    for n in sizes:
        torch.manual_seed(0)
        common = torch.randn(n, 64, device=device)
        x, y = (_related(common, width) for width in (1536, 1024))
        runs: dict[str, Callable] = {
            "ours": lambda x=x, y=y: cka(x, y, estimator="biased"),
            "eager": lambda x=x, y=y: formula_cka(x, y),
        }
        if gpu:
            compiled = torch.compile(formula_cka, dynamic=False)
            runs["eager, TF32"] = lambda x=x, y=y: in_tf32(formula_cka, x, y)
            runs["torch.compile, TF32"] = lambda x=x, y=y, f=compiled: in_tf32(f, x, y)
        else:
            runs["numpy"] = lambda x=x, y=y: formula_cka(x.numpy(), y.numpy())
        truth = formula_cka(x.double(), y.double())
        yield Case(
            kernel="cka, one pair",
            shape=f"{n} x 1536, 1024",
            runs=runs,
            error=off_by(truth),
            limit=1e-4,
            flops=2 * n * (1536 * 1024 + (1536**2 + 1024**2) / 2),
            moved=4 * n * 2560,
            rate="tf32" if gpu else "fp32",
        )
    yield layers_case(device, (40, 24, 4537, 1024) if gpu and not quick else (12, 8, 300, 384))


def layers_case(device: torch.device, size: tuple[int, int, int, int]) -> Case:
    """All pairs of layers: numbers of them on both sides, rows and width."""
    left, right, n, width = size
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    common = torch.randn(n, 64, device=device)
    layers = [_related(common, width) for _ in range(left + right)]
    xs, ys = layers[:left], layers[left:]
    runs: dict[str, Callable] = {
        "ours": lambda: cka(xs, ys),
        "Grams kept": lambda: gram_cka(xs, ys),
    }
    if gpu:
        runs["Grams kept, TF32"] = lambda: in_tf32(gram_cka, xs, ys)
    truth = cka([x.double() for x in xs], [y.double() for y in ys])
    return Case(
        kernel="cka, all layers",
        shape=f"{left} x {right} of {n} x {width}",
        runs=runs,
        error=off_by(truth),
        limit=1e-3,
        flops=n * n * ((left + right) * width + left * right),
        moved=4 * n * width * (left + right),
        rate="tf32" if gpu else "fp32",
    )


def _related(common, width):
    mixing = torch.randn(common.shape[1], width, device=common.device) / 8
    return common @ mixing + torch.randn(len(common), width, device=common.device)


def knn_data(kind: str, n: int, width: int) -> torch.Tensor:
    """(n, width) rows: Gaussian, in 200 tight clusters, or Gaussian with a tenth all the same."""
    torch.manual_seed(0)
    x = torch.randn(n, width) * torch.linspace(3, 0.3, width)
    if kind == "clusters":
        return torch.randn(200, width)[torch.randint(200, (n,))] + 0.1 * torch.randn(n, width)
    if kind == "identical rows":
        x[torch.rand(n) < 0.1] = x[0].clone()
    return x


def torch_search(base, query, k):
    """Product and topk a block of queries at a time, as anyone would write it; wrong near ties."""
    norms, found = base.square().sum(1), []
    for part in query.split(max(1, 2**27 // len(base))):
        found.append(torch.addmm(norms, part, base.T, alpha=-2).topk(k, largest=False).indices)
    return torch.cat(found)


def sklearn_search(base, query, k):
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(base.numpy())
    return torch.from_numpy(index.kneighbors(query.numpy())[1])


def searches(device: torch.device) -> dict[str, Callable]:
    """What is installed: name -> function of base, query and k. faiss and cuVS are optional."""
    found: dict[str, Callable] = {"torch mm + topk": torch_search}
    if device.type == "cpu":
        found["scikit-learn brute"] = sklearn_search
    with contextlib.suppress(ImportError):
        import faiss

        on_gpu = device.type == "cuda"
        resources = (
            faiss.StandardGpuResources() if on_gpu and hasattr(faiss, "GpuIndexFlatL2") else None
        )

        def faiss_search(base, query, k):
            width = base.shape[1]
            flat = faiss.GpuIndexFlatL2(resources, width) if on_gpu else faiss.IndexFlatL2(width)
            flat.add(base.cpu().numpy())
            return torch.from_numpy(flat.search(query.cpu().numpy(), k)[1]).to(device)

        if resources is not None or not on_gpu:
            found["faiss flat"] = faiss_search
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from cuvs.neighbors import brute_force

            def cuvs_search(base, query, k):
                index = brute_force.search(brute_force.build(base), query, k)[1]
                return torch.as_tensor(index, device=device).long()

            found["cuVS brute force"] = cuvs_search
    return found


def neighbours(search, base, k, groups=None):
    """(N, k) by a search that knows no groups: all rows at once, or each group among the others."""
    if groups is None:
        found = search(base, base, k + 1)
        own = found == torch.arange(len(base), device=base.device)[:, None]
        last = own.to(torch.int8).argsort(dim=1, stable=True)  # a row itself goes to the end
        return found.gather(1, last)[:, :k]
    out = torch.empty(len(base), k, dtype=torch.int64, device=base.device)
    for group in groups.unique():
        others, own = (groups != group).nonzero()[:, 0], (groups == group).nonzero()[:, 0]
        out[own] = others[search(base[others], base[own], k)]
    return out


def knn_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    gpu, width, k = device.type == "cuda", 50, 15
    sizes = [77364] if gpu else [5000]
    if not quick:
        sizes = [5245, 77364, 277524] if gpu else [1000, 5000, 20000]
    for n in sizes:
        for kind in ("Gaussian", "clusters", "identical rows", "ten folds"):
            base = knn_data(kind, n, width).to(device)
            groups = torch.randint(10, (n,), device=device) if kind == "ten folds" else None
            runs: dict[str, Callable] = {
                "ours": lambda base=base, groups=groups: knn(base, k, groups=groups)
            }
            for name, search in searches(device).items():
                runs[name] = lambda s=search, b=base, g=groups: neighbours(s, b, k, g)
            yield Case(
                kernel="knn",
                shape=f"{n} x {width}, k = {k}, {kind}",
                runs=runs,
                error=_missed(base, k, groups),
                limit=0,
                flops=2 * n * n * width,
                moved=8 * n * width,
                rate="tf32" if gpu else "fp32",
            )


def _missed(base, k, groups):
    """Function of indices: share of neighbours farther than fp64 distances say, of 300 rows."""
    sample = torch.arange(0, len(base), max(1, len(base) // 300), device=base.device)
    exact = base[sample].double(), base.double()
    distance = torch.cdist(*exact, compute_mode="donot_use_mm_for_euclid_dist")
    distance[torch.arange(len(sample)), sample] = float("inf")
    if groups is not None:
        distance[groups[sample, None] == groups] = float("inf")
    truth = distance.topk(k, dim=1, largest=False).values

    def missed(index):
        found = distance.gather(1, index[sample].long()).sort(dim=1).values
        return (found > truth * (1 + 1e-9)).double().mean()

    return missed


CASES = {"logsum": logsum_cases, "cka": cka_cases, "knn": knn_cases}


def about(device: torch.device) -> dict:
    """What a measurement's reader has to know of the machine."""
    name = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernel", nargs="?", choices=CASES, help="one kernel (default: all three)")
    parser.add_argument("--quick", action="store_true", help="small shapes; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no GPU is visible to PyTorch; use --device cpu", file=sys.stderr)
        return 1
    facts = {**about(device), "ceilings": ceilings(device)}
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(
        "\n| kernel | shape | what | ms, median (20 to 80 %) | roofline | peak MB | error | gain |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict] = []
    seconds = 0.5 if args.quick or device.type == "cuda" else 2.0
    for kernel in [args.kernel] if args.kernel else CASES:
        for case in CASES[kernel](device, args.quick):
            rows += compare(case, facts["ceilings"], device, seconds)
            if args.json:  # after each case: who is stopped keeps what was measured
                args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    return int(any(row["name"] == "ours" and not row["right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
