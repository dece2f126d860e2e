"""The command line. Bad input gives one line on standard error and exit code 2."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import InputError

INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def asam() -> None:
    """Adaptive Sharpness-Aware Minimization: experiments on real data."""


@app.command()
def compare(
    dataset: Annotated[Literal["digits", "fashion-mnist"], typer.Option(help="Real data.")] = "digits",
    model: Annotated[Literal["mlp", "cnn"], typer.Option(help="The network; cnn has batch norm.")] = "mlp",
    noise: Annotated[float, typer.Option(help="Share of wrong training labels, 0 up to 1.")] = 0.4,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs (SGD at equal compute: twice).", min=1)] = 60,
    rho_sam: Annotated[float, typer.Option(help="Neighborhood size of SAM.")] = 0.4,
    rho_asam: Annotated[float, typer.Option(help="Neighborhood size of ASAM.")] = 3.0,
    data_dir: Annotated[str | None, typer.Option(help="Folder of the files of fashion-mnist.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("asam-compare"),
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = max(1, min(8, os.cpu_count() or 1)),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train with SGD, SGD at equal compute, SAM and ASAM, and see whether rho transfers.

    Writes report.html, results.json and every run into --out. Killed and started again, it goes on where it stopped.
    """
    if not 0 <= noise < 1:
        raise InputError(f"--noise must be at least 0 and less than 1, got {noise:g}")
    for name, rho in (("--rho-sam", rho_sam), ("--rho-asam", rho_asam)):
        if not (0 < rho < math.inf):
            raise InputError(f"{name} must be a finite number > 0, got {rho:g}")

    from .compare import Comparison, cost, execute, prepare, results, verdict, write
    from .data import load
    from .report import page, terminal_table

    comparison = Comparison(dataset, model, noise, seeds, epochs, rho_sam, rho_asam, data_dir)
    load(dataset, data_dir, noise, 0)
    prepare(comparison, out, force=force)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        runs = comparison.runs()
        task = progress.add_task(f"{len(runs)} runs", total=sum(map(cost, runs.values())))
        outcomes = execute(comparison, out, workers, lambda passes: progress.advance(task, passes))
    found = results(comparison, outcomes)
    write(out / "report.html", page(found))
    write(out / "results.json", json.dumps(found, indent=1))
    if as_json:
        print(json.dumps(found))
        return
    console = Console()
    console.print(terminal_table(found))
    for sentence in verdict(found):
        console.print(sentence, highlight=False)
    console.print(f"Written: {out / 'report.html'}, {out / 'results.json'}", highlight=False, soft_wrap=True)


def run() -> int:
    """Run the command line and return its exit code."""
    try:
        code = typer.main.get_command(app).main(prog_name="asam", standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            print("asam: interrupted; the same command goes on from here", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except InputError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the results'}: {error.strerror or error}"
    except Exception as error:
        # typer raises its parser's own errors, whose class depends on its version
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(error.format_message().split()) or "no command given: see asam --help"
    print(f"asam: {message}", file=sys.stderr)
    return 2
