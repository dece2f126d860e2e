"""The comparison as one self-contained page, and as a table for the terminal."""

from typing import Any

from rich.table import Column, Table

from . import html, plots
from .compare import verdict
from .statistics import pair

HEADINGS = ("method", "test error %", "training error %", "generalization gap", "gradient passes", "time per step")
GENERAL = (
    "Mean and standard deviation over seeds (of a single one, its value), at the last epoch. A seed fixes split, noisy "
    "labels, initial weights and batches, the same for every method.",
    "Gradient passes and time per step are relative to SGD; the time is the process's CPU time, median over seeds.",
    "SGD with early stopping takes the epoch with the lowest error on clean validation data. It and SGD with a strong "
    "weight decay are the baselines that ASAM has to beat.",
    "The default rho were chosen for digits with 40 % noise, on other seeds. Another data set or model wants its own.",
)
NOISY = (
    "The training labels are noisy, the test labels are clean. The generalization gap is the error on test labels with "
    "the same noise, minus the training error.",
    "The gain over plain SGD is mostly a gain over memorizing noisy labels.",
)


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table, a row a method, as text."""
    table: list[tuple[str, ...]] = []
    for label, method in found["methods"].items():
        gap = pair(method["generalization_gap"]) if "generalization_gap" in method else "-"
        numbers = (pair(method["test_error"]), pair(method["train_error"]), gap)
        table.append((label, *numbers, f"{method['cost']:.3g}x", f"{method['time_per_step']:.2f}x"))
    return table


def terminal_table(found: dict[str, Any]) -> Table:
    """The table for the terminal."""
    table = Table(*(Column(heading, overflow="fold") for heading in HEADINGS))
    for row in rows(found):
        table.add_row(*row, style="bold" if row[0] == "ASAM" else None)
    return table


def page(found: dict[str, Any]) -> str:
    """The page, HTML with the plots inside; it loads nothing."""
    comparison, environment = found["comparison"], found["environment"]
    summary = (
        f"{comparison['dataset']}, {comparison['model']}, {comparison['noise']:.0%} label noise, "
        f"{_count(comparison['seeds'], 'seed')}, {_count(comparison['epochs'], 'epoch')}; "
        f"SAM rho {comparison['rho_sam']:g}, ASAM rho {comparison['rho_asam']:g}"
    )
    figures = (
        ("Test error", plots.errors(found), "A dot a seed, grey lines between the same seeds; diamonds: mean and sd."),
        (
            "Does rho transfer?",
            plots.transfer(found),
            "The same rho on networks that start as the same function, with one layer multiplied by a and the next "
            "divided by it. ASAM measures its neighborhood in units of the weights, SAM does not.",
        ),
        ("Training", plots.curves(found), "Mean and sd over seeds, over gradient passes: equal compute is equal x."),
    )
    body = html.table(HEADINGS, rows(found)) + html.bullets(verdict(found))
    body += "".join(html.figure(title, svg, caption) for title, svg, caption in figures)
    notes = GENERAL + NOISY if comparison["noise"] else GENERAL
    body += "<h2>How to read this</h2>" + html.bullets(notes) + html.made_with(environment)
    return html.document("SGD, SAM and ASAM", summary, body)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
