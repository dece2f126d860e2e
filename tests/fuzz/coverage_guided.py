"""Configurations and checkpoints that atheris makes, led by the code they reach: each is read, or refused in one line.

pip install atheris
python tests/fuzz/coverage_guided.py [FOLDER] [-max_total_time=60]    # libFuzzer's options
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["asam.experiments", "tomllib"]):
    from asam.experiments import InputError, checkpoints
    from asam.experiments.run import as_run, read_run

RUN = as_run({"rho": 0.5}, "here")
SUFFIXES = ("toml", "json", "pt")
CONFIGURATIONS = {"toml": b"epochs = 2\nrho = 0.5\nmethod = 'asam'", "json": b'{"run": {"epochs": 2, "noise": 0.4}}'}


def one_file(content):
    """Read the bytes after the first, which says as what."""
    suffix = SUFFIXES[content[0] % 3] if content else "toml"
    path = Path(folder, f"run.{suffix}")
    path.write_bytes(content[1:])
    try:
        if suffix == "pt":
            checkpoints.load(path, RUN, 1)
        else:
            as_run(read_run(path), str(path))
    except InputError as error:
        lines = str(error).splitlines()
        if len(lines) != 1:
            raise RuntimeError(f"not one line: {lines}") from error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(Path(folder, "checkpoint"), RUN, {"random": [0]})
        contents = {**CONFIGURATIONS, "pt": Path(folder, "checkpoint").read_bytes()}
        for suffix, content in contents.items():
            Path(folder, f"seed-{suffix}").write_bytes(bytes([SUFFIXES.index(suffix)]) + content)
        atheris.Setup([*sys.argv, folder], one_file)
        atheris.Fuzz()
