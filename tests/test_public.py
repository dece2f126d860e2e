"""The public surface: names, signatures, and what importing it costs."""

import inspect
import math
import re
import subprocess
import sys

import asam
from asam import ASAM, SAM, EconomicalASAM, Geometry, Gradient, Momentum, SharpnessAwareOptimizer

IMPORT = """
import sys, time, torch, torch.optim
before, seconds = set(sys.modules), []
for _ in range(3):
    start = time.perf_counter()
    import asam
    seconds.append(time.perf_counter() - start)
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "asam"}
    for name in loaded:
        del sys.modules[name]
sys.modules.update(loaded)
print(min(seconds))
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("asam.")))
"""


def arguments(function):
    """Names and defaults, those after a star with a star."""
    return [
        ("*" * (parameter.kind is parameter.KEYWORD_ONLY) + name, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    ]


REQUIRED = inspect.Parameter.empty


def test_names():
    assert asam.__all__ == [
        "ASAM",
        "SAM",
        "EconomicalASAM",
        "Geometry",
        "Gradient",
        "Momentum",
        "SharpnessAwareOptimizer",
        "norm_parameters",
        "weight_parameters",
    ]
    assert all(getattr(asam, name).__doc__ for name in asam.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", asam.__version__)


def test_signatures():
    assert arguments(ASAM) == [
        ("model", REQUIRED),
        ("*rho", 0.5),
        ("*eta", 0.01),
        ("*normalization", "elementwise"),
        ("*p", 2),
        ("*bias", "unscaled"),
        ("*params", None),
        ("*replay_rng", False),
        ("*sync_ascent", False),
        ("*direction", None),
        ("*combine", None),
        ("*compile", False),
        ("*rounding", "nearest"),
    ]
    assert arguments(SAM) == [
        ("model", REQUIRED),
        ("*rho", 0.05),
        ("*p", 2),
        ("*bias", "unscaled"),
        ("*params", None),
        ("*replay_rng", False),
        ("*sync_ascent", False),
        ("*direction", None),
        ("*combine", None),
        ("*compile", False),
        ("*rounding", "nearest"),
    ]
    assert arguments(Gradient) == [("weight", 1.0), ("mean", 0.0), ("decay", 0.9)]
    assert arguments(Momentum) == [("optimizer", None), ("*decay", 0.9), ("*statistics_every", 10)]
    assert arguments(EconomicalASAM) == [
        ("model", REQUIRED),
        ("*steps", REQUIRED),
        ("*rho", 0.5),
        ("*momentum_rho", None),
        ("*exact", 0.25),
        ("*warmup", 0),
        ("*optimizer", None),
        ("*decay", 0.9),
        ("*statistics_every", 10),
        ("*eta", 0.01),
        ("*normalization", "elementwise"),
        ("*p", 2),
        ("*bias", "unscaled"),
        ("*params", None),
        ("*compile", False),
        ("*rounding", "nearest"),
    ]
    assert arguments(Geometry) == [("normalization", "elementwise"), ("p", 2), ("eta", 0.01), ("bias", "unscaled")]
    assert arguments(SharpnessAwareOptimizer) == [("asam", REQUIRED), ("base_optimizer", REQUIRED)]
    assert arguments(asam.norm_parameters) == [("model", REQUIRED)]
    assert arguments(asam.weight_parameters) == [("model", REQUIRED)]


def test_methods():
    for kind in (ASAM, EconomicalASAM):
        assert arguments(kind.backward)[1:] == [("closure", REQUIRED), ("*ascent", None), ("*backward", None)]
        assert arguments(kind.state_dict)[1:] == []
        assert arguments(kind.load_state_dict)[1:] == [("state_dict", REQUIRED)]
        assert isinstance(kind.loss_at, property)
    assert arguments(ASAM.perturbed)[1:] == []
    assert arguments(Geometry.scales)[1:] == [("params", REQUIRED)]
    assert arguments(Geometry.norm)[1:] == [("params", REQUIRED), ("perturbations", REQUIRED)]
    assert arguments(Geometry.maximizer)[1:] == [("params", REQUIRED), ("grads", REQUIRED), ("rho", REQUIRED)]
    assert arguments(Geometry.project)[1:] == [("params", REQUIRED), ("perturbations", REQUIRED), ("rho", REQUIRED)]
    assert arguments(SharpnessAwareOptimizer.step)[1:] == [("closure", None)]


def test_a_geometry_is_a_value():
    assert Geometry(p=math.inf) == Geometry(p=math.inf)
    assert len({Geometry(), Geometry(eta=0.01), Geometry(eta=0.1)}) == 2


def test_importing_is_cheap():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    seconds, packages, modules = run.stdout.splitlines()
    assert float(seconds) < 0.1
    assert set(packages.split()) <= {"asam", "torch"}
    core = "blocks checks closures combination direction economical geometry kernels layout minimizer native norms "
    core += "optimizer parameters passes perturbation projection replicas sharding"
    assert set(modules.split()) == {f"asam.{name}" for name in core.split()}
