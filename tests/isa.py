"""Runs tests again with the kernels of older machines, in a process of its own: the choice is made at import."""

from __future__ import annotations

import os
import subprocess
import sys

OLDER = ("baseline", "avx2")


def run_on(isa: str, file: str, chosen: str) -> None:
    """The tests of ``file`` that ``-k chosen`` selects, with the instruction set ``isa``; at least one must run.

    The process starts where this one did, so it imports the same mvp_ext.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        file,
        "-k",
        f"({chosen}) and not emulator and not cuda",
    ]
    environment = {**os.environ, "MVP_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
