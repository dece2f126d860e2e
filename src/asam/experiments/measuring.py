"""Everything that is measured about one network, in one table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Column, Table

from ..geometry import Geometry
from ..measure import (
    Objective,
    asam_bound,
    average_sharpness,
    gibbs_certificate,
    hessian,
    holdout_bound,
    sam_bound,
    sharpness_profile,
    top_eigenvalues,
    trace,
    worst_case_sharpness,
)
from ..measure.derivatives import NoSecondDerivative
from ..measure.hessian import HessianOperator
from ..measure.lanczos import NotFinite
from . import InputError
from .environment import environment
from .targets import Target, counted

DELTA = 0.05
ETA = 0.01  # of the ball of ASAM's bound, which is infinite without it
SIGMAS = (0.01, 0.03, 0.1)  # of the Gibbs certificate, fixed beforehand; the best counts, at a third of delta each


@dataclass(frozen=True)
class Settings:
    """What to measure. The rho of p = inf and of the average case are these over sqrt(k): the cube inside the ball."""

    rhos: tuple[float, ...] = (0.05, 0.1, 0.2)
    adaptive_rhos: tuple[float, ...] = (0.5, 1.0, 2.0)
    normalization: str = "elementwise"
    eta: float = 0.0
    bias: str = "scaled"
    m: int | None = None
    steps: int = 20
    restarts: int = 1
    samples: int = 32
    eigenvalues: int = 3
    matvecs: int = 30
    examples: int = 1024
    seed: int = 0

    def ascent(self) -> dict[str, Any]:
        """The arguments of an ascent."""
        return {"steps": self.steps, "restarts": self.restarts, "seed": self.seed}

    def passes(self) -> int:
        """About how many forward passes it takes, a forward and backward pass counted as three."""
        ascents = 2 * (len(self.rhos) + len(self.adaptive_rhos)) + 2
        averages = (len(self.rhos) + len(self.adaptive_rhos)) * (self.samples + 1)
        return ascents * 3 * self.steps * self.restarts + averages + 2 * 3 * 40 + 300


def measure(target: Target, settings: Settings, advance: Callable[[float], None]) -> dict[str, Any]:
    """All measurements; ``advance`` is called with the passes over the data that were made."""
    held_out = {}
    for name, data in target.held_out.items():
        fresh = counted(replace(target, data=data), lambda passes: None)
        held_out[name] = {**fresh.means(), "examples": fresh.examples}
    objective = counted(target, advance)
    means = objective.means()
    errors = [found["error"] for found in (means, *held_out.values()) if "error" in found]
    if not all(0 <= error <= 1 for error in errors):
        raise InputError(
            f"{target.name}: the mean 'error' must be a share of the examples, in [0, 1], got {max(errors):g}"
        )
    k = objective.like.numel()
    adaptive = Geometry(settings.normalization, eta=settings.eta, bias=settings.bias)
    plain = Geometry("none")
    rows: list[dict[str, Any]] = []
    for geometry, rhos in ((plain, settings.rhos), (adaptive, settings.adaptive_rhos)):
        rows += _sharpness(objective, geometry, rhos, k, settings)
    reasons: dict[str, list[str]] = {}
    for name, scaled in (("H", None), ("THT", adaptive)):
        try:
            rows += _curvature(name, hessian(objective, geometry=scaled), settings)
        except (NoSecondDerivative, NotFinite) as error:  # all the rest can be had without
            reasons.setdefault(str(error), []).append(name)
    left_out = [f"no eigenvalues and trace of {' and '.join(names)}: {reason}" for reason, names in reasons.items()]
    bounds = _bounds(target, objective, settings) if "error" in means and objective.examples > 1 else []
    first = next(iter(held_out.values()), {})
    if "error" in means and "error" in first:
        n = int(first["examples"])
        wrong = first["error"] * n
        if abs(wrong - round(wrong)) < 1e-3 + 1e-6 * n:
            bounds.append(_explained(holdout_bound(round(wrong), n, delta=DELTA)))
        else:  # a share of tokens, for example
            left_out.append("no held-out bound: the mean 'error' does not count examples that are right or wrong")
    return {
        "target": target.name,
        "settings": asdict(settings),
        "examples": objective.examples,
        "parameters": k,
        "training": means,
        "held_out": held_out,
        "rows": rows,
        "left_out": left_out,
        "bounds": bounds,
        "environment": environment(),
    }


def _sharpness(
    objective: Objective, geometry: Geometry, rhos: Sequence[float], k: int, settings: Settings
) -> list[dict[str, Any]]:
    name = "sharpness" if geometry.normalization == "none" else "adaptive"
    rows = []
    for p in (2.0, math.inf):
        ball = Geometry(geometry.normalization, p=p, eta=geometry.eta, bias=geometry.bias)
        sizes = [rho / math.sqrt(k) for rho in rhos] if p == math.inf else rhos
        profile = sharpness_profile(objective, sizes, geometry=ball, m=settings.m, **settings.ascent())
        for result in profile.results:
            row = {"quantity": f"{name}, worst case", "p": "inf" if p == math.inf else "2", "rho": result.rho}
            row |= {"value": result.value, "converged": result.converged, "noise_floor": result.noise_floor}
            rows.append(row if settings.m is None else row | {"stderr": result.stderr})
    for rho in rhos:
        average = average_sharpness(
            objective, rho / math.sqrt(k), geometry=geometry, samples=settings.samples, seed=settings.seed
        )
        rows.append(
            {
                "quantity": f"{name}, average case",
                "p": "",
                "rho": average.rho,
                "value": average.value,
                "stderr": average.stderr,
                "noise_floor": average.noise_floor,
            }
        )
    return rows


def _curvature(name: str, operator: HessianOperator, settings: Settings) -> list[dict[str, Any]]:
    matvecs = max(100, 3 * settings.eigenvalues)
    found = top_eigenvalues(operator, settings.eigenvalues, max_matvecs=matvecs, seed=settings.seed)
    estimate = trace(operator, matvecs=settings.matvecs, seed=settings.seed)
    return [
        {"quantity": f"top eigenvalues of {name}", "value": found.values.tolist(), "converged": found.converged},
        {"quantity": f"trace of {name}", "value": estimate.value, "stderr": estimate.stderr},
    ]


def _explained(bound: Any) -> dict[str, Any]:
    return {**asdict(bound), "explanation": bound.explain()}


def _bounds(target: Target, objective: Objective, settings: Settings) -> list[dict[str, Any]]:
    """The error in the place of the loss, which must lie in [0, 1], at the worst point that was found for the loss."""
    n, k = objective.examples, objective.like.numel()
    weights = {name: param.detach() for name, param in objective.params.items()}
    weight_norm = float(objective.flat(weights).double().norm())
    middle, adaptive_middle = (rhos[len(rhos) // 2] for rhos in (settings.rhos, settings.adaptive_rhos))

    def worst_error(rho: float, geometry: Geometry) -> float:
        result = worst_case_sharpness(objective, rho, geometry=geometry, **settings.ascent())
        return max(objective.means(result.perturbation)["error"], objective.means()["error"])

    plain = worst_error(middle, Geometry("none"))
    scaled = worst_error(adaptive_middle, Geometry(eta=ETA, bias="scaled"))
    bounds: list[Any] = [
        sam_bound(plain, weight_norm=weight_norm, k=k, n=n, rho=middle, delta=DELTA),
        asam_bound(scaled, weight_norm=weight_norm, k=k, n=n, rho=adaptive_middle, eta=ETA, delta=DELTA),
    ]
    if target.prior is not None:
        certificates = [
            gibbs_certificate(
                objective,
                sigma,
                geometry=Geometry("none"),
                prior=target.prior,
                delta=DELTA / len(SIGMAS),
                seed=settings.seed,
            )
            for sigma in SIGMAS
        ]
        # all of them hold together with probability 1 - DELTA
        bounds.append(replace(min(certificates, key=lambda certificate: certificate.value), delta=DELTA))
    return [_explained(bound) for bound in bounds]


def summary(found: dict[str, Any]) -> list[str]:
    """What was measured, in lines for above the table."""
    lines = [f"{found['target']}: {found['parameters']:,} parameters, {found['examples']:,} training examples"]
    shown = {"training " + name: value for name, value in found["training"].items()}
    for name, means in found["held_out"].items():
        if "error" in means:
            shown[name] = means["error"]
    lines += [f"{name} {value:.4g}" for name, value in shown.items()]
    return lines


def terminal_table(found: dict[str, Any]) -> Table:
    """The table for the terminal: a quantity is named once for all its rows."""
    table = Table(Column("quantity", no_wrap=True), "p", "rho", "value", "± standard error")
    previous = None
    for row in found["rows"]:
        group = row["quantity"], row.get("p")
        if previous is not None and group != previous:
            table.add_section()
        values = row["value"] if isinstance(row["value"], list) else [row["value"]]
        table.add_row(
            row["quantity"] if group != previous else "",
            row.get("p", "") if group != previous else "",
            f"{row['rho']:.3g}" if "rho" in row else "",
            "\n".join(f"{value:.4g}" for value in values),
            _remark(row),
        )
        previous = group
    return table


def _remark(row: dict[str, Any]) -> str:
    if row["value"] != row["value"]:
        return "the loss is nan there"
    if "noise_floor" in row and abs(row["value"]) < row["noise_floor"]:
        return "below rounding"
    if not row.get("converged", True):
        return "still rising" if "p" in row else "not converged"
    stderr = row.get("stderr", math.nan)
    return "" if math.isnan(stderr) else f"± {stderr:.2g}"
