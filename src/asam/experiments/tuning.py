"""rho, and if asked for eta and the bias policy, found for a user's own training on validation data.

A search proposes values, starting from those that others found to work; a trial whose validation error falls behind is
stopped. The best few are trained again from fresh seeds, and those runs decide.
"""

import json
import math
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from .. import __version__
from . import InputError
from .database import check, file_url
from .environment import environment
from .files import claim_folder, held, plain, write
from .runs import Runs
from .search import FINISHED, Search, last_error, offer_starts, opened_study, searched
from .trainings import Choice, find
from .workers import work_together

FIRST_CONFIRMING_SEED = 1000
DATABASE = "trials.sqlite3"


@dataclass(frozen=True)
class Confirming:
    """A choice trained again from a fresh seed."""

    choice: Choice
    seed: int


def claim(search: Search, folder: Path, storage: str | None, *, force: bool) -> None:
    """Make the folder ready for the results.

    Raises:
        InputError: it holds something else, or the target or the storage cannot be used.
    """
    find(search.target, search.run)
    if storage:
        check(storage)
    config = {"asam": __version__, **asdict(search)}
    with held(folder, wait=True):
        claim_folder(folder, config, last="tune.json", ours=(f"{DATABASE}*", "tune.json.part"), force=force)


def tune(
    search: Search, folder: Path, storage: str | None, workers: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Search, confirm, and write ``tune.json`` into the folder, which :func:`claim` has made ready.

    Raises:
        InputError: the training failed, or no trial came to an end with a finite validation error.
    """
    url = storage or file_url(folder / DATABASE)
    runs = Runs(url, search.name("confirming"))
    nothing_done = False
    try:
        with opened_study(search, url) as study:
            offer_starts(search, study)

            def look() -> bool:
                finished = len(study.get_trials(deepcopy=False, states=FINISHED))
                confirming, outcomes = _confirming(search, study), runs.outcomes()
                progress(min(finished, search.trials) + len(outcomes), search.trials + len(confirming))
                return finished >= search.trials and confirming.keys() <= outcomes.keys()

            try:
                if workers == 1:
                    _work(search, url, look)
                else:
                    work_together(_work, (search, url), workers, look)
            except InputError:
                states = {trial.state for trial in study.get_trials(deepcopy=False)}
                nothing_done = states <= {TrialState.WAITING, TrialState.FAIL}
                raise
            found = _result(search, study.get_trials(states=FINISHED), runs.outcomes())
    finally:
        runs.close()
        if nothing_done and storage is None:  # nothing to go on with
            _remove_database(folder)
            (folder / "config.json").unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
    if storage:  # it may hold a password
        found["environment"]["command"] = found["environment"]["command"].replace(storage, "URL")
    with held(folder, wait=True):  # commands that share the trials end together
        write(folder / "tune.json", json.dumps(plain(found), indent=1) + "\n")
    if storage is None:
        _remove_database(folder)
    return found


def _remove_database(folder: Path) -> None:
    for file in sorted(folder.glob(f"{DATABASE}*"), reverse=True):  # no log without its database
        file.unlink(missing_ok=True)


def _work(search: Search, url: str, look: Callable[[], object] = lambda: None) -> None:
    """Search until there are trials enough, then train the best few again; any number of workers may."""
    train = find(search.target, search.run)
    seen: set[int] = set()
    with opened_study(search, url) as study:
        while not searched(search, study, train, seen):
            look()
        confirming = _confirming(search, study)
    if not confirming:
        raise InputError(f"{search.target}: no trial came to an end with a finite validation error")
    with closing(Runs(url, search.name("confirming"))) as runs:
        look()
        runs.work(confirming, lambda run: last_error(train, run.choice, run.seed, None), look)


def _confirming(search: Search, study: optuna.Study) -> dict[str, Confirming]:
    """The runs that train the best trials again."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finite = [trial for trial in trials if math.isfinite(trial.values[0])]
    return {
        f"trial {trial.number}, seed {seed}": Confirming(search.choice(trial.params), seed)
        for trial in sorted(finite, key=lambda trial: trial.values[0])[: search.confirmed]
        for seed in range(FIRST_CONFIRMING_SEED, FIRST_CONFIRMING_SEED + search.seeds)
    }


def _result(search: Search, trials: list[FrozenTrial], outcomes: dict[str, float]) -> dict[str, Any]:
    table = []
    for trial in trials:
        errors = [error for name, error in outcomes.items() if name.startswith(f"trial {trial.number},")]
        row = {"trial": trial.number, **asdict(search.choice(trial.params)), "error": trial.value}
        row |= {"pruned": trial.state == TrialState.PRUNED, "reports": len(trial.intermediate_values)}
        if errors:
            mean = fmean(errors)
            sd = stdev(errors) if len(errors) > 1 and math.isfinite(mean) else math.nan
            row |= {"mean": mean, "sd": sd, "n": len(errors)}
        table.append(row)
    best = min((row for row in table if "mean" in row), key=lambda row: row["mean"])
    if not math.isfinite(best["mean"]):
        raise InputError(f"{search.target}: no choice has a finite validation error from fresh seeds")
    return {
        "best": {name: best[name] for name in ("rho", "eta", "bias")},
        "trials": table,
        "search": asdict(search),
        "environment": environment(),
    }


def terminal_table(found: dict[str, Any]) -> Table:
    """The trials, from the best: those that were trained again first."""
    seeds = found["search"]["seeds"]
    table = Table("rho", "eta", "bias", "error", "reports", f"{seeds} fresh seed{'s'[: seeds != 1]}")
    errors = {row["trial"]: math.inf if row["error"] is None else row["error"] for row in found["trials"]}
    rows = sorted(found["trials"], key=lambda row: (row.get("mean", math.inf), row["pruned"], errors[row["trial"]]))
    for row in rows:
        sd = f" ± {row['sd']:.2g}" if math.isfinite(row.get("sd", math.nan)) else ""
        again = f"{row['mean']:.4g}{sd}" if "mean" in row else ""
        error = "-" if row["error"] is None else f"{row['error']:.4g}"  # stopped before it reported any
        reports = f"{row['reports']}, stopped" if row["pruned"] else str(row["reports"])
        table.add_row(f"{row['rho']:.3g}", f"{row['eta']:.3g}", row["bias"], error, reports, again)
    return table
