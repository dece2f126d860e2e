"""What a study is: runs that are planned, performed on their own, and put together into findings.

A study names its runs from its settings and the outcomes so far, so that a choice made on validation data can decide
the runs that follow. The verdict on a claim is computed from an interval, by one rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .runs import Together

REPRODUCES = "reproduces at this scale"
CONTRADICTED = "does not reproduce at this scale"
UNDECIDED = "not decided at this scale"
Scale = Literal["quick", "laptop", "paper"]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it: the quantity it is about, its interval where there is one, the verdict.

    The interval is a 95 % interval, or where a study says so the range over all runs.

    ``n`` counts what the interval is taken over: seeds, networks, starting points.
    """

    claim: str
    quantity: str
    estimate: float
    low: float | None
    high: float | None
    n: int
    verdict: str

    def sentence(self) -> str:
        """The finding in words."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.claim}: {self.verdict}. {self.quantity}: {self.estimate:.3g}{interval}, n = {self.n}."


def finding(
    claim: str,
    quantity: str,
    estimate: float,
    low: float | None,
    high: float | None,
    n: int,
    *,
    holds: Literal["below", "above"],
    limit: float = 0.0,
) -> Finding:
    """The verdict on the claim that the quantity lies below (or above) a limit.

    It reproduces where the whole interval lies there, does not where all of it lies elsewhere, and is undecided where
    the interval holds the limit, or where there is no interval because a single run was made.

    Example:
        >>> finding("ASAM beats SGD", "difference", -2.0, -3.0, -1.0, 10, holds="below").verdict
        'reproduces at this scale'
        >>> finding("ASAM beats SGD", "difference", -2.0, -5.0, 1.0, 10, holds="below").verdict
        'not decided at this scale'
    """
    if low is None or high is None:
        verdict = UNDECIDED
    elif holds == "below":
        verdict = REPRODUCES if high < limit else CONTRADICTED if low >= limit else UNDECIDED
    else:
        verdict = REPRODUCES if low > limit else CONTRADICTED if high <= limit else UNDECIDED
    return Finding(claim, quantity, estimate, low, high, n, verdict)


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Figure:
    """A plot as SVG text; ``name`` is that of its file."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Findings:
    """What a study found. ``pages`` are further files by their names; ``notes`` tell how to read it."""

    findings: Sequence[Finding]
    tables: Sequence[Table]
    figures: Sequence[Figure]
    notes: Sequence[str] = ()
    pages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A figure or table of the paper as runs that can be repeated.

    Args:
        name, title: of the command line and of the page.
        source: the figure or table.
        settings: frozen dataclasses by scale. Where they have a field ``data_dir`` or ``seeds``, the command line may
            set it.
        plan: from settings and outcomes so far, every run that can be named by now: a frozen dataclass that tells it
            everything, and whose fields are what JSON can hold.
        perform: a run's outcome, which JSON can hold. It runs in a process of its own with one thread, and so it and
            plan are functions of a module.
        together: how several runs are performed at once, where that is faster; of a module's functions as well.
        report: settings and all outcomes made into findings.
        check: raises InputError where the settings cannot run, because data is missing for example.
    """

    name: str
    title: str
    source: str
    settings: Mapping[Scale, Any]
    plan: Callable[[Any, Mapping[str, Outcome]], dict[str, Any]]
    perform: Callable[[Any], Outcome]
    report: Callable[[Any, Mapping[str, Outcome]], Findings]
    check: Callable[[Any], object] = lambda settings: None
    together: Together | None = None
