"""What sharpness-aware minimization costs on the CPU, beside plain SGD and beside another implementation.

    python benchmarks/bench.py [--quick] [--large] [--out DIR]

Five measurements: training steps (steps.py), those of adapters (adapters.py), ascent and restore alone (ascent.py),
how these grow (growth.py), and sharpness (sharpness.py). One thread on one core, CPU time, all variants once in each
round, ratios within a round: medians and bootstrap 95 % intervals (measure.py). Each table is made by a process of its
own, whose memory has no past. The row "again" is the yardstick once more: no difference smaller than its interval means
anything. The other implementations are pytorch_optimizer's SAM with adaptive=True, as it is and with foreach=True, and
in the steps sam_pytorch's, which is not adaptive.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from adapters import measure_adapters
from ascent import measure_ascent
from growth import measure_growth
from measure import hardware, in_a_process_of_its_own, settle
from rich.console import Console
from rich.table import Table
from sharpness import measure_sharpness
from steps import measure_steps
from workloads import weights, workloads

import asam


def _of_a_network(measure: Callable[..., dict[str, Any]], i: int, *arguments: Any) -> list[dict[str, Any]]:
    return [measure(workloads()[i], *arguments)]


def _of_a_list(i: int, budget: float) -> list[dict[str, Any]]:
    return [measure_ascent(weights()[i](), budget)]


def _show(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"{result['title']} ({result['rounds']} rounds)", title_justify="left")
    for key in result["rows"][0]:
        table.add_column(key, justify="left" if key == "variant" else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*(_cell(key, value) for key, value in row.items()))
    console.print(table)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "norm error":
        return f"{value:.0e}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown(run: dict[str, Any], results: list[dict[str, Any]]) -> str:
    lines = ["# What a step costs: all tables", "", ", ".join(f"{key}: {value}" for key, value in run.items())]
    for result in results:
        keys = list(result["rows"][0])
        lines += ["", f"## {result['title']}", "", f"{result['rounds']} rounds.", ""]
        lines += [f"| {' | '.join(keys)} |", f"| {' | '.join('---' if key == 'variant' else '--:' for key in keys)} |"]
        lines += [f"| {' | '.join(_cell(key, row[key]) for key in keys)} |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of ASAM on the CPU.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="about a minute: too short to conclude anything from")
    parser.add_argument("--large", action="store_true", help="the parameters of GPT-2 124M too; needs 4 GB")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write bench.json and bench.md there as well")
    arguments = parser.parse_args()
    if arguments.out and not arguments.out.is_dir():
        parser.error(f"--out: no such directory: {arguments.out}")
    settle()

    console = Console(width=None if sys.stdout.isatty() else 120)
    run = {
        "hardware": hardware(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "asam": asam.__version__,
        "pytorch_optimizer": version("pytorch_optimizer"),
        "sam_pytorch": version("sam_pytorch"),
        "command": shlex.join(["python", *sys.argv]),
    }
    console.print(", ".join(f"{key}: {value}" for key, value in run.items()), highlight=False, soft_wrap=True)
    torch.manual_seed(0)
    budget = 1.0 if arguments.quick else 12.0
    networks = range(len(workloads()))
    lists = weights() if arguments.large else weights()[:-1]
    amounts = ((20, 80), (16,), (8, 32), (1,), (8,))
    shares = (1, 1, 1, 3, 4)  # of the last two networks a round takes seconds
    calls: list[Callable[[], list[dict[str, Any]]]] = [
        *(partial(_of_a_network, measure_steps, i, share * budget) for i, share in enumerate(shares)),
        partial(_of_a_network, measure_adapters, len(networks) - 1, budget),  # the transformer
        *(partial(_of_a_list, i, budget) for i in range(len(lists))),
        partial(measure_growth, budget),
        *(
            partial(_of_a_network, measure_sharpness, i, batches, budget)
            for i in networks
            for batches in ((1,) if arguments.quick else amounts[i])
        ),
    ]
    results = []
    for call in calls:
        for table in in_a_process_of_its_own(call):
            results.append(table)
            _show(console, table)
    if arguments.out:
        (arguments.out / "bench.json").write_text(
            json.dumps({**run, "tables": results}, default=asdict, indent=2) + "\n"
        )
        (arguments.out / "bench.md").write_text(_markdown(run, results))


if __name__ == "__main__":
    main()
