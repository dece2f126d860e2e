"""Where and with what a result was made."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__


def environment() -> dict[str, str]:
    """Versions, hardware and command."""
    return {
        "asam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "scikit-learn": version("scikit-learn"),
        "hardware": processor(),
        "command": " ".join(["asam", *sys.argv[1:]]),
    }


def processor() -> str:
    """Name of the processor and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
