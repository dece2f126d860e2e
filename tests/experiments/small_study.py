"""A study whose runs square numbers, in two stages, and write down that they were performed.

As a program it is the command line with this study in it, named ``toy``, and with workers that count as dead soon.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from asam.experiments import InputError
from asam.experiments.study import Figure, Findings, Study, Table, finding


@dataclass(frozen=True)
class Settings:
    seconds: float  # that a run takes
    seeds: int = 6
    data_dir: str | None = None  # where runs write down that they were performed


@dataclass(frozen=True)
class Run:
    number: int
    seconds: float
    log: str | None


def plan(settings, outcomes):
    def run(number):
        return Run(number, settings.seconds, settings.data_dir)

    runs = {f"square-{number}": run(number) for number in range(settings.seeds)}
    if runs.keys() <= outcomes.keys():  # the second stage is what the first one chose
        best = max(outcome["square"] for name, outcome in outcomes.items() if name in runs)
        runs[f"best-{best}"] = run(best)
    return runs


def perform(run):
    if run.log:
        log = Path(run.log)
        with (log / "performed").open("a") as file:
            file.write(f"{run.number}\n")
        if (log / "fail").exists():
            if run.number != int((log / "performed").read_text().split()[0]):
                time.sleep(600)
            while len((log / "performed").read_text().split()) < 2:
                time.sleep(0.02)  # until another worker has a run in hand
            raise UnportableError(run.number, "asked to fail")
        if (log / "kill").exists():
            os.kill(os.getpid(), 9)
        while (log / "wait").exists():
            time.sleep(0.02)
    time.sleep(run.seconds)
    return {"square": run.number**2}


class UnportableError(Exception):
    """Cannot be unpickled."""

    def __init__(self, number, text):
        super().__init__(f"run {number}: {text}")


def report(settings, outcomes):
    total = sum(outcome["square"] for outcome in outcomes.values())
    svg = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    return Findings(
        [finding("Squares are positive", "sum", total, total - 1, total + 1, len(outcomes), holds="above")],
        [Table("Squares", ("run", "square"), [(name, str(out["square"])) for name, out in sorted(outcomes.items())])],
        [Figure("squares", "Squares", "A figure.", svg)],
        pages={"data.json": json.dumps(outcomes, sort_keys=True)},
    )


def check(settings):
    if settings.data_dir and not Path(settings.data_dir).is_dir():
        raise InputError(f"--data-dir {settings.data_dir} is no folder")


STUDY = Study(
    name="toy",
    title="Squares",
    source="No figure",
    settings={"quick": Settings(0.0), "laptop": Settings(0.4)},
    plan=plan,
    perform=perform,
    report=report,
    check=check,
)

if __name__ in ("__main__", "__mp_main__"):
    from asam.experiments import database

    database.GRACE, database.HEARTBEAT = 3, 1

if __name__ == "__main__":
    from asam.experiments.cli import run as command_line

    sys.modules["asam.experiments.studies.toy"] = SimpleNamespace(STUDY=STUDY)
    sys.exit(command_line())
