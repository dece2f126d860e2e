"""One run: a network trained with one method from one seed, with everything measured.

The state of a run is its weights and those of its optimizer and schedule, the generators, and where it is; a run taken
up from a checkpoint ends in the same numbers, bit for bit on the CPU.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .. import ASAM, SAM, EconomicalASAM, norm_parameters, weight_parameters
from . import InputError
from .distributed import (
    Place,
    device_of,
    from_all,
    load_optimizer_state,
    load_weights,
    optimizer_state,
    spread,
    weights,
)
from .run import Run
from .tasks import Task, find

Metrics = dict[str, float]


def train(
    run: Run, epoch_done: Callable[[int, Metrics], None] = lambda epoch, metrics: None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The outcome, with its curves and the time of a step, and the weights after the last epoch, on one thread.

    The time is that of the process, evaluation left out.
    """
    torch.set_num_threads(1)
    training = Training(run)
    training.advance(epoch_done=epoch_done)
    return training.outcome(), training.weights()


class Training:
    """A run in progress.

    Raises:
        InputError: the data is not there, or the network and the method do not go together.
    """

    def __init__(self, run: Run, place: Place | None = None) -> None:
        self.run = run
        self.task = find(run)
        self.place = Place(device_of(run)) if place is None else place
        self.device = self.place.device
        self.network = initial_network(run, self.task).to(self.device)
        self._called = spread(self.network, run, self.place)
        if self.place.rank:  # dropout masks of its own
            torch.manual_seed(run.seed + 2**20 * self.place.rank)
        self.optimizer = _optimizer(run, self.network)
        self.steps = run.epochs * self.task.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(factor, run, self.steps))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == "float16")
        try:
            self.minimizer = _minimizer(run, self._called, self.optimizer, self.steps)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.generator = torch.Generator().manual_seed(run.seed)
        self._epoch_start = self.generator.get_state()
        self.step = 0
        self.seconds = 0.0
        self.curves: dict[str, list[float]] = {}

    def advance(
        self,
        epoch_done: Callable[[int, Metrics], None] = lambda epoch, metrics: None,
        step_done: Callable[[], None] = lambda: None,
        epochs: int | None = None,
    ) -> None:
        """Train until the end, or until so many epochs are over in all.

        The functions are called after every step, and after every epoch that is evaluated, with its metrics.
        """
        while self.step < (self.steps if epochs is None else epochs * self.task.steps):
            epoch, begun = divmod(self.step, self.task.steps)
            if not begun:
                self._epoch_start = self.generator.get_state()
            self.generator.set_state(self._epoch_start)
            for batch in islice(self.task.batches(self.generator, self.place.rank, self.place.world), begun, None):
                start = time.process_time()
                self._step(tuple(part.to(self.device) for part in batch))
                self.seconds += time.process_time() - start
                self.step += 1
                last = self.step % self.task.steps == 0
                if last and ((epoch + 1) % self.run.evaluate_every == 0 or self.step == self.steps):
                    metrics = self.task.evaluate(self.network)
                    for name, value in metrics.items():
                        self.curves.setdefault(name, []).append(value)
                    epoch_done(epoch + 1, metrics)
                step_done()

    def outcome(self) -> dict[str, Any]:
        """Metrics after the last epoch, their curves by evaluated epochs, and the time of a step in seconds."""
        final = {name: values[-1] for name, values in self.curves.items()} | self.task.final(self.network)
        return final | {"seconds_per_step": self.seconds / self.steps, "curves": self.curves}

    def weights(self) -> dict[str, Tensor]:
        """The weights of the whole network, for the first process."""
        return weights(self.network, self.run, self.place)

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, for the first process; all processes must ask for it."""
        random = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()
        return {
            "network": self.weights(),
            "optimizer": optimizer_state(self.network, self.optimizer, self.run, self.place),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "minimizer": {} if self.minimizer is None else self.minimizer.state_dict(),
            "epoch_start": self._epoch_start if self.step % self.task.steps else self.generator.get_state(),
            "random": from_all(random.cpu(), self.place),
            "step": self.step,
            "seconds": self.seconds,
            "curves": self.curves,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state`, of as many processes; what does not fit raises an error of any kind."""
        load_weights(self.network, state["network"], self.run, self.place)
        load_optimizer_state(self.network, self.optimizer, state["optimizer"], self.run, self.place)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.minimizer is not None:
            self.minimizer.load_state_dict(state["minimizer"])
        self._epoch_start = state["epoch_start"]
        self.generator.set_state(self._epoch_start)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][self.place.rank], self.device)
        else:
            torch.set_rng_state(state["random"][self.place.rank])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.curves = {name: [float(value) for value in values] for name, values in state["curves"].items()}
        if not 0 <= self.step <= self.steps or len({len(values) for values in self.curves.values()}) > 1:
            raise ValueError("its counters do not fit the run")

    def _step(self, batch: tuple[Tensor, ...]) -> None:
        closure = partial(self._loss, batch)
        scale = (lambda loss: torch.autograd.backward(self.scaler.scale(loss))) if self.scaler.is_enabled() else None
        if self.minimizer is not None and self.step % self.run.every == 0:
            climbed = math.ceil(self.run.ascent_share * len(batch[0]))
            part = closure if climbed == len(batch[0]) else partial(self._loss, tuple(x[:climbed] for x in batch))
            self.minimizer.backward(closure, ascent=part, backward=scale)
        elif scale is not None:
            scale(closure())
        else:
            torch.autograd.backward(closure())
        if self.run.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.run.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def _loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        dtype = torch.bfloat16 if self.run.precision == "bfloat16" else torch.float16
        with torch.autocast(self.device.type, dtype, enabled=self.run.precision != "float32"):
            try:
                return self.task.loss(self._called, batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise InputError(
                    "a batch of one image has no batch statistics: choose another --batch-size or --train-size"
                ) from error


def initial_network(run: Run, task: Task) -> nn.Module:
    """The network of a run before training."""
    torch.manual_seed(run.seed)
    return task.network()


def _optimizer(run: Run, network: nn.Module) -> torch.optim.Optimizer:
    params = network.parameters()
    if run.optimizer == "sgd":
        return torch.optim.SGD(params, run.lr, run.momentum, weight_decay=run.weight_decay)
    kind = torch.optim.Adam if run.optimizer == "adam" else torch.optim.AdamW
    return kind(params, run.lr, (0.9, run.beta2), weight_decay=run.weight_decay)


def factor(run: Run, steps: int, step: int) -> float:
    """What the learning rate is multiplied by at a step."""
    if step < run.warmup:
        return (step + 1) / run.warmup
    if run.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - run.warmup) / max(1, steps - run.warmup))) / 2
    if run.schedule == "inverse-sqrt":
        return math.sqrt(max(1, run.warmup) / (step + 1))
    return 1.0


def _minimizer(
    run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> ASAM | EconomicalASAM | None:
    if run.method == "sgd":
        return None
    choice = {"all": lambda network: None, "weights": weight_parameters, "norm": norm_parameters}[run.perturb]
    ball: dict[str, Any] = {"rho": run.rho, "p": run.p, "bias": run.bias, "params": choice(network)}
    if run.method == "sam":
        return SAM(network, **ball)
    ball |= {"eta": run.eta, "normalization": run.normalization}
    if run.method == "asam":
        return ASAM(network, **ball)
    return EconomicalASAM(
        network,
        steps=steps,
        momentum_rho=run.momentum_rho or None,
        exact=run.exact,
        warmup=run.warmup,
        optimizer=optimizer if run.memory == "optimizer" else None,
        decay=run.decay,
        **ball,
    )
