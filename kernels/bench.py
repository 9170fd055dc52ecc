"""Time the kernels against what else is installed: eager PyTorch, torch.compile, numpy, scikit-learn, faiss, cuVS.

    python -m kernels.bench [logsum|cka|knn] [--quick] [--json FILE] [--device cpu|cuda]

Every row: median and 20 to 80 % spread of the time, share of the roofline (from copy and matrix-product rates measured
on this device in the same run), peak memory beside the input, and the error against fp64. A speed-up is printed only
where our result is right; a rival's wrong result is marked. On a CPU the peak leaves out what a first run
left in the heap.
"""

import argparse
import contextlib
import json
import platform
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from kernels import cka, knn, log_sum_loss


def measure(runs: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, dict]:
    """Median, 20th and 80th percentile in milliseconds over about `seconds` for each, and peak MB above the start's.

    The runs take turns, so that a change of the machine's load meets all of them alike. On a GPU a buffer larger than
    its L2 is written before each run, so that inputs come from memory, and the device is kept busy for a millisecond,
    so that launches are queued meanwhile and the time is the device's, as in a training step.
    """
    memory = {name: (run(), _peak(run, device))[1] for name, run in runs.items()}
    times, end = {name: [] for name in runs}, time.perf_counter() + seconds * len(runs)
    flush = torch.empty(2**26 if device.type == "cuda" else 0, dtype=torch.int32, device=device)
    rounds = 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 200):
        rounds += 1
        for name, run in runs.items():
            if device.type == "cuda":
                flush.zero_()
                torch.cuda._sleep(2**21)  # cycles
                start, stop = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                start.record()
                run()
                stop.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(stop))
            else:
                time.sleep(0.1)  # idle threads of the library before spin on a core for a while
                before = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - before))
    result = {}
    for name in runs:
        low, median, high = np.percentile(times[name], [20, 50, 80])
        result[name] = {
            "ms": median,
            "ms_20": low,
            "ms_80": high,
            "runs": rounds,
            "peak_mb": memory[name],
        }
    return result


def _peak(run, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    if not Path("/proc/self/statm").exists():
        return float("nan")
    peak, done, before = [0], threading.Event(), resident()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(0, peak[0] - before) / 1e6


def _median(run, device):
    return measure({"it": run}, device, 0.5)["it"]["ms"]


def ceilings(device: torch.device) -> dict:
    """Rates of this device as the library reaches them: copies in GB/s (read and written), products in TFLOP/s."""
    gpu = device.type == "cuda"
    a = torch.zeros((2**30 if gpu else 2**26) // 4, device=device)
    b = torch.empty_like(a)
    rates = {"copy": 2 * a.nbytes / 1e6 / _median(lambda: b.copy_(a), device)}
    size = 8192 if gpu else 1536
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(size, size, device=device, dtype=dtype)
        rates[name] = 2 * size**3 / 1e9 / _median(lambda x=x: x @ x, device)
    if gpu:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        x = torch.randn(size, size, device=device)
        rates["tf32"] = 2 * size**3 / 1e9 / _median(lambda: x @ x, device)
        torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def compare(
    kernel: str,
    shape: str,
    runs: dict,
    check: Callable,
    limit: float,
    flops: float,
    moved: float,
    rate: str,
    rates: dict,
    device: torch.device,
    seconds: float,
) -> list[dict]:
    """Time `runs` (name -> function, ours first); `check` gives the error of a result, which may be at most `limit`."""
    floor = max(flops / rates[rate] / 1e9, moved / rates["copy"] / 1e6)  # ms
    errors = {name: float(check(run())) for name, run in runs.items()}
    rows = [
        {
            "kernel": kernel,
            "shape": shape,
            "name": name,
            "error": errors[name],
            "right": errors[name] <= limit,
            **times,
            "roofline": floor / times["ms"],
        }
        for name, times in measure(runs, device, seconds).items()
    ]
    for row in rows:
        ours = rows[0]
        row["speedup_of_ours"] = (
            row["ms"] / ours["ms"] if ours["right"] and row is not ours else None
        )
        show(row)
    return rows


def show(row: dict) -> None:
    speed = "" if row["speedup_of_ours"] is None else f"{row['speedup_of_ours']:.2f}x"
    wrong = "" if row["right"] else " WRONG"
    times = (row["ms"], row["ms_20"], row["ms_80"])
    median, low, high = (f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in times)
    spread = f"{median} ({low} to {high})"
    print(
        f"| {row['kernel']} | {row['shape']} | {row['name']} | {spread} | "
        f"{100 * row['roofline']:.0f} % | {row['peak_mb']:.0f} | {row['error']:.1e}{wrong} | {speed} |",
        flush=True,
    )


# --- the three kernels ------------------------------------------------------------------------------------------------


def eager_loss(student, weight, teacher):
    """The same loss as anyone would write it."""
    norm = lambda x: torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-4)  # noqa: E731
    return ((norm(student @ weight) - norm(teacher)).abs().pow(4).sum() + 1e-5).log()


def bench_logsum(device, rates, quick, seconds):
    gpu = device.type == "cuda"
    rows = []
    sizes = {
        (True, True): (32, 8192),
        (True, False): (32, 128, 512, 1024, 8192, 16448),
        (False, True): (32,),
        (False, False): (32, 512),
    }
    for batch in sizes[gpu, quick]:
        torch.manual_seed(0)
        student = torch.randn(batch, 1024, device=device, requires_grad=True)
        weight = (torch.randn(1024, 1536, device=device) / 32).requires_grad_()
        residual = 0.1 * torch.randn(batch, 1536, device=device)
        with torch.no_grad():
            teacher = (
                torch.nn.functional.batch_norm(student @ weight, None, None, training=True)
                + residual
            )
        operand = torch.bfloat16 if gpu else torch.float32
        exact = [x.detach().to(operand).double().requires_grad_() for x in (student, weight)]
        truth = torch.autograd.grad(eager_loss(*exact, teacher.double()), exact)

        def step(loss, student=student, weight=weight, teacher=teacher):
            with torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext():
                value = loss(student, weight, teacher)
            return torch.autograd.grad(value, (student, weight))

        def error(grads, truth=truth):
            return max((a - b).norm() / b.norm() for a, b in zip(grads, truth, strict=True))

        compiled = torch.compile(eager_loss, dynamic=False)
        runs = {
            "ours": lambda step=step: step(log_sum_loss),
            "eager": lambda step=step: step(eager_loss),
            "torch.compile": lambda step=step, compiled=compiled: step(compiled),
        }
        product, width = 2 * batch * 1024 * 1536, 2 if gpu else 4
        moved = 2 * width * 1024 * 1536 + 4 * 1024 * 1536 + 2 * width * batch * (1024 + 1536)
        rows += compare(
            "logsum, forward + backward",
            f"{batch} x 1024 -> 1536",
            runs,
            error,
            0.03 if gpu else 1e-4,
            3 * product,
            moved,
            "bf16" if gpu else "fp32",
            rates,
            device,
            seconds,
        )
    return rows


def formula_cka(x, y):
    """Biased linear CKA in features, as published; numpy or torch."""
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm if isinstance(x, np.ndarray) else torch.linalg.norm
    return norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def package_cka(xs, ys):
    """Unbiased CKA of all pairs as popular packages do it: Gram matrices anew for each pair, the trace of a product."""
    n = len(xs[0])

    def hsic(k, m):
        sums = (k.sum() * m.sum()) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
        return (torch.trace(k @ m) + sums) / (n * (n - 3))

    out = torch.empty(len(xs), len(ys))
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            k, m = (x @ x.T).fill_diagonal_(0), (y @ y.T).fill_diagonal_(0)
            out[i, j] = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    return out


def bench_cka(device, rates, quick, seconds):
    gpu, rows = device.type == "cuda", []
    fast = "tf32" if gpu else "fp32"
    for n in (
        ((4537,) if quick else (2000, 4537, 7909, 277524))
        if gpu
        else ((2000,) if quick else (2000, 4537))
    ):
        torch.manual_seed(0)
        common = torch.randn(n, 64, device=device)
        x, y = (
            common @ torch.randn(64, d, device=device) / 8 + torch.randn(n, d, device=device)
            for d in (1536, 1024)
        )
        truth = formula_cka(x[:300000].double(), y.double())
        runs = {
            "ours": lambda x=x, y=y: cka([x], [y], estimator="biased")[0, 0],
            "eager": lambda x=x, y=y: formula_cka(x, y),
        }
        if not gpu:
            runs["numpy"] = lambda x=x, y=y: formula_cka(x.numpy(), y.numpy())
        flops = 2 * n * (1536 * 1024 + (1536**2 + 1024**2) / 2)
        rows += compare(
            "cka, one pair",
            f"{n} x 1536, 1024",
            runs,
            lambda value, truth=truth: abs(value - truth),
            1e-4,
            flops,
            4 * n * 2560,
            fast,
            rates,
            device,
            seconds,
        )
    n, layers, width = (4537, 20, 1024) if gpu and not quick else (600, 4, 384)
    torch.manual_seed(0)
    common = torch.randn(n, 64, device=device)
    xs, ys = (
        [
            common @ torch.randn(64, width, device=device) / 8
            + torch.randn(n, width, device=device)
            for _ in range(layers)
        ]
        for _ in range(2)
    )
    truth = package_cka(
        [x.double() - x.double().mean(0) for x in xs], [y.double() - y.double().mean(0) for y in ys]
    )
    runs = {"ours": lambda: cka(xs, ys), "each pair anew": lambda: package_cka(xs, ys)}
    flops = 2 * n * n * (2 * layers * width / 2 + layers * layers)
    return rows + compare(
        "cka, all layers",
        f"{layers} x {layers} of {n} x {width}",
        runs,
        lambda value: (value.cpu() - truth).abs().max(),
        1e-3,
        flops,
        8 * layers * n * width,
        fast,
        rates,
        device,
        seconds,
    )


def torch_knn(base, k, groups):
    """Chunked product and topk with a mask, as anyone would write it; not exact near ties."""
    norms, out = base.square().sum(1), []
    for part in torch.arange(len(base), device=base.device).split(max(1, 2**27 // len(base))):
        distance = torch.addmm(norms, base[part], base.T, alpha=-2)
        distance.masked_fill_(groups[part, None] == groups, float("inf"))
        out.append(distance.topk(k, dim=1, largest=False).indices)
    return torch.cat(out)


def _by_fold(base, groups, search):
    """Indices (N, k) from one search for each fold among the rows of the others."""
    out = [None] * len(base)
    for fold in np.unique(groups):
        others, own = np.flatnonzero(groups != fold), np.flatnonzero(groups == fold)
        for row, found in zip(own, others[search(base[others], base[own])], strict=True):
            out[row] = found
    return torch.from_numpy(np.array(out))


def knn_rivals(base, k, groups):
    """The libraries that are installed, each with one index per fold."""
    rivals, points, labels = {}, base.cpu().numpy(), groups.cpu().numpy()
    if base.device.type == "cpu":
        from sklearn.neighbors import NearestNeighbors

        rivals["scikit-learn brute, by fold"] = lambda: _by_fold(
            points,
            labels,
            lambda x, q: NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors(q)[1],
        )
    with contextlib.suppress(ImportError):  # optional rivals
        import faiss

        on_gpu = base.device.type == "cuda" and hasattr(faiss, "StandardGpuResources")
        if on_gpu or base.device.type == "cpu":

            def search(x, q):
                index = faiss.IndexFlatL2(x.shape[1])
                if on_gpu:
                    index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
                index.add(x)
                return index.search(q, k)[1]

            rivals["faiss flat, by fold"] = lambda: _by_fold(points, labels, search)
    if base.device.type == "cuda":
        with contextlib.suppress(ImportError):
            from cuvs.neighbors import brute_force

            def one_fold(fold):
                others, own = (
                    (groups != fold).nonzero().squeeze(1),
                    (groups == fold).nonzero().squeeze(1),
                )
                _, found = brute_force.search(brute_force.build(base[others]), base[own], k)
                return own, others[torch.as_tensor(found, device=base.device).long()]

            def cuvs():
                out = torch.empty(len(base), k, dtype=torch.int64, device=base.device)
                for fold in range(10):
                    own, found = one_fold(fold)
                    out[own] = found
                return out

            rivals["cuVS brute force, by fold"] = cuvs
    return rivals


def bench_plain_knn(base, k, rates, device, seconds):
    """All rows against all others on a CPU; scikit-learn needs k + 1 neighbours, each row finding itself first."""
    from sklearn.neighbors import NearestNeighbors

    points, n = base.numpy(), len(base)
    truth = knn(base.double(), k)

    def rival():
        found = (
            NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(points).kneighbors(points)[1]
        )
        return torch.from_numpy(found[:, 1:])

    runs = {"ours": lambda: knn(base, k), "scikit-learn brute": rival}
    return compare(
        "knn",
        f"{n} x {base.shape[1]}, k = {k}",
        runs,
        lambda index: (index != truth).double().mean(),
        0,
        2 * n * n * base.shape[1],
        8 * n * base.shape[1],
        "fp32",
        rates,
        device,
        seconds,
    )


def bench_knn(device, rates, quick, seconds):
    gpu, rows, k = device.type == "cuda", [], 15
    sizes = {
        (True, True): (77364,),
        (True, False): (5245, 77364, 277524),
        (False, True): (5245,),
        (False, False): (20000,),
    }
    for n, width in ((n, 50) for n in sizes[gpu, quick]):
        torch.manual_seed(0)
        base = torch.randn(n, width, device=device) * torch.linspace(3, 0.3, width, device=device)
        groups = torch.randint(10, (n,), device=device)
        sample = torch.arange(0, n, max(1, n // 300), device=device)
        truth = knn(
            base.double(), k, base[sample].double(), groups=groups, query_groups=groups[sample]
        ).cpu()
        exact = torch.cdist(
            base[sample].double(), base.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        exact[groups[sample, None] == groups] = float("inf")
        if not torch.equal(exact.topk(k, dim=1, largest=False).indices.cpu(), truth):
            raise RuntimeError(
                "the fp64 reference search disagrees with all distances in fp64; nothing is timed"
            )

        def missed(index, truth=truth, sample=sample):
            found = index.cpu()[sample.cpu()]
            return (found[:, :, None] != truth[:, None, :]).all(2).double().mean()

        if not gpu:
            rows += bench_plain_knn(base, k, rates, device, seconds)
        runs = {
            "ours": lambda base=base, groups=groups: knn(base, k, groups=groups),
            "torch mm + topk": lambda base=base, groups=groups: torch_knn(base, k, groups),
            **knn_rivals(base, k, groups),
        }
        rows += compare(
            "knn, ten folds",
            f"{n} x {width}, k = {k}",
            runs,
            missed,
            0,
            2 * n * n * width * 0.9,
            8 * n * width,
            "tf32" if gpu else "fp32",
            rates,
            device,
            seconds,
        )
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "kernel",
        nargs="?",
        choices=("logsum", "cka", "knn"),
        help="one kernel (default: all three)",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes; under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"error: --device {args.device}; no GPU is visible to PyTorch; use --device cpu",
            file=sys.stderr,
        )
        return 1
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    rates = ceilings(device)
    about = {
        "device": name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "ceilings": rates,
    }
    measured = ", ".join(
        f"{key} {value:.3g} {'GB/s' if key == 'copy' else 'TFLOP/s'}"
        for key, value in rates.items()
    )
    print(
        f"{name}, {about['threads']} threads, torch {torch.__version__}, {about['date']}; measured: {measured}\n"
    )
    print(
        "| kernel | shape | what | ms, median (20 to 80 %) | roofline | peak MB | error | ours is faster by |"
    )
    print("|---|---|---|---|---|---|---|---|")
    benches = {"logsum": bench_logsum, "cka": bench_cka, "knn": bench_knn}
    rows = []
    for kernel in [args.kernel] if args.kernel else benches:
        rows += benches[kernel](device, rates, args.quick, 0.5 if args.quick else 2.0)
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    wrong = [row for row in rows if row["name"] == "ours" and not row["right"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
