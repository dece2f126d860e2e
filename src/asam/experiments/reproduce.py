"""A study from its settings to its page: plan, perform on several processes, report."""

import hashlib
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import InputError
from .environment import environment
from .files import claim_folder, write
from .processes import end_with_parent
from .runs import Runs
from .study import Findings, Scale, Study
from .study_page import markdown, page

STUDIES = (
    "geometry",
    "toy",
    "invariance",
    "rescaling",
    "correlation",
    "rho",
    "noise",
    "images",
    "imagenet",
    "translation",
    "bound",
    "bias",
)
DATABASE = "runs.sqlite3"
Progress = Callable[[int, int], None]  # runs done, runs planned so far


def find(name: str) -> Study:
    """The study of that name."""
    found: Study = importlib.import_module(f".studies.{name}", __package__).STUDY
    return found


def configured(study: Study, scale: Scale, **changes: Any) -> Any:
    """The settings of a study at a scale, with what the user changed.

    Raises:
        InputError: the study has no such scale or setting, or cannot run with these.
    """
    if scale not in study.settings:
        raise InputError(f"{study.name} has no --{scale}: it has {', '.join(study.settings)}")
    settings = study.settings[scale]
    for key, value in changes.items():
        if value is None:
            continue
        if not hasattr(settings, key):
            raise InputError(f"{study.name} has no --{key.replace('_', '-')}")
        settings = replace(settings, **{key: value})
    study.check(settings)
    return settings


def reproduce(
    study: Study, scale: Scale, settings: Any, folder: Path, storage: str | None, workers: int, progress: Progress
) -> Findings:
    """Perform what is not done yet, and write the results into the folder, which :func:`claim` has made ready."""
    url = storage or f"sqlite:///{(folder / DATABASE).resolve()}"
    key = hashlib.sha256(json.dumps(_config(study, scale, settings), sort_keys=True).encode()).hexdigest()[:12]
    name = f"asam-{study.name}-{scale}-{key}"
    runs = Runs(url, name)
    try:
        if workers == 1:
            _work(study, settings, runs, progress)
        else:
            _work_together(study, settings, runs, url, name, workers, progress)
        outcomes, records = runs.outcomes(), runs.records()
    finally:
        runs.close()
    findings = study.report(settings, {run: outcomes[run] for run in study.plan(settings, outcomes)})
    _save(study, scale, settings, findings, records, folder)
    if storage is None:
        (folder / DATABASE).unlink()
    return findings


def claim(study: Study, scale: Scale, settings: Any, folder: Path, *, force: bool) -> None:
    """Make the folder ready for the results, or refuse it."""
    ours = ("results.jsonl", "table.md", "report.html", "*.svg", f"{DATABASE}*")
    claim_folder(folder, _config(study, scale, settings), last="summary.json", ours=ours, force=force)


def _config(study: Study, scale: Scale, settings: Any) -> dict[str, Any]:
    return {"study": study.name, "scale": scale, "asam": __version__, "settings": asdict(settings)}


def _work(
    study: Study, settings: Any, runs: Runs, progress: Progress = lambda done, planned: None, order: int = 0
) -> None:
    """Stage after stage: a stage is what the outcomes of those before it let the study name."""
    torch.set_num_threads(1)
    while True:
        outcomes = runs.outcomes()
        planned = study.plan(settings, outcomes)
        progress(len(planned.keys() & outcomes.keys()), len(planned))
        if planned.keys() <= outcomes.keys():
            return
        finished = len(planned.keys() & outcomes.keys())

        def done(total: int = len(planned)) -> None:
            nonlocal finished
            finished += 1
            progress(finished, total)

        runs.work(planned, study.perform, done, order)


def _work_together(
    study: Study, settings: Any, runs: Runs, url: str, name: str, workers: int, progress: Progress
) -> None:
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Connection] = {}
    for order in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(study.name, settings, url, name, order * 7, theirs))
        process.start()
        theirs.close()
        processes[process] = ours
    try:
        while any(process.is_alive() for process in processes):
            wait([process.sentinel for process in processes if process.is_alive()], timeout=0.5)
            outcomes = runs.outcomes()
            planned = study.plan(settings, outcomes)
            progress(len(planned.keys() & outcomes.keys()), len(planned))
            for connection in processes.values():
                if (problem := _received(connection)) is not None:
                    raise problem
    finally:
        for process in processes:
            process.terminate()
            process.join()
    outcomes = runs.outcomes()
    if not study.plan(settings, outcomes).keys() <= outcomes.keys():
        raise InputError("the worker processes were killed (out of memory?): the same command goes on")


def _received(connection: Connection) -> Exception | None:
    try:
        return connection.recv() if connection.poll() else None
    except EOFError:
        return None


def _worker(study: str, settings: Any, url: str, name: str, order: int, connection: Connection) -> None:
    end_with_parent()
    try:
        _work(find(study), settings, Runs(url, name), order=order)
    except Exception as error:
        error.add_note(f"in a worker process, study {study}")
        connection.send(error)


def _save(
    study: Study, scale: Scale, settings: Any, findings: Findings, records: list[dict[str, Any]], folder: Path
) -> None:
    """The summary comes last: it tells that the folder is finished."""
    where = environment()
    write(folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for figure in findings.figures:
        write(folder / f"{figure.name}.svg", figure.svg)
    for file, text in findings.pages.items():
        write(folder / file, text)
    write(folder / "table.md", markdown(study, scale, settings, findings, where))
    write(folder / "report.html", page(study, scale, settings, findings, where))
    summary = {
        "study": study.name,
        "source": study.source,
        "scale": scale,
        "findings": [asdict(item) for item in findings.findings],
        "runs": len(records),
        "environment": where,
        "finished": time.strftime("%Y-%m-%d"),
    }
    write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
