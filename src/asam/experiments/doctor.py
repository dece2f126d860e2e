"""What is installed here, and which optional parts work."""

import importlib
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from .environment import processor

# what a part is for, and the module and the package that it needs
PARTS = {
    "plots and pages": ("matplotlib", "matplotlib"),
    "landscapes in 3-D": ("plotly", "plotly"),
    "runs in a database": ("optuna", "optuna"),
    "a database on a server": ("psycopg", "psycopg"),
    "curves": ("tensorboard", "tensorboard"),
    "translation": ("sacrebleu", "sacrebleu"),
    "the paper's networks": ("pytorchcv.models.resnet_cifar", "pytorchcv"),
    "Lightning": ("lightning.pytorch", "lightning"),
    "transformers": ("transformers", "transformers"),
    "Accelerate": ("accelerate", "accelerate"),
}
WORKS, MISSING = "works", "missing"


def examine() -> dict[str, dict[str, str]]:
    """What there is, by section and name: the system, the optional parts, the data sets."""
    return {"system": _system(), "optional parts": _parts(), "data": _data()}


def _system() -> dict[str, str]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "asam": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "processor": processor(),
        "CUDA devices": ", ".join(devices) or "none",
        "compiler for torch.compile": shutil.which("c++") or shutil.which("g++") or MISSING,
    }


def _parts() -> dict[str, str]:
    found = {}
    for part, (module, package) in PARTS.items():
        try:
            number = version(package)
        except PackageNotFoundError:
            options = "--no-deps " if package == "pytorchcv" else ""  # else with torchvision, which no part needs
            found[part] = f"{MISSING}: pip install {options}{package}"
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a package that is there and does not import may fail in any way
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            found[part] = f"broken: {package} {number} does not import: {reason}"
        else:
            found[part] = f"{WORKS}: {package} {number}"
    return found


def _data() -> dict[str, str]:
    from . import data, glyphs, parallel_text

    folders = {
        "fashion-mnist": (data.FASHION_FOLDER, "dataset-fashion-mnist"),
        "glyphs": (glyphs.FONT_FOLDER, "fonts-aenigma"),
        "help-texts": (parallel_text.HELP, "libreoffice-help-de and libreoffice-help-en-us"),
    }
    found = {"digits": f"{WORKS}: with scikit-learn"}
    for name, (folder, package) in folders.items():
        found[name] = f"{WORKS}: {folder}" if folder.is_dir() else f"{MISSING}: Debian's {package}, or --data-dir"
    return found
