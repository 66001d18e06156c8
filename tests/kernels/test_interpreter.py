"""Every test that takes `device`, once more, with the kernels in Triton's interpreter. See conftest.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
OTHERS = [file for file in sorted(HERE.glob("test_*.py")) if file.name != Path(__file__).name]
FILES = [file.name for file in OTHERS if "device: Device" in file.read_text()]


def interpreted(file: str, only: str) -> None:
    """Run the tests of one file that are marked `only`, and that take a device; all must pass."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    chosen = [str(HERE / file), "-q", "-p", "no:cacheprovider", "-m", only, "-k", "interpreter"]
    command = [sys.executable, "-m", "pytest", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    interpreted(file, "not slow")
