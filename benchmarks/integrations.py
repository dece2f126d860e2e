"""What each framework costs around ASAM on the CPU: milliseconds of a training step, with ASAM and without.

    python benchmarks/integrations.py [--seconds S] [--json PATH]

An MLP of 64-128-10, batch 50, SGD with momentum, float32, one thread on one core. The data is the clock: CPU time from
the 20th to the 220th time that a fit asks for a batch, so that no set-up counts. All variants run once in each round,
ratios and differences are within a round: medians and bootstrap 95 % intervals (measure.py). Each fit must end at the
weights of the plain loop. skorch and fastai train as in examples/, the others as in docs/frameworks/.
"""

import argparse
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import hardware, median, ratio, rounds_of, settle
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from asam import ASAM

RHO, LR, BATCH, FIRST, STEPS = 0.5, 0.01, 50, 20, 200
SGD = partial(torch.optim.SGD, lr=LR, momentum=0.9)
cross_entropy = nn.functional.cross_entropy


class Batches(Dataset[Any]):
    """The same batch again and again, and the CPU time of each request."""

    def __init__(self) -> None:
        self.batch = torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(0)), torch.arange(BATCH) % 10
        self.times: list[float] = []

    def __len__(self) -> int:
        return BATCH * (FIRST + STEPS + 2)  # some frameworks ask a batch ahead

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        self.times.append(time.process_time())
        return self.batch


def loader(data: Batches) -> DataLoader[Any]:
    return DataLoader(data, batch_size=BATCH, collate_fn=lambda batch: batch)


def loop(model: nn.Module, data: Any, aware: bool, optimizer: Any, backward: Callable[[Tensor], Any] | None) -> None:
    asam = ASAM(model, rho=RHO)
    for x, y in data:
        if aware:
            asam.backward(lambda x=x, y=y: cross_entropy(model(x), y), backward=backward)
        else:
            (backward or Tensor.backward)(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()


def plain(model: nn.Module, data: Batches, aware: bool) -> None:
    loop(model, loader(data), aware, SGD(model.parameters()), None)


def accelerate(model: nn.Module, data: Batches, aware: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(model, SGD(model.parameters()), loader(data))
    loop(model, batches, aware, optimizer, accelerator.backward)


def lightning(model: nn.Module, data: Batches, aware: bool) -> None:
    from lightning.pytorch import LightningModule, Trainer

    from asam.integrations.lightning import SharpnessAware

    class Module(LightningModule):
        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters())

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    callbacks = [SharpnessAware(rho=RHO)] if aware else []
    module = Module()
    module.network = model
    Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=callbacks, **quiet).fit(module, loader(data))


def transformers(model: nn.Module, data: Batches, aware: bool) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from asam.integrations.transformers import SharpnessAwareTrainer

    class Module(nn.Sequential):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = super().forward(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    make = partial(SharpnessAwareTrainer, asam=partial(ASAM, rho=RHO)) if aware else Trainer
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
    same = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "num_train_epochs": 1, "use_cpu": True}
    with TemporaryDirectory() as folder:
        trainer = make(
            Module(model),
            TrainingArguments(folder, per_device_train_batch_size=BATCH, dataloader_pin_memory=False, **same, **quiet),
            train_dataset=data,
            data_collator=lambda batch: {"x": batch[0], "labels": batch[1]},
            optimizers=(SGD(model.parameters()), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def skorch(model: nn.Module, data: Batches, aware: bool) -> None:
    from skorch import NeuralNetClassifier
    from skorch_net import ASAMClassifier

    make = partial(ASAMClassifier, rho=RHO) if aware else NeuralNetClassifier
    quiet = {"train_split": None, "verbose": 0, "iterator_train__collate_fn": lambda batch: batch}
    options = {"criterion": nn.CrossEntropyLoss, "optimizer": SGD, "lr": LR, "batch_size": BATCH, "max_epochs": 1}
    make(lambda: model, **options, **quiet).fit(data, None)


def ignite(model: nn.Module, data: Batches, aware: bool) -> None:
    from ignite.engine import Engine, create_supervised_trainer

    optimizer, asam = SGD(model.parameters()), ASAM(model, rho=RHO)

    def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
        model.train()
        optimizer.zero_grad()
        loss = asam.backward(lambda: cross_entropy(model(batch[0]), batch[1]))
        optimizer.step()
        return loss.item()

    trainer = Engine(update) if aware else create_supervised_trainer(model, optimizer, cross_entropy)
    trainer.run(loader(data), max_epochs=1)


def fastai(model: nn.Module, data: Batches, aware: bool) -> None:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from fastai_learner import SharpnessAware

    callbacks = [SharpnessAware(RHO)] if aware else []
    optimizer = partial(OptimWrapper, opt=SGD)
    loaders = DataLoaders(loader(data), loader(data))  # the validation asks for its batches after the clock has stopped
    learn = Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), opt_func=optimizer, lr=LR, cbs=callbacks)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)


FRAMEWORKS = {
    "plain loop": (plain, "torch"),
    "Accelerate": (accelerate, "accelerate"),
    "Lightning": (lightning, "lightning"),
    "HF Trainer": (transformers, "transformers"),
    "skorch": (skorch, "skorch"),
    "Ignite": (ignite, "pytorch-ignite"),
    "fastai": (fastai, "fastai"),
}


def seconds(fit: Callable[[nn.Module, Batches, bool], None], aware: bool, expected: dict[bool, Tensor]) -> float:
    """CPU seconds of a step in the middle of a new fit, which must end where the first fit of its kind did."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), Batches()
    fit(model, data, aware)
    end = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(end, expected.setdefault(aware, end), rtol=1e-3, atol=1e-5)
    return (data.times[FIRST + STEPS] - data.times[FIRST]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of ASAM inside training frameworks.", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long new rounds begin, 120 by default")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file as well")
    arguments = parser.parse_args()
    if not 0 < arguments.seconds < float("inf"):
        parser.error(f"--seconds must be a finite number > 0, got {arguments.seconds}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: no such directory: {arguments.json.parent}")
    settle()
    warnings.simplefilter("ignore")
    sys.path.append(str(Path(__file__).parents[1] / "examples"))

    console = Console(width=None if sys.stdout.isatty() else 120)
    run = {"hardware": hardware(), "torch": torch.__version__, "command": shlex.join(["python", *sys.argv])}
    expected: dict[bool, Tensor] = {}
    fits = {}
    for name, (fit, package) in FRAMEWORKS.items():
        try:
            fits |= {(name, aware): partial(seconds, fit, aware, expected) for aware in (False, True)}
            fits[name, False]()
            fits[name, True]()
            run[package] = version(package)
        except ImportError as error:
            del fits[name, False], fits[name, True]
            console.print(f"{name} is left out: {error}", highlight=False)
    console.print(", ".join(f"{key}: {value}" for key, value in run.items()), highlight=False, soft_wrap=True)

    samples = rounds_of(fits, arguments.seconds)
    plain_asam = samples["plain loop", True]
    table = Table(title=f"CPU time of a step ({len(plain_asam)} rounds)", title_justify="left")
    for key in ("variant", "without ASAM, ms", "with ASAM, ms", "ASAM adds, ms", "with / plain loop with ASAM"):
        table.add_column(key, justify="left" if key == "variant" else "right")
    rows = []
    for name, without in ((name, times) for (name, aware), times in samples.items() if not aware):
        aware = samples[name, True]
        added = [1e3 * (a - b) for a, b in zip(aware, without, strict=True)]
        rows.append(
            {
                "variant": name,
                "milliseconds without": 1e3 * median(without),
                "milliseconds with": 1e3 * median(aware),
                "milliseconds added": ratio(added, [1.0] * len(added)),
                "x plain loop with ASAM": ratio(aware, plain_asam),
            }
        )
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in rows[-1].values()))
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({**run, "rows": rows}, default=asdict, indent=2) + "\n")


if __name__ == "__main__":
    main()
