"""The comparison as one self-contained page, and as a table for the terminal."""

from html import escape
from typing import Any

from rich.table import Table

from . import plots
from .compare import verdict
from .statistics import mean_sd

HEADINGS = ("method", "test error %", "training error %", "generalization gap", "gradient passes", "time per step")
NOTES = (
    "Mean and standard deviation over seeds, at the last epoch. A seed fixes split, noisy labels, initial weights and "
    "batches, the same for every method.",
    "The training labels are noisy, the test labels are clean. The generalization gap is the error on test labels with "
    "the same noise, minus the training error.",
    "Gradient passes and time per step are relative to SGD; the time is the process's CPU time, median over seeds.",
    "SGD with early stopping takes the epoch with the lowest error on clean validation data. It and SGD with a strong "
    "weight decay are the baselines that ASAM has to beat: the gain over plain SGD is mostly a gain over memorizing "
    "noisy labels.",
    "The default rho were chosen for digits with 40 % noise, on other seeds. Another data set or model wants its own.",
)
STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#0f172a;background:#f8fafc;margin:0}
main{max-width:900px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:0 0 4px} h2{font-size:1.15rem;margin:32px 0 8px} p,li{overflow-wrap:anywhere}
figure{margin:0;background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:12px}
figure svg{width:100%;height:auto;display:block} figcaption{color:#475569;font-size:.88rem;margin-top:6px}
.table{overflow-x:auto;background:#fff;border:1px solid #e2e8f0;border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 9px;text-align:right;border-bottom:1px solid #e2e8f0} th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0} .asam td{font-weight:600;color:#1d4ed8}
.small{color:#475569;font-size:.88rem} code{overflow-wrap:anywhere}
"""


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table, a row a method, as text."""
    table: list[tuple[str, ...]] = []
    for label, method in found["methods"].items():
        gap = _pair(method["generalization_gap"]) if "generalization_gap" in method else "-"
        numbers = (_pair(method["test_error"]), _pair(method["train_error"]), gap)
        table.append((label, *numbers, f"{method['cost']:.3g}x", f"{method['time_per_step']:.2f}x"))
    return table


def terminal_table(found: dict[str, Any]) -> Table:
    """The table for the terminal."""
    table = Table(*HEADINGS)
    for row in rows(found):
        table.add_row(*row, style="bold" if row[0] == "ASAM" else None)
    return table


def page(found: dict[str, Any]) -> str:
    """The page, HTML with the plots inside; it loads nothing."""
    comparison, environment = found["comparison"], found["environment"]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    body = "".join(
        f'<tr class="{"asam" if row[0] == "ASAM" else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows(found)
    )
    summary = (
        f"{comparison['dataset']}, {comparison['model']}, {comparison['noise']:.0%} label noise, {comparison['seeds']} "
        f"seeds, {comparison['epochs']} epochs; SAM rho {comparison['rho_sam']:g}, ASAM rho {comparison['rho_asam']:g}"
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
    sections = "".join(
        f"<h2>{escape(title)}</h2><figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for title, svg, caption in figures
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>SGD, SAM and ASAM</title><style>{STYLE}</style></head><body><main>"
        f'<h1>SGD, SAM and ASAM</h1><p class="small">{escape(summary)}</p>'
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in verdict(found))}</ul>{sections}"
        f"<h2>How to read this</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in NOTES)}</ul>"
        f'<p class="small">asam {environment["asam"]}, torch {escape(environment["torch"])}, Python '
        f"{environment['python']}, scikit-learn {environment['scikit-learn']}, {escape(environment['hardware'])}.<br>"
        f"<code>{escape(environment['command'])}</code></p></main></body></html>\n"
    )


def _pair(values: list[float]) -> str:
    mean, sd = mean_sd(values)
    return f"{mean:.1f} ± {sd:.1f}"
