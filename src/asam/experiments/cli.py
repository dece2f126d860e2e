"""The command line. Bad input gives one line on standard error and exit code 2."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import __version__
from . import InputError
from .files import held, plain
from .options import with_run_options
from .run import LARGEST
from .terminal import counted, last_words, print_table, progress, refusal, refusals, say

INTERRUPTED = 130
MANY = 10_000  # runs to name in one plan

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        print(f"asam {__version__}")
        raise typer.Exit


@app.callback()
def asam(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Adaptive Sharpness-Aware Minimization: train, measure and look."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What is installed here, and which optional parts work."""
    from .doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found))
        return
    width = max(len(name) for rows in found.values() for name in rows)
    for section, rows in found.items():
        print(section)
        for name, state in rows.items():
            print(f"  {name:{width}}  {state}")


@app.command()
def compare(
    dataset: Annotated[Literal["digits", "fashion-mnist"], typer.Option(help="Real data.")] = "digits",
    model: Annotated[Literal["mlp", "cnn"], typer.Option(help="The network; cnn has batch norm.")] = "mlp",
    noise: Annotated[float, typer.Option(help="Share of wrong training labels, 0 up to 1.")] = 0.4,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1, max=MANY)] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs (SGD at equal compute: twice).", min=1, max=10**6)] = 60,
    rho_sam: Annotated[float, typer.Option(help="Neighborhood size of SAM.")] = 0.4,
    rho_asam: Annotated[float, typer.Option(help="Neighborhood size of ASAM.")] = 3.0,
    data_dir: Annotated[str | None, typer.Option(help="Folder of the files of fashion-mnist.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("asam-compare"),
    workers: Annotated[int, typer.Option(help="Processes.", min=1, max=1024)] = max(1, min(8, os.cpu_count() or 1)),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train with SGD, SAM and ASAM, and see whether rho transfers.

    SGD trains with twice the epochs as well, which is equal compute. Writes report.html, results.json and every
    run into --out. Killed and started again, it goes on where it stopped.
    """
    if not 0 <= noise < 1:
        raise InputError(f"--noise must be at least 0 and less than 1, got {noise:g}")
    for name, rho in (("--rho-sam", rho_sam), ("--rho-asam", rho_asam)):
        if not 0 < rho < LARGEST:
            raise InputError(f"{name} must be a number > 0 and < {LARGEST:g}, got {rho:g}")

    from .compare import Comparison, cost, execute, prepare, results, verdict
    from .data import load
    from .files import write
    from .report import page, terminal_table

    comparison = Comparison(dataset, model, noise, seeds, epochs, rho_sam, rho_asam, data_dir)
    load(dataset, data_dir, noise, 0)
    with held(out):
        prepare(comparison, out, force=force)
        runs = comparison.runs()
        with progress(f"{len(runs)} runs", sum(map(cost, runs.values()))) as advance:
            outcomes = execute(comparison, out, workers, advance)
        found = results(comparison, outcomes)
        write(out / "report.html", page(found))
        write(out / "results.json", json.dumps(found, indent=1))
    if as_json:
        print(json.dumps(found))
        return
    print_table(terminal_table(found))
    for sentence in verdict(found):
        say(sentence)
    say(f"Written: {out / 'report.html'}, {out / 'results.json'}", wrapped=False)


MODEL_HELP = "module:function that returns (model, loss_fn, data[, held_out]), for a checkpoint of your own."
Examples = Annotated[int, typer.Option(help="Training examples to measure on.", min=1)]
Function = Annotated[str | None, typer.Option("--model", help=MODEL_HELP)]
NormalizeLogits = Annotated[bool, typer.Option("--normalize-logits", help="Take the scale of a run's logits away.")]


@app.command()
def measure(
    target: Annotated[str, typer.Argument(help="A run of asam compare or train, a checkpoint, or module:function.")],
    model: Function = None,
    rho: Annotated[list[float], typer.Option(help="A size for sharpness; may be repeated.")] = [0.05, 0.1, 0.2],  # noqa: B006
    adaptive_rho: Annotated[list[float], typer.Option(help="One for adaptive sharpness.")] = [0.5, 1.0, 2.0],  # noqa: B006
    normalization: Annotated[
        Literal["elementwise", "filterwise", "layerwise"], typer.Option(help="T_w of adaptive sharpness.")
    ] = "elementwise",
    eta: Annotated[float, typer.Option(help="Stabilizer of T_w; 0 for scale invariance.")] = 0.0,
    bias: Annotated[Literal["scaled", "unscaled", "fixed"], typer.Option(help="What holds for biases.")] = "scaled",
    m: Annotated[int | None, typer.Option(help="m-sharpness: examples in a batch (default: all).", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Ascent steps.", min=1)] = 20,
    restarts: Annotated[int, typer.Option(help="Ascents, the best of which counts.", min=1)] = 1,
    samples: Annotated[int, typer.Option(help="Draws of the average case, an even number.", min=2)] = 32,
    eigenvalues: Annotated[int, typer.Option(help="How many top eigenvalues.", min=1)] = 3,
    examples: Examples = 1024,
    seed: Annotated[int, typer.Option(help="Of starts, draws, random vectors and your function.")] = 0,
    normalize_logits: NormalizeLogits = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Sharpness, curvature and bounds of a trained network, in a table.

    With p = inf and in the average case the neighborhood is rho / sqrt(k) in every weight, k the number of weights.
    """
    for name, values in (("--rho", rho), ("--adaptive-rho", adaptive_rho)):
        for value in values:
            if not 0 < value < LARGEST:
                raise InputError(f"{name} must be a number > 0 and < {LARGEST:g}, got {value:g}")
    if not 0 <= eta < LARGEST:
        raise InputError(f"--eta must be a number >= 0 and < {LARGEST:g}, got {eta:g}")
    if samples % 2:
        raise InputError(f"--samples must be even, got {samples}")

    from .measuring import Settings, summary, terminal_table
    from .measuring import measure as measured
    from .targets import find

    with refusals():
        (found_target,) = find([target], model, examples=examples, seed=seed, normalize_logits=normalize_logits)
    settings = Settings(
        rhos=tuple(sorted(rho)),
        adaptive_rhos=tuple(sorted(adaptive_rho)),
        normalization=normalization,
        eta=eta,
        bias=bias,
        m=m,
        steps=steps,
        restarts=restarts,
        samples=samples,
        eigenvalues=eigenvalues,
        examples=examples,
        seed=seed,
    )
    with progress(f"measuring {found_target.name}", settings.passes()) as advance, refusals():
        found = measured(found_target, settings, advance)
    if as_json:
        print(json.dumps(plain(found)))
        return
    for line in summary(found):
        say(line)
    print_table(terminal_table(found))
    for reason in found["left_out"]:
        say(reason)
    for bound in found["bounds"]:
        say(bound["explanation"])


@app.command()
def landscape(
    targets: Annotated[
        list[str], typer.Argument(help="Runs of asam compare or train, checkpoints, or module:function.")
    ],
    model: Function = None,
    points: Annotated[int, typer.Option(help="Points of a plane along each axis.", min=3, max=1001)] = 25,
    span: Annotated[float, typer.Option(help="How far, in units of the filters' norms.")] = 1.0,
    examples: Examples = 1024,
    seed: Annotated[int, typer.Option(help="Of the random directions and your function.")] = 0,
    normalize_logits: NormalizeLogits = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("asam-landscape"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results in --out.")] = False,
) -> None:
    """Slices of the loss landscape, and a page to turn them in 3-D.

    Of several networks, also the ways from one to the next.
    """
    if not 0 < span < LARGEST:
        raise InputError(f"--span must be a number > 0 and < {LARGEST:g}, got {span:g}")

    from .landscapes import check_free, compute, file_name, passes, save
    from .targets import find

    with refusals():
        found = find(targets, model, examples=examples, seed=seed, normalize_logits=normalize_logits)
    names = [file_name(target.name) for target in found]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two targets are called {name}: rename a file, or measure them apart")
    with held(out):
        check_free(out, force=force)
        many = f"{len(found)} landscapes" if len(found) > 1 else "1 landscape"
        with progress(many, passes(found, points)) as advance, refusals():
            slices = compute(found, points, span, seed, advance)
        for pair, reason in slices.apart.items():
            print(f"asam: no way from {pair}: {reason}", file=sys.stderr)
        with refusals():
            files = save(slices, out)
    say(f"Written: {', '.join(map(str, files))}", wrapped=False)


@app.command()
@with_run_options
def train(
    config: Annotated[Path | None, typer.Option(help="TOML or JSON file with values, which options override.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("asam-train"),
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 500,
    log: Annotated[Literal["none", "mlflow", "wandb"], typer.Option(help="Log there as well.")] = "none",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    *,
    options: dict[str, Any],
) -> None:
    """Train one network. Killed and started again, it goes on from its checkpoint, to the same numbers on the CPU.

    Writes config.json, metrics.jsonl, tensorboard/ and checkpoints into --out, run.json and run.pt at the end. On
    several GPUs or machines: torchrun --nproc-per-node 4 -m asam train ..., or accelerate launch.
    """
    from . import sessions
    from .run import as_run, read_run

    values = (read_run(config) if config else {}) | options
    if values.get("method", "asam") != "sgd" and "rho" not in values:
        values["rho"] = 0.05 if values.get("method") == "sam" else 0.5
    run = as_run(values, str(config) if config else "the options")
    first = os.environ.get("RANK", "0") == "0"

    def begun() -> None:
        if first and not as_json:
            print(json.dumps(plain(asdict(run))))

    with counted(f"{run.method} on {run.dataset}", "steps", shown=first) as progress:
        outcome = sessions.execute(
            run, out, checkpoint_every=checkpoint_every, log=log, force=force, begun=begun, progress=progress
        )
    if outcome is None:
        return
    if as_json:
        print(json.dumps(plain(outcome)))
        return
    for name, value in outcome.items():
        if isinstance(value, float):
            print(f"{name}: {value:.4g}")
    print(f"Written: {out / 'run.json'}, {out / 'run.pt'}")


@app.command()
def tune(
    target: Annotated[str, typer.Argument(help="module:function of your own, or a file of values as asam train has.")],
    like: Annotated[str, typer.Option(help="Start from the rho that worked for this; see below.")] = "anything",
    trials: Annotated[int, typer.Option(help="Trials of the search.", min=1, max=MANY)] = 20,
    confirmed: Annotated[int, typer.Option(help="Best trials that are trained again.", min=1, max=MANY)] = 3,
    seeds: Annotated[int, typer.Option(help="Fresh seeds for each of those.", min=1, max=MANY)] = 3,
    tune_eta: Annotated[bool, typer.Option("--tune-eta", help="Search eta as well.")] = False,
    tune_bias: Annotated[bool, typer.Option("--tune-bias", help="Search the bias policy as well.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("asam-tune"),
    storage: Annotated[str | None, typer.Option(help="Database that shares the trials, as in reproduce.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1, max=1024)] = 1,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Find rho on validation data, for your own model and data.

    Your function trains once: function(asam, seed, report). asam(model) is the ASAM of the trial, for
    asam(model).backward(closure); report(validation_error) is called after every epoch, and ends a trial that falls
    behind. The best trials are trained again from fresh seeds, and these decide.

    --like: cifar10, cifar100, tiny-imagenet, imagenet, vit, vit-strong-augmentation, translation, fine-tuning, or
    anything.
    """
    from . import trainings, tuning
    from .search import STARTS, Search

    if like not in STARTS:
        raise InputError(f"--like must be one of {', '.join(STARTS)}, got {like}")
    run = trainings.read(target)
    search = Search(target, trials, confirmed, seeds, STARTS[like], tune_eta, tune_bias, run)
    tuning.claim(search, out, storage, force=force)
    with counted(f"tuning {target}", "trials") as progress:
        found = tuning.tune(search, out, storage, workers, progress)
    if as_json:
        print(json.dumps(plain(found)))
        return
    print_table(tuning.terminal_table(found))
    best = found["best"]
    if run is None:
        say(f"ASAM(model, rho={best['rho']:.3g}, eta={best['eta']:.3g}, bias={best['bias']!r})")
    else:  # whose geometry is that of its file
        options = f"--rho {best['rho']:.3g} --eta {best['eta']:.3g} --bias {best['bias']}"
        say(f"asam train --config {target} {options}", wrapped=False)
    say(f"Written: {out / 'tune.json'}", wrapped=False)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="One of the studies above.")],
    quick: Annotated[bool, typer.Option("--quick", help="In miniature, in seconds: shows that it runs.")] = False,
    paper: Annotated[bool, typer.Option("--paper", help="At the paper's own scale: its data, and a GPU.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.", min=1, max=MANY)] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of the data, where a study needs one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results (default: asam-NAME).")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database that shares the runs: postgresql+psycopg://user@host/name.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1, max=1024)] = max(1, min(8, os.cpu_count() or 1)),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results in --out.")] = False,
) -> None:
    """Reproduce a figure or table of the paper, and say if it holds.

    Studies: geometry, toy, invariance, rescaling, correlation, rho, noise, images, imagenet, translation, bound, bias,
    cost.

    Writes config.json, results.jsonl (a line a run), summary.json, table.md, plots and report.html into --out. Killed
    and started again, it goes on where it stopped. The same command on other machines with the same --storage shares
    the runs.
    """
    from . import reproduce as reproduction

    if quick and paper:
        raise InputError("--quick and --paper exclude each other")
    if name not in reproduction.STUDIES:
        raise InputError(f"there is no study {name}: choose one of {', '.join(reproduction.STUDIES)}")
    study = reproduction.find(name)
    scale: Literal["quick", "laptop", "paper"] = "quick" if quick else "paper" if paper else "laptop"
    settings = reproduction.configured(study, scale, seeds=seeds, data_dir=data_dir)
    folder = out or Path(f"asam-{name}")
    reproduction.claim(study, scale, settings, folder, storage, force=force)
    with counted(f"{name}, {scale} scale") as progress:
        findings = reproduction.reproduce(study, scale, settings, folder, storage, workers, progress)
    for item in findings.findings:
        say(item.sentence())
    say(f"Written: {folder / 'report.html'}, {folder / 'table.md'}", wrapped=False)


def run() -> int:
    """Run the command line and return its exit code."""
    try:
        code = typer.main.get_command(app).main(prog_name="asam", standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            resumes = (
                "; the same command goes on from here"
                if sys.argv[1:2] in (["compare"], ["reproduce"], ["train"], ["tune"])
                else ""
            )
            last_words(f"interrupted{resumes}")
        return code if isinstance(code, int) else 0
    except (InputError, OSError) as error:
        message = refusal(error)
    except Exception as error:
        # typer raises its parser's own errors, whose class depends on its version
        if not hasattr(error, "format_message"):
            raise
        place = getattr(getattr(error, "ctx", None), "command_path", "asam")
        message = error.format_message()
        message += f"{'' if message.endswith(('.', '?')) else '.'} See {place} --help."
    last_words(message)
    return 2
