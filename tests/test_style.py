"""What pre-commit runs, on the whole tree: form, lint and types."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("command", ["ruff format --check .", "ruff check .", "mypy"])
def test_form_lint_and_types(command):
    tool, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
