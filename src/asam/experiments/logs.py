"""Where the metrics of a run go: a line an evaluation, TensorBoard, and by option MLflow or Weights & Biases."""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import InputError
from .files import plain, write
from .run import Run

Log = Callable[[int, Mapping[str, float]], None]  # epoch, metrics


def kept(curves: Mapping[str, list[float]], run: Run) -> dict[int, dict[str, float]]:
    """The metrics of a checkpoint by epoch; what a run that was killed logged after it no longer counts."""
    evaluations = max(map(len, curves.values()), default=0)
    epochs = [min(run.evaluate_every * (i + 1), run.epochs) for i in range(evaluations)]
    return {epoch: {name: values[i] for name, values in curves.items()} for i, epoch in enumerate(epochs)}


def lines(path: Path, before: Mapping[int, Mapping[str, float]]) -> Log:
    """One JSON line an evaluation, after those before."""
    table = [{"epoch": epoch, **metrics} for epoch, metrics in before.items()]

    def log(epoch: int, metrics: Mapping[str, float]) -> None:
        table.append({"epoch": epoch, **metrics})
        write(path, "".join(json.dumps(plain(row)) + "\n" for row in table))

    return log


@contextmanager
def tensorboard(folder: Path, before: Mapping[int, Mapping[str, float]]) -> Iterator[Log]:
    """Scalars for TensorBoard, after those before.

    All are in one file: TensorBoard reads several in the order of their names, which tell only the second, the host
    and the process, and would let an older one purge a newer one.
    """
    from torch.utils.tensorboard import SummaryWriter

    for file in folder.glob("events.out.tfevents.*"):
        file.unlink(missing_ok=True)
    with SummaryWriter(str(folder)) as writer:

        def log(epoch: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

        for epoch, metrics in before.items():
            log(epoch, metrics)
        yield log


def library(name: str) -> Any:
    """The library of a service.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"--log {name} needs {name}: pip install {name}") from None


@contextmanager
def service(name: str, folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """MLflow or Weights & Biases, set up as their own environment variables say; an error marks its run as failed."""
    if name == "mlflow":
        mlflow = library(name)
        with mlflow.start_run(run_name=folder.name):
            mlflow.log_params(dict(config))
            yield lambda epoch, metrics: mlflow.log_metrics(dict(metrics), step=epoch)
    else:
        with library(name).init(dir=str(folder), name=folder.name, config=dict(config)) as run:
            yield lambda epoch, metrics: run.log(dict(metrics), step=epoch)
