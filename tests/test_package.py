"""What is published: the wheel works beside torch alone, the source distribution is the project."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import asam

ROOT = Path(__file__).parents[1]
INSTALLED = Path(sysconfig.get_path("purelib"))
STEP = """
import sys, torch
from asam import ASAM
import asam.measure
model = torch.nn.Linear(3, 1)
before = model.weight.detach().clone()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ASAM(model).backward(lambda: model(torch.ones(2, 3)).square().mean())
optimizer.step()
assert not torch.equal(model.weight, before)
print(asam.__file__)
"""

pytestmark = pytest.mark.slow


def run(*command, cwd=ROOT, code=0):
    """Standard output and error of a command, which ends with this code."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made from the source distribution, and that, as ``make package`` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def beside_torch_alone(built, tmp_path_factory):
    """The commands' folder of an environment with the wheel, torch and what torch requires."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")[0].strip())
    for name in required("torch"):
        for top in {file.parts[0] for file in distribution(name).files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():  # several share one, as CUDA's do
                (site / top).symlink_to(INSTALLED / top)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", built[0])
    return folder / "bin"


def required(name):
    """The names of a package and of all that it requires here."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            needs = map(Requirement, distribution(name).requires or ())
            left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        metadata = message_from_string(wheel.read(f"asam-{asam.__version__}.dist-info/METADATA").decode())
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [Requirement(need).name for need in needs] == ["torch"]
    assert metadata["Version"] == asam.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    shown = metadata.get_payload()
    assert shown.startswith("# asam\n")
    assert "](https://arxiv.org/abs/2102.11600)" in shown
    # a package index shows it without what is beside it
    assert not re.findall(r"\]\((?!https?:).*?\)", shown)
    assert "Two weights, loss light where it is low" not in shown
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [file for file in (ROOT / "src").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert names == {str(file.relative_to(ROOT / "src")) for file in files}
    assert "asam/py.typed" in names


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells what belongs to the project")
def test_the_source_distribution_is_the_project(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    project = {*run("git", "ls-files", "--cached", "--others", "--exclude-standard")[0].splitlines()}
    project = {name for name in project if (ROOT / name).is_file() and not name.startswith(".ci/")}
    assert names == project | {"PKG-INFO"}


def test_the_source_distribution_can_be_tested(built, tmp_path):
    with tarfile.open(built[1]) as source:
        source.extractall(tmp_path, filter="data")
    folder = tmp_path / f"asam-{asam.__version__}"
    shown = run(sys.executable, "-m", "pytest", "tests/test_docs.py", "tests/test_projection.py", cwd=folder)[0]
    assert " passed" in shown
    assert "failed" not in shown


def test_a_step_beside_torch_alone(beside_torch_alone):
    where = run(beside_torch_alone / "python", "-c", STEP, cwd="/")[0]
    assert Path(where.strip()).is_relative_to(beside_torch_alone.parent)


def test_the_command_beside_torch_alone(beside_torch_alone):
    for arguments in ([], ["--version"], ["train", "--rho", "1"]):
        said, error = run(beside_torch_alone / "asam", *arguments, cwd="/", code=2)
        assert said == ""
        assert error.splitlines()[-1] == "asam: the command line needs typer: pip install 'asam[experiments]'"
