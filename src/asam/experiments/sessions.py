"""A run in a folder: it takes up its checkpoint, logs on the way, and leaves its outcome and its weights.

``config.json`` tells what the folder is for. ``run.json`` and ``run.pt`` are written when the run is done, and are what
``asam measure`` takes.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import logs
from .checkpoints import load, refusals, save, save_tensors
from .distributed import agreed, joined
from .environment import environment
from .files import claim_folder, held, plain, write
from .run import Run
from .training import Training

CHECKPOINT = "checkpoint.pt"
SEVERAL_THREADS = 10**6  # parameters from which more than one thread pays


def claim(run: Run, folder: Path, *, force: bool) -> None:
    """Make the folder ready: new, or of the same run and unfinished."""
    files = ("run.pt", CHECKPOINT, "metrics.jsonl")
    ours = (*files, *(f"{name}.part" for name in (*files, "run.json")), "tensorboard/*")
    claim_folder(folder, {"asam": __version__, "run": asdict(run)}, last="run.json", ours=ours, force=force)


def execute(
    run: Run,
    folder: Path,
    *,
    checkpoint_every: int,
    log: str = "none",
    force: bool = False,
    begun: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, Any] | None:
    """Train to the end and return the outcome; of several processes, in the first one.

    ``begun`` is called before the first step, where nothing was refused.

    Raises:
        InputError: the folder holds something else, a checkpoint of another run, or what cannot be read.
    """
    with joined(run) as place, ExitStack() as until_the_end:
        first, checkpoint = place.rank == 0, folder / CHECKPOINT
        with agreed(place):  # what cannot run is refused before the folder is touched
            training = Training(run, place)
            if first and log != "none":
                logs.library(log)
        with agreed(place):
            if first:
                until_the_end.enter_context(held(folder))
                claim(run, folder, force=force)
        with agreed(place):
            state = load(checkpoint, run, place.world) if checkpoint.exists() else None
        if state is not None:
            with refusals(checkpoint):
                training.load_state(state)
        if sum(param.numel() for param in training.network.parameters()) < SEVERAL_THREADS:
            torch.set_num_threads(1)
        sinks = []
        if first:
            before = logs.kept(training.curves, run)
            sinks.append(logs.lines(folder / "metrics.jsonl", before))
            sinks.append(until_the_end.enter_context(logs.tensorboard(folder / "tensorboard", before)))
            if log != "none":
                sinks.append(until_the_end.enter_context(logs.service(log, folder, asdict(run))))

        def epoch_done(epoch: int, metrics: dict[str, float]) -> None:
            with agreed(place):
                for sink in sinks:
                    sink(epoch, metrics)

        def step_done() -> None:
            progress(training.step, training.steps)
            if training.step % checkpoint_every == 0:
                state = training.state()
                with agreed(place):
                    if first:
                        save(checkpoint, run, state)

        begun()
        progress(training.step, training.steps)
        training.advance(epoch_done, step_done)
        outcome, weights = training.outcome(), training.weights()
        if not first:
            return None
        save_tensors(folder / "run.pt", weights)
        result = {"run": asdict(run), "outcome": outcome, "processes": place.world, "environment": environment()}
        write(folder / "run.json", json.dumps(plain(result), indent=1) + "\n")
        for file in folder.glob(f"{CHECKPOINT}*"):  # one that was being written when the run was killed, too
            file.unlink(missing_ok=True)
        return outcome
