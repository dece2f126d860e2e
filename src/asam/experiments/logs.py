"""Where the metrics of a run go: a line a step of evaluation, TensorBoard, and by option MLflow or Weights & Biases."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import InputError
from .files import write

LOGGERS = ("none", "mlflow", "wandb")
Log = Callable[[int, Mapping[str, float]], None]  # epoch, metrics


def lines(path: Path, kept: Mapping[str, list[float]], every: int) -> Log:
    """One JSON line an evaluation; ``kept`` are the curves of a checkpoint, what came after it is written again."""
    table = [
        {"epoch": every * (i + 1), **{name: values[i] for name, values in kept.items()}}
        for i in range(max(map(len, kept.values()), default=0))
    ]

    def log(epoch: int, metrics: Mapping[str, float]) -> None:
        table.append({"epoch": epoch, **metrics})
        write(path, "".join(json.dumps(row) + "\n" for row in table))

    return log


def tensorboard(folder: Path, epoch: int) -> Log:
    """Scalars for TensorBoard; those after ``epoch``, of a run that was killed, no longer count."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def log(epoch: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return log


def service(name: str, folder: Path, config: Mapping[str, Any]) -> Log:
    """MLflow or Weights & Biases, set up as their own environment variables say.

    Raises:
        InputError: it is not installed.
    """
    try:
        library = importlib.import_module(name)
    except ImportError:
        raise InputError(f"--log {name} needs {name}: pip install {name}") from None
    if name == "mlflow":
        library.start_run(run_name=folder.name)
        library.log_params(dict(config))
        return lambda epoch, metrics: library.log_metrics(dict(metrics), step=epoch)
    run = library.init(dir=str(folder), name=folder.name, config=dict(config))
    return lambda epoch, metrics: run.log(dict(metrics), step=epoch)
