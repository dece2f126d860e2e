"""A run in a folder: it takes up its checkpoint, logs on the way, and leaves its outcome and its weights.

``config.json`` tells what the folder is for. ``run.json`` and ``run.pt`` are written when the run is done, and are what
``asam measure`` takes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import logs
from .checkpoints import load, save, save_tensors
from .distributed import from_all, joined
from .environment import environment
from .files import claim_folder, write
from .run import Run
from .training import Training

CHECKPOINT = "checkpoint.pt"
SEVERAL_THREADS = 10**6  # parameters from which more than one thread pays


def claim(run: Run, folder: Path, *, force: bool) -> None:
    """Make the folder ready: new, or of the same run and unfinished."""
    ours = ("run.pt", CHECKPOINT, "metrics.jsonl", "tensorboard/*")
    claim_folder(folder, {"asam": __version__, "run": asdict(run)}, last="run.json", ours=ours, force=force)


def execute(
    run: Run,
    folder: Path,
    *,
    checkpoint_every: int,
    log: str = "none",
    force: bool = False,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, Any] | None:
    """Train to the end and return the outcome; of several processes, in the first one.

    Raises:
        InputError: the folder holds something else, a checkpoint of another run, or what cannot be read.
    """
    with joined(run) as place:
        first = place.rank == 0
        training = Training(run, place)  # refuses what cannot run before the folder is touched
        if first:
            claim(run, folder, force=force)
        from_all(None, place)  # the others wait for the folder
        if sum(param.numel() for param in training.network.parameters()) < SEVERAL_THREADS:
            torch.set_num_threads(1)
        checkpoint = folder / CHECKPOINT
        if checkpoint.exists():
            training.load_state(load(checkpoint, run))
        sinks = []
        if first:
            epoch = training.step // training.task.steps
            sinks = [
                logs.lines(folder / "metrics.jsonl", training.curves, run.evaluate_every),
                logs.tensorboard(folder / "tensorboard", epoch),
            ]
            if log != "none":
                sinks.append(logs.service(log, folder, asdict(run)))

        def epoch_done(epoch: int, metrics: dict[str, float]) -> None:
            for sink in sinks:
                sink(epoch, metrics)

        def step_done() -> None:
            progress(training.step, training.steps)
            if training.step % checkpoint_every == 0:
                state = training.state()
                if first:
                    save(checkpoint, run, state)

        progress(training.step, training.steps)
        training.advance(epoch_done, step_done)
        outcome, weights = training.outcome(), training.weights()
        if not first:
            return None
        save_tensors(folder / "run.pt", weights)
        result = {"run": asdict(run), "outcome": outcome, "processes": place.world, "environment": environment()}
        write(folder / "run.json", json.dumps(result, indent=1) + "\n")
        checkpoint.unlink(missing_ok=True)
        return outcome
