"""``asam doctor`` tells what is there, what is missing and what is broken."""

import importlib
import json
import sys

import pytest
import torch

from asam import __version__
from asam.experiments import cli, data, doctor


def run(capsys, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["asam", *arguments])
    code = cli.run()
    said = capsys.readouterr()
    assert said.err == ""
    assert code == 0
    return said.out


def test_version(capsys, monkeypatch):
    assert run(capsys, "--version", monkeypatch=monkeypatch) == f"asam {__version__}\n"


def test_what_is_there(capsys, monkeypatch):
    found = json.loads(run(capsys, "doctor", "--json", monkeypatch=monkeypatch))
    assert list(found) == ["system", "optional parts", "data"]
    assert found["system"]["torch"] == torch.__version__
    assert found["optional parts"]["plots and pages"].startswith("works: matplotlib ")
    assert found["data"]["digits"].startswith("works")


def test_every_line_fits_its_section(capsys, monkeypatch):
    lines = run(capsys, "doctor", monkeypatch=monkeypatch).splitlines()
    assert [line for line in lines if not line.startswith("  ")] == ["system", "optional parts", "data"]
    assert len(lines) == 3 + sum(len(rows) for rows in doctor.examine().values())


def test_what_is_missing_or_broken(monkeypatch, tmp_path):
    real = importlib.import_module

    def imported(name):
        if name == "optuna":
            raise RuntimeError("operator x::y does not exist\nand more")
        return real(name)

    def version(package):
        raise doctor.PackageNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(doctor, "version", version)
        assert doctor.examine()["optional parts"]["the paper's networks"] == "missing: pip install --no-deps pytorchcv"
    monkeypatch.setattr(doctor, "PARTS", {"a": ("nowhere", "not-a-package-of-anyone"), "b": ("optuna", "optuna")})
    monkeypatch.setattr(doctor.importlib, "import_module", imported)
    monkeypatch.setattr(data, "FASHION_FOLDER", tmp_path / "nothing")
    found = doctor.examine()
    assert found["optional parts"]["a"] == "missing: pip install not-a-package-of-anyone"
    assert found["optional parts"]["b"].startswith("broken: optuna ")
    assert found["optional parts"]["b"].endswith("does not import: operator x::y does not exist")
    assert found["data"]["fashion-mnist"] == "missing: Debian's dataset-fashion-mnist, or --data-dir"


@pytest.mark.parametrize("part", doctor.PARTS)
def test_every_part_names_what_it_needs(part):
    module, package = doctor.PARTS[part]
    assert module.split(".")[0].replace("_", "-") == package
