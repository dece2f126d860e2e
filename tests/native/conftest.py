import functools
import os
import shlex
import subprocess
import sys
import tempfile

import pytest

from asam.native import NativeBlock


@functools.cache
def has_compiler():
    """Whether any program with a parallel loop can be compiled: then ours must be."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads(); }"
    flags = ["-std=c++20", "-fopenmp", "-x", "c++", "-", "-o", "program"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*shlex.split(os.environ.get("CXX", "c++")), *flags]
        try:
            done = subprocess.run(command, input=program, text=True, capture_output=True, cwd=folder)
        except OSError:
            return False
    return done.returncode == 0


@pytest.fixture(autouse=True)
def compiler():
    """Skips where the loops cannot be: not where they do not compile."""
    if sys.platform != "linux":
        pytest.skip("the loops are for Linux")
    if not has_compiler():
        pytest.skip("there is no C++ compiler with OpenMP")


@pytest.fixture(autouse=True)
def moves(monkeypatch):
    """How often a native block has moved: a test of it that does not go through it proves nothing."""
    real, calls = NativeBlock.move, []
    monkeypatch.setattr(NativeBlock, "move", lambda block: (calls.append(len(block.targets)), real(block)))
    return calls
