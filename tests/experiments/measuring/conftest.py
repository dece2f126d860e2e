import shutil
import sys
from pathlib import Path

import pytest

from asam.experiments import cli
from asam.experiments.compare import _one
from asam.experiments.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "runs"
    folder.mkdir()
    for method, model in (("sgd", "mlp"), ("asam", "mlp"), ("sgd", "cnn")):
        _one(Run(method, seed=0, rho=1.0, epochs=1, model=model, noise=0.4), folder / f"{method}-{model}")
    return folder


@pytest.fixture
def asam(monkeypatch, capsys, tmp_path):
    """The command line in an empty folder that holds the user's module, with its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(Path(__file__).parent / "own_models.py", tmp_path / "own.py")
    sys.modules.pop("own", None)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["asam", *map(str, arguments)])
        code = cli.run()
        return code, *capsys.readouterr()

    yield command
    sys.modules.pop("own", None)
