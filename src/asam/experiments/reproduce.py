"""A study from its settings to its page: plan, perform on several processes, report."""

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import InputError
from .database import check, file_url
from .environment import environment
from .files import claim_folder, held, plain, write
from .runs import Runs, Together
from .study import Findings, Outcome, Scale, Study
from .study_page import markdown, page
from .workers import work_together

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
    "cost",
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
    with closing(Runs(url, name)) as runs:
        if workers == 1:
            _work(study.plan, study.perform, study.together, settings, runs, progress)
        else:
            arguments = (study.plan, study.perform, study.together, settings, url, name)
            work_together(_worker, arguments, workers, lambda: _counted(study, settings, runs, progress))
        outcomes, records = runs.outcomes(), runs.records()
    findings = study.report(settings, {run: outcomes[run] for run in study.plan(settings, outcomes)})
    with held(folder, wait=True):  # commands that share the runs end together
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
    with held(folder, wait=True):
        config = _config(study, scale, settings)
        claim_folder(folder, config, last="summary.json", ours=ours, force=force, written=("*.svg", "*.html"))


def _files(summary: Path) -> list[str]:
    """The plots and pages that a finished study wrote beside its summary."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return [Path(file).name for file in json.loads(summary.read_text(encoding="utf-8"))["files"]]
    return []


def _config(study: Study, scale: Scale, settings: Any) -> dict[str, Any]:
    return {"study": study.name, "scale": scale, "asam": __version__, "settings": asdict(settings)}


def _work(
    plan: Plan,
    perform: Perform,
    together: Together | None,
    settings: Any,
    runs: Runs,
    progress: Progress = lambda done, planned: None,
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

        runs.work(planned, perform, done, together)


def _worker(plan: Plan, perform: Perform, together: Together | None, settings: Any, url: str, name: str) -> None:
    with closing(Runs(url, name)) as runs:
        _work(plan, perform, together, settings, runs)


def _counted(study: Study, settings: Any, runs: Runs, progress: Progress) -> bool:
    """Whether all runs are done."""
    outcomes = runs.outcomes()
    planned = study.plan(settings, outcomes)
    progress(len(planned.keys() & outcomes.keys()), len(planned))
    return planned.keys() <= outcomes.keys()


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
