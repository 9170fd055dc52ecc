"""What all tests share: the repository root, real inputs where present, and ways to run a script as a user does."""

import os
import subprocess
import sys
from pathlib import Path

# Tests run several at a time; one thread each keeps them from treading on one another.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
_shared = ROOT.parent / "shared" / "data"
SHARED = _shared if _shared.is_dir() else None  # real slides and tables; tests that need them skip without


def run(script: str, *args, timeout: float = 300, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Run `python script args...` from the repository root and return the finished process, output captured as text."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, timeout=timeout,
                          capture_output=True, text=True, **kwargs)


def torchrun(processes: int, script: str, *args, timeout: float = 300, env: dict | None = None,
             options: tuple = ()) -> subprocess.CompletedProcess:
    """Run a script under real torchrun on this machine (gloo on CPU); `options` go to torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               *map(str, options), str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, timeout=timeout,
                          capture_output=True, text=True)
