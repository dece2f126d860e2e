"""A study from its settings to its page: plan, perform on several processes, report."""

import hashlib
import importlib
import json
import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import __version__
from . import InputError
from .database import check, file_url
from .environment import environment
from .files import claim_folder, plain, write
from .processes import end, end_with_parent, interrupts_held_back
from .runs import Runs
from .study import Findings, Outcome, Scale, Study
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
Plan = Callable[[Any, Mapping[str, Outcome]], dict[str, Any]]
Perform = Callable[[Any], Outcome]


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
            raise InputError(f"{study.name} has no --{key.replace('_', '-')}: leave it out")
        settings = replace(settings, **{key: value})
    study.check(settings)
    return settings


def reproduce(
    study: Study, scale: Scale, settings: Any, folder: Path, storage: str | None, workers: int, progress: Progress
) -> Findings:
    """Perform what is not done yet, and write the results into the folder, which :func:`claim` has made ready."""
    url = storage or file_url(folder / DATABASE)
    key = hashlib.sha256(json.dumps(_config(study, scale, settings), sort_keys=True).encode()).hexdigest()[:12]
    name = f"asam-{study.name}-{scale}-{key}"
    runs = Runs(url, name)
    try:
        if workers == 1:
            _work(study.plan, study.perform, settings, runs, progress)
        else:
            _work_together(study, settings, runs, url, name, workers, progress)
        outcomes, records = runs.outcomes(), runs.records()
    finally:
        runs.close()
    findings = study.report(settings, {run: outcomes[run] for run in study.plan(settings, outcomes)})
    _save(study, scale, settings, findings, records, folder, storage)
    if storage is None:
        for file in sorted(folder.glob(f"{DATABASE}*"), reverse=True):  # no log without its database
            file.unlink(missing_ok=True)
    return findings


def claim(study: Study, scale: Scale, settings: Any, folder: Path, storage: str | None, *, force: bool) -> None:
    """Make the folder ready for the results.

    Raises:
        InputError: the folder holds something else, or the storage cannot be used.
    """
    if storage:
        check(storage)
    ours = ("results.jsonl", "table.md", "report.html", f"{DATABASE}*", *_files(folder / "summary.json"))
    claim_folder(folder, _config(study, scale, settings), last="summary.json", ours=ours, force=force)


def _files(summary: Path) -> list[str]:
    """The plots and pages that a finished study wrote beside its summary."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return [Path(file).name for file in json.loads(summary.read_text(encoding="utf-8"))["files"]]
    return []


def _config(study: Study, scale: Scale, settings: Any) -> dict[str, Any]:
    return {"study": study.name, "scale": scale, "asam": __version__, "settings": asdict(settings)}


def _work(
    plan: Plan, perform: Perform, settings: Any, runs: Runs, progress: Progress = lambda done, planned: None
) -> None:
    """Stage after stage: a stage is what the outcomes of those before it let the study name."""
    torch.set_num_threads(1)
    while True:
        outcomes = runs.outcomes()
        planned = plan(settings, outcomes)
        progress(len(planned.keys() & outcomes.keys()), len(planned))
        if planned.keys() <= outcomes.keys():
            return
        finished = len(planned.keys() & outcomes.keys())

        def done(total: int = len(planned)) -> None:
            nonlocal finished
            finished += 1
            progress(finished, total)

        runs.work(planned, perform, done)


def _work_together(
    study: Study, settings: Any, runs: Runs, url: str, name: str, workers: int, progress: Progress
) -> None:
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Connection] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(study.plan, study.perform, settings, url, name, theirs))
            with interrupts_held_back():
                process.start()
                processes[process] = ours
            theirs.close()
        outcomes, planned = _counted(study, settings, runs, progress)
        while alive := [process.sentinel for process in processes if process.is_alive()]:
            wait(alive, timeout=0.5)
            _raise_first(processes.values())
            outcomes, planned = _counted(study, settings, runs, progress)
        _raise_first(processes.values())
    finally:
        end(list(processes))
    if not planned.keys() <= outcomes.keys():
        raise InputError("the worker processes were killed (out of memory?): the same command goes on")


def _counted(study: Study, settings: Any, runs: Runs, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    outcomes = runs.outcomes()
    planned = study.plan(settings, outcomes)
    progress(len(planned.keys() & outcomes.keys()), len(planned))
    return outcomes, planned


def _raise_first(connections: Iterable[Connection]) -> None:
    for connection in connections:
        with suppress(EOFError):
            if connection.poll():
                raise connection.recv()


def _worker(plan: Plan, perform: Perform, settings: Any, url: str, name: str, connection: Connection) -> None:
    signal.signal(signal.SIGTERM, _put_down)
    end_with_parent()
    try:
        _work(plan, perform, settings, Runs(url, name))
    except Exception as error:
        connection.send(_portable(error))


def _put_down(*_: Any) -> NoReturn:
    """Leave the run that is being performed to others, at once."""
    sys.exit(1)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or another with its text where it cannot go to another process."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("".join(traceback.format_exception(error)))
    return copy


def _save(
    study: Study,
    scale: Scale,
    settings: Any,
    findings: Findings,
    records: list[dict[str, Any]],
    folder: Path,
    storage: str | None,
) -> None:
    """The summary comes last: it tells that the folder is finished."""
    where = environment()
    if storage:  # it may hold a password
        where["command"] = where["command"].replace(storage, "URL")
    write(folder / "results.jsonl", "".join(json.dumps(plain(record)) + "\n" for record in records))
    files = {**{f"{figure.name}.svg": figure.svg for figure in findings.figures}, **findings.pages}
    for file, text in files.items():
        write(folder / file, text)
    write(folder / "table.md", markdown(study, scale, settings, findings, where))
    write(folder / "report.html", page(study, scale, settings, findings, where))
    summary = {
        "study": study.name,
        "source": study.source,
        "scale": scale,
        "findings": [asdict(item) for item in findings.findings],
        "runs": len(records),
        "files": list(files),
        "environment": where,
        "finished": time.strftime("%Y-%m-%d"),
    }
    write(folder / "summary.json", json.dumps(plain(summary), indent=1) + "\n")
