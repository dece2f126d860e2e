"""ResNet-50 on an image folder: the recipe for ImageNet, and the same at a size that a laptop can do.

On a laptop the folder holds scikit-learn's digits as files. That shows that the recipe runs, decoding, crops and all;
it says little about ImageNet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from .. import InputError, plots
from ..caches import cached_folder
from ..image_folder import ImageFolder
from ..run import Run
from ..statistics import pair
from ..study import Figure, Findings, Outcome, Study, Table
from .tuned import Method, Tuning, trained

TWICE = "SGD, twice the epochs"
GROUP = "image-folder"
FIELDS = "data_dir image_size train_size epochs lr batch_size weight_decay device evaluate_every precision"


@dataclass(frozen=True)
class Settings:
    """The folder and how ResNet-50 is trained on it. Without a folder it is made of digits."""

    seeds: int = 3
    data_dir: str | None = None
    digits: tuple[int, int] = (800, 400)  # images of train and val, where the folder is made
    image_size: int = 32
    train_size: int | None = 500
    epochs: int = 3
    lr: float = 0.05
    batch_size: int = 25
    weight_decay: float = 1e-4
    device: str = "cpu"
    precision: str = "float32"
    evaluate_every: int = 3
    rho_sam: float = 0.05
    rho_asam: float = 1.0


def digits_folder(train: int, test: int) -> Path:
    """Digits as PNG files in ``train/CLASS`` and ``val/CLASS``, made once in the user's cache."""

    def fill(folder: Path) -> None:
        digits = load_digits()
        for i, (image, label) in enumerate(zip(digits.images[: train + test], digits.target, strict=False)):
            place = folder / ("train" if i < train else "val") / f"{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype(np.uint8)).resize((40, 40)).convert("RGB").save(
                place / f"{i:04d}.png"
            )

    return cached_folder(f"digits-{train}-{test}", fill)


def _tuning(settings: Settings) -> Tuning:
    base = Run("sgd", dataset="image-folder", model="resnet50", augment=True, label_smoothing=0.1).but(
        **{name: getattr(settings, name) for name in FIELDS.split()}
    )
    if base.data_dir is None:
        base = base.but(data_dir=str(digits_folder(*settings.digits)))
    return Tuning(
        groups={GROUP: base},
        methods=[
            Method("SGD"),
            Method(TWICE, {"epochs": 2 * settings.epochs}),
            Method("SAM", {"method": "sam"}, "rho", (settings.rho_sam,)),
            Method("ASAM", {"method": "asam"}, "rho", (settings.rho_asam,)),
        ],
        seeds=settings.seeds,
        tuning_seeds=0,
    )


def _plan(settings: Settings, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
    return _tuning(settings).plan(outcomes)


def _report(settings: Settings, outcomes: Mapping[str, Outcome]) -> Findings:
    tuning = _tuning(settings)
    errors = {m.label: tuning.values(GROUP, m.label, outcomes) for m in tuning.methods}
    rows = [
        (label, pair(values), pair(tuning.values(GROUP, label, outcomes, "test_top5_error")))
        for label, values in errors.items()
    ]
    table = Table("Error on the images of val, last epoch, %", ("method", "top-1", "top-5"), rows)
    findings = [
        tuning.finding(GROUP, a, b, outcomes, "") for a, b in (("ASAM", TWICE), ("ASAM", "SAM"), ("SAM", TWICE))
    ]
    caption = "A dot a seed, grey lines between the same seeds; diamonds: mean and sd."
    figure = Figure("imagenet", "Top-1 error", caption, plots.dots(errors, "top-1 error (%)"))
    notes = (
        f"rho, {settings.rho_sam:g} for SAM and {settings.rho_asam:g} for ASAM, is the paper's for ImageNet; learning "
        "rate, weight decay, batch size and epochs are the usual ones, cosine schedule, label smoothing 0.1.",
        "Without --data-dir the folder holds scikit-learn's digits as files, in which a few epochs of a ResNet-50 "
        "prove the recipe and nothing about ImageNet.",
    )
    return Findings(findings, [table], [figure], notes)


def _check(settings: Settings) -> None:
    task = ImageFolder(_tuning(settings).groups[GROUP])
    with torch.device("meta"):
        task.network()


def _check_paper(settings: Settings) -> None:
    if settings.image_size > 32 and settings.data_dir is None:
        raise InputError("at the paper's scale imagenet needs --data-dir: ImageNet's folder of train/ and val/")
    _check(settings)


STUDY = Study(
    name="imagenet",
    title="ResNet-50 on an image folder",
    source="Table 4",
    settings={
        "quick": Settings(1, digits=(60, 40), train_size=20, epochs=1, batch_size=10),
        "laptop": Settings(),
        "paper": Settings(
            image_size=224,
            train_size=None,
            epochs=90,
            lr=0.1,
            batch_size=256,
            device="auto",
            precision="bfloat16",
            evaluate_every=5,
        ),
    },
    plan=_plan,
    perform=trained,
    report=_report,
    check=_check_paper,
)
