"""Time the kernels against what else is installed: eager PyTorch, torch.compile, scikit-learn, ...

    python -m kernels.bench [logsum|cka|knn] [--quick] [--json FILE] [--device cpu|cuda]

A `Case` is one problem with all who solve it, ours first; four functions make them. Every row of
the table: median and 20 to 80 % spread of the time, on a GPU peak memory beside the input, and the
error against fp64. A speed-up is printed only where our result is right; a rival's wrong result is
marked.
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
from torch import Tensor
from torch.nn.functional import batch_norm

from kernels import cka, knn, log_sum_loss
from kernels.dispatch import pinned_products


@dataclass
class Case:
    """One problem: `runs` by name, ours first; `error` of a result, right up to `limit`."""

    kernel: str
    shape: str
    runs: dict[str, Callable]
    error: Callable[[Any], Any]
    limit: float


# --- measuring ------------------------------------------------------------------------------------


def measure(runs: dict, device: torch.device, seconds: float) -> dict[str, dict]:
    """Median, 20th and 80th percentile in ms of about `seconds` each; on a GPU peak MB, too.

    The runs take turns, so that a change of the machine's load meets all of them alike. On a GPU a
    buffer larger than its L2 is written before each run, so that inputs come from memory, and the
    device is kept busy for a millisecond, so that launches are queued meanwhile and the time is the
    device's, as in a training step.
    """
    gpu = device.type == "cuda"
    result: dict[str, dict] = {}
    for name, run in runs.items():
        run()
        result[name] = {"peak_mb": _peak(run) if gpu else float("nan")}
    flush = torch.empty(2**26 if gpu else 0, dtype=torch.int32, device=device)
    times: dict[str, list] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    for rounds in range(200):
        if rounds >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name].append(_timed_on_gpu(run, flush) if gpu else _timed(run))
    for name, row in result.items():
        row["ms_20"], row["ms"], row["ms_80"] = np.percentile(times[name], [20, 50, 80]).tolist()
    return result


def _timed(run):
    time.sleep(0.1)  # idle threads of the library before spin on a core for a while
    run()  # its own threads sleep, too, and waking them takes up to 8 ms
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _timed_on_gpu(run, flush):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(2**21)  # cycles
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def _peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def compare(case: Case, device: torch.device, seconds: float) -> list[dict]:
    """Check and time every run of a case, print its lines, return its rows."""
    errors = {name: float(case.error(run())) for name, run in case.runs.items()}
    rows: list[dict] = []
    for name, times in measure(case.runs, device, seconds).items():
        row = {"kernel": case.kernel, "shape": case.shape, "name": name, **times}
        row |= {"error": errors[name], "right": errors[name] <= case.limit}
        rows.append(row)
        speed = f"{row['ms'] / rows[0]['ms']:.2f}x" if len(rows) > 1 and rows[0]["right"] else ""
        wrong = "" if row["right"] else " WRONG"
        print(
            f"| {case.kernel} | {case.shape} | {name} "
            f"| {row['ms']:,.3f} ({row['ms_20']:,.3f} to {row['ms_80']:,.3f}) "
            f"| {row['peak_mb']:.0f} | {row['error']:.1e}{wrong} | {speed} |",
            flush=True,
        )
    return rows


# --- the three kernels ----------------------------------------------------------------------------


def eager_loss(student: Tensor, weight: Tensor, teacher: Tensor):
    """The same loss as anyone would write it."""
    y = batch_norm(student @ weight, None, None, training=True, eps=1e-4)
    t = batch_norm(teacher, None, None, training=True, eps=1e-4)
    return ((y - t).abs().pow(4).sum() + 1e-5).log()


def logsum_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    gpu = device.type == "cuda"
    sizes = [32, 8192] if gpu else [32]
    if not quick:
        sizes = [32, 512, 8192, 16448] if gpu else [32, 512]
    return (loss_case(device, rows) for rows in sizes)


def loss_case(device: torch.device, rows: int) -> Case:
    gpu = device.type == "cuda"
    operand = torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    student = torch.randn(rows, 1024, device=device, requires_grad=True)
    weight = (torch.randn(1024, 1536, device=device) / 32).requires_grad_()
    y = batch_norm((student @ weight).detach(), None, None, training=True)
    teacher = y + 0.1 * torch.randn_like(y)
    exact = [x.detach().to(operand).double().requires_grad_() for x in (student, weight)]
    truth = torch.autograd.grad(eager_loss(exact[0], exact[1], teacher.double()), exact)

    def step(loss):
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            value = loss(student, weight, teacher)
        return torch.autograd.grad(value, (student, weight))

    compiled = torch.compile(eager_loss, dynamic=False)
    return Case(
        kernel="logsum, forward + backward",
        shape=f"{rows} x 1024 -> 1536",
        runs={
            "ours": lambda: step(log_sum_loss),
            "eager": lambda: step(eager_loss),
            "torch.compile": lambda: step(compiled),
        },
        error=lambda found: max(
            (a - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)
        ),
        limit=0.03 if gpu else 1e-4,
    )


def formula_cka(x, y):
    """Biased linear CKA in features, as published; numpy or torch."""
    x = x - x.mean(0)
    y = y - y.mean(0)
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


def in_tf32(function, *inputs):
    with pinned_products("tf32"):
        return function(*inputs)


def cka_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    gpu = device.type == "cuda"
    sizes = [4537] if gpu else [2000]
    if not quick:
        sizes = [2000, 4537, 277524] if gpu else [2000, 4537]
    for rows in sizes:
        yield pair_case(device, rows)
    yield layers_case(device, *((40, 24, 4537, 1024) if gpu and not quick else (12, 8, 300, 384)))


def pair_case(device: torch.device, n: int) -> Case:
    x, y = related(device, n, 1536, 1024)
    runs: dict[str, Callable] = {
        "ours": lambda: cka(x, y, estimator="biased"),
        "eager": lambda: formula_cka(x, y),
    }
    gpu = device.type == "cuda"
    if gpu:
        compiled = torch.compile(formula_cka, dynamic=False)
        runs["eager, TF32"] = lambda: in_tf32(formula_cka, x, y)
        runs["torch.compile, TF32"] = lambda: in_tf32(compiled, x, y)
    else:
        runs["numpy"] = lambda: formula_cka(x.numpy(), y.numpy())
    return Case(
        kernel="cka, one pair",
        shape=f"{n} x 1536, 1024",
        runs=runs,
        error=off_by(formula_cka(x.double(), y.double())),
        limit=1e-4,
    )


def layers_case(device: torch.device, left: int, right: int, n: int, width: int) -> Case:
    """All pairs of layers: numbers of them on both sides, rows and width."""
    gpu = device.type == "cuda"
    layers = related(device, n, *[width] * (left + right))
    xs = layers[:left]
    ys = layers[left:]
    runs: dict[str, Callable] = {
        "ours": lambda: cka(xs, ys),
        "Grams kept": lambda: gram_cka(xs, ys),
    }
    if gpu:
        runs["Grams kept, TF32"] = lambda: in_tf32(gram_cka, xs, ys)
    return Case(
        kernel="cka, all layers",
        shape=f"{left} x {right} of {n} x {width}",
        runs=runs,
        error=off_by(cka([x.double() for x in xs], [y.double() for y in ys])),
        limit=1e-3,
    )


def off_by(truth) -> Callable:
    """Function of a result: its largest difference from the truth."""
    return lambda value: (torch.as_tensor(value).cpu() - truth.cpu()).abs().max()


def related(device, n, *widths) -> list[Tensor]:
    """Feature sets with 64 directions in common."""
    torch.manual_seed(0)
    common = torch.randn(n, 64, device=device) / 8
    sets = []
    for width in widths:
        mixing, noise = (torch.randn(rows, width, device=device) for rows in (64, n))
        sets.append(common @ mixing + noise)
    return sets


def knn_data(kind: str, n: int, width: int) -> Tensor:
    """(n, width) rows: Gaussian, in 200 tight clusters, or Gaussian with a tenth all the same."""
    torch.manual_seed(0)
    x = torch.randn(n, width)
    if kind == "clusters":
        return torch.randn(200, width)[torch.randint(200, (n,))] + 0.1 * x
    x *= torch.linspace(3, 0.3, width)
    if kind == "identical rows":
        x[torch.rand(n) < 0.1] = x[0].clone()
    return x


def torch_search(base, query, k):
    """Product and topk a block of queries at a time, as anyone would write it; wrong near ties."""
    norms = base.square().sum(1)
    found = []
    for part in query.split(max(1, 2**27 // len(base))):
        found.append(torch.addmm(norms, part, base.T, alpha=-2).topk(k, largest=False).indices)
    return torch.cat(found)


def sklearn_search(base, query, k):
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(base.numpy())
    return torch.from_numpy(index.kneighbors(query.numpy())[1])


def searches(device: torch.device) -> dict[str, Callable]:
    """What is installed: name -> function of base, query and k. faiss is optional."""
    found: dict[str, Callable] = {"torch mm + topk": torch_search}
    gpu = device.type == "cuda"
    if not gpu:
        found["scikit-learn brute"] = sklearn_search
    with contextlib.suppress(ImportError, AttributeError):  # faiss may be without its GPU part
        found["faiss flat"] = faiss_on_a_gpu() if gpu else faiss_on_a_cpu()
    return found


def faiss_on_a_cpu() -> Callable:
    import faiss

    def search(base, query, k):
        flat = faiss.IndexFlatL2(base.shape[1])
        flat.add(base.numpy())
        return torch.from_numpy(flat.search(query.numpy(), k)[1])

    return search


def faiss_on_a_gpu() -> Callable:
    """Its brute force on tensors where they are, with resources made once."""
    import faiss
    import faiss.contrib.torch_utils  # teaches it what a tensor is

    resources = faiss.StandardGpuResources()
    return lambda base, query, k: faiss.knn_gpu(resources, query, base, k)[1]


def neighbours(search, base, k):
    """(N, k) by a search that finds each row itself, too."""
    found = search(base, base, k + 1)
    own = found == torch.arange(len(base), device=base.device)[:, None]
    last = own.to(torch.int8).argsort(dim=1, stable=True)  # a row itself goes to the end
    return found.gather(1, last)[:, :k]


def knn_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    gpu = device.type == "cuda"
    sizes = [77364] if gpu else [5000]
    if not quick:
        sizes = [5245, 77364, 277524] if gpu else [1000, 5000, 20000]
    for n in sizes:
        for kind in ("Gaussian", "clusters", "identical rows"):
            yield search_case(device, n, kind)


def search_case(device: torch.device, n: int, kind: str) -> Case:
    width = 50
    k = 15
    base = knn_data(kind, n, width).to(device)
    runs: dict[str, Callable] = {"ours": lambda: knn(base, k)}
    for name, search in searches(device).items():
        runs[name] = lambda search=search: neighbours(search, base, k)
    return Case(
        kernel="knn",
        shape=f"{n} x {width}, k = {k}, {kind}",
        runs=runs,
        error=missed(base, k),
        limit=0,
    )


def missed(base: Tensor, k: int) -> Callable:
    """Function of indices: share of neighbours farther than fp64 distances say, of 300 rows."""
    sample = torch.arange(0, len(base), max(1, len(base) // 300), device=base.device)
    exact = base[sample].double(), base.double()
    distance = torch.cdist(*exact, compute_mode="donot_use_mm_for_euclid_dist")
    distance[torch.arange(len(sample)), sample] = float("inf")
    truth = distance.topk(k, dim=1, largest=False).values

    def share(index):
        found = distance.gather(1, index[sample].long()).sort(dim=1).values
        return (found > truth * (1 + 1e-9)).double().mean()

    return share


CASES = {"logsum": logsum_cases, "cka": cka_cases, "knn": knn_cases}


def about(device: torch.device) -> dict:
    """What a measurement's reader has to know of the machine."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine(),
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
    facts = about(device)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print("\n| kernel | shape | what | ms, median (20 to 80 %) | peak MB | error | gain |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict] = []
    seconds = 0.5 if args.quick or device.type == "cuda" else 2.0
    for kernel in [args.kernel] if args.kernel else CASES:
        for case in CASES[kernel](device, args.quick):
            rows += compare(case, device, seconds)
            if args.json:  # after each case: who is stopped keeps what was measured
                args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    return int(any(row["name"] == "ours" and not row["right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
