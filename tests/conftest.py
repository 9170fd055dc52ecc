"""What all tests share: the repository root, real inputs where present, and ways to run a script as
a user does."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Tests run several at a time; one thread each keeps them from treading on one another.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
_shared = ROOT.parent / "shared" / "data"
SHARED = (
    _shared if _shared.is_dir() else None
)  # real slides and tables; tests that need them skip without


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, so that no worker is left alone with one at the end.

    What is nightly is slow as well, since `-m "not slow"` takes the place of the option in
    pyproject.toml that leaves nightly tests out.
    """
    items.sort(key=is_short)
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")


def is_short(item: pytest.Item) -> bool:
    return item.get_closest_marker("long") is None


def run(
    script: str, *args, timeout: float = 300, env: dict | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """Run a script, or a module of g2l, from the repository root; the finished process, output as
    text."""
    where = ["-m", script] if script.startswith("g2l.") else [str(ROOT / script)]
    command = [sys.executable, *where, *map(str, args)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
        **kwargs,
    )


def torchrun(
    processes: int,
    script: str,
    *args,
    timeout: float = 300,
    env: dict | None = None,
    options: tuple = (),
) -> subprocess.CompletedProcess:
    """Run a script under real torchrun on this machine (gloo on CPU); `options` go to torchrun
    itself."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *map(str, options),
        str(ROOT / script),
        *map(str, args),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """One sound slide as bytes: tests copy it under many names."""
    from synthetic import section, write_slide

    path = write_slide(tmp_path_factory.mktemp("sound") / "a.svs", section(512, 512), tile_size=128)
    return path.read_bytes()


@pytest.fixture
def one_rank(monkeypatch):
    """This process as torchrun would start it for a job of one. A script must have left the job
    when it returns: gloo's threads outlive it otherwise, and an exit in six or so aborts with
    'terminate called'."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    joined = []
    join = torch.distributed.init_process_group
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda *args, **limits: (joined.append(1), join(*args, **limits)),
    )
    yield
    left = not torch.distributed.is_initialized()
    if not left:
        torch.distributed.destroy_process_group()
    assert joined and left


@pytest.fixture
def tiny(monkeypatch):
    """A registry entry small enough to run: a SwiGLU ViT with registers, as H-optimus and Hibou
    are."""
    from networks import TINY

    from g2l.registry import REGISTRY

    entry = dataclasses.replace(REGISTRY["hibou-l"], args=TINY, hub="lab/tiny", dim=32)
    monkeypatch.setitem(REGISTRY, "tiny", entry)
    return "tiny"


@pytest.fixture(scope="module")
def vit():
    from g2l.models import load_model

    return load_model("timm:test_vit", "random", input_size=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a small tiled cohort, as distill.py takes it."""
    from training import write_cohort

    return write_cohort(tmp_path_factory.mktemp("data"))


@pytest.fixture
def impatient(monkeypatch):
    """Servers are asked again at once, and waited for a third of a second."""
    monkeypatch.setattr("g2l.network.RETRY_SECONDS", 0.001)
    monkeypatch.setattr("g2l.network.PATIENCE", 0.3)


@pytest.fixture
def no_curve(monkeypatch):
    """No picture of the losses at the end of a run: it takes as long as twelve steps."""
    from g2l.runs import Run

    monkeypatch.setattr(Run, "draw_loss", lambda self, measured: None)


@pytest.fixture
def signals():
    """Training installs handlers; give pytest its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
