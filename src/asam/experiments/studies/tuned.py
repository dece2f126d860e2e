"""Methods compared fairly: what is tuned is tuned on validation data, and fresh seeds tell how good the choice is.

A group is a setting in which all methods are compared (a level of noise, a data set). Tuning seeds and confirming
seeds do not overlap; what is reported comes from the confirming seeds alone, at the last epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isnan
from statistics import fmean
from typing import Any

from ..run import Run
from ..runs import Together
from ..statistics import pair, paired_difference
from ..study import Finding, Outcome, finding
from ..together import alike, train_together
from ..training import train

FIRST_TUNING_SEED = 1000
SPLITS = (
    "A seed draws the split too, so validation data of a tuning seed can be test data of a reported one: what is "
    "chosen there is one number. Intervals are over seeds, which share data; they tell how sure the order of the "
    "methods is on this data set."
)


@dataclass(frozen=True)
class Method:
    """In what a method's runs differ from the group's, and the values to try of the field that it tunes, if any."""

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    tunes: str | None = None
    values: Sequence[float] = ()


@dataclass(frozen=True)
class Tuning:
    """The runs of all methods in all groups; ``tune_in`` names the one group whose choice holds for all."""

    groups: Mapping[str, Run]
    methods: Sequence[Method]
    seeds: int
    tuning_seeds: int
    metric: str = "validation_error"
    lower_is_better: bool = True
    tune_in: str | None = None

    def plan(self, outcomes: Mapping[str, Outcome]) -> dict[str, Run]:
        """The tuning runs, and the confirming runs of the methods whose tuning is done."""
        runs: dict[str, Run] = {}
        for group in self.groups:
            for method in self.methods:
                if len(method.values) > 1 and self.tune_in in (None, group):
                    for value in method.values:
                        for i in range(self.tuning_seeds):
                            name, run = _tuning_name(group, method, value, i), self.run(group, method, value)
                            runs[name] = run.but(seed=FIRST_TUNING_SEED + i)
        for group in self.groups:
            for method in self.methods:
                if all(name in outcomes for name in self._tuning_names(group, method)):
                    run = self.run(group, method, self.choice(group, method, outcomes))
                    for seed in range(self.seeds):
                        runs[f"{group}/{method.label}/seed{seed}"] = run.but(seed=seed)
        return runs

    def run(self, group: str, method: Method, value: float | None) -> Run:
        """The method's run in a group, with that value of what it tunes."""
        run = self.groups[group].but(**method.changes)
        return run if method.tunes is None else run.but(**{method.tunes: value})

    def choice(self, group: str, method: Method, outcomes: Mapping[str, Outcome]) -> float | None:
        """The value with the best mean of the metric over the tuning seeds, None where there is nothing to tune.

        A mean that is nan, because a run diverged, is the worst.
        """
        if not method.values:
            return None
        if len(method.values) == 1:
            return method.values[0]
        sign = 1 if self.lower_is_better else -1

        def mean(value: float) -> float:
            names = [_tuning_name(self.tune_in or group, method, value, i) for i in range(self.tuning_seeds)]
            found = sign * fmean(outcomes[name][self.metric] for name in names)
            return inf if isnan(found) else found

        return min(method.values, key=mean)

    def chosen(self, group: str, method: Method, outcomes: Mapping[str, Outcome]) -> str:
        """The choice as text, and whether it is at the edge of what was tried."""
        value = self.choice(group, method, outcomes)
        if value is None:
            return ""
        edge = len(method.values) > 1 and value in (min(method.values), max(method.values))
        return f"{value:g}{' (edge)' if edge else ''}"

    def values(
        self, group: str, label: str, outcomes: Mapping[str, Outcome], metric: str = "test_error"
    ) -> list[float]:
        """A metric by confirming seed."""
        return [outcomes[f"{group}/{label}/seed{seed}"][metric] for seed in range(self.seeds)]

    def finding(self, group: str, a: str, b: str, outcomes: Mapping[str, Outcome], where: str) -> Finding:
        """The claim that a has the lower test error."""
        values = (self.values(group, label, outcomes) for label in (a, b))
        return lower(f"{a} has a lower test error than {b}{where}", *values)

    def rows(self, outcomes: Mapping[str, Outcome]) -> list[tuple[str, ...]]:
        """A row a method: what was chosen and the test error in every group."""
        return [
            (
                method.label,
                *(
                    cell
                    for group in self.groups
                    for cell in (
                        pair(self.values(group, method.label, outcomes)),
                        self.chosen(group, method, outcomes),
                    )
                ),
            )
            for method in self.methods
        ]

    def headings(self) -> tuple[str, ...]:
        """The headings of :meth:`rows`."""
        return ("method", *(cell for group in self.groups for cell in (f"{group}: test error %", "chosen")))

    def _tuning_names(self, group: str, method: Method) -> list[str]:
        if len(method.values) < 2:
            return []
        tuned_in = self.tune_in or group
        return [_tuning_name(tuned_in, method, value, i) for value in method.values for i in range(self.tuning_seeds)]


def lower(claim: str, a: Sequence[float], b: Sequence[float]) -> Finding:
    """The claim that a is lower than b, by the mean difference over seeds."""
    found = paired_difference(a, b)
    quantity = f"difference in points, better on {found.wins} of {found.n} seeds"
    return finding(claim, quantity, found.mean, found.low, found.high, found.n, holds="below")


def trained(run: Run) -> Outcome:
    """The outcome of a run."""
    return train(run)[0]


TOGETHER = Together(alike, train_together)


def _tuning_name(group: str, method: Method, value: float, i: int) -> str:
    return f"{group}/{method.label}/{method.tunes}={value:g}/tuning{i}"
