"""The public surface of asam.measure: names, signatures, and what importing it costs."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from asam import measure

REQUIRED = inspect.Parameter.empty

IMPORT = """
import sys, torch, torch.nn.attention
before = set(sys.modules)
import asam
assert not [name for name in sys.modules if name.startswith("asam.measure")]
for name in ("numpy", "scipy", "sklearn", "matplotlib"):
    sys.modules[name] = None  # importing it fails
import asam.measure
loaded = {name.partition(".")[0] for name in set(sys.modules) - before if sys.modules[name] is not None}
print(*loaded - set(sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name.startswith("asam.measure.")))
"""

NAMES = [
    "AverageSharpness",
    "Eigenvalues",
    "Geometry",
    "GibbsCertificate",
    "GranulatedKendall",
    "HessianOperator",
    "HoldoutBound",
    "Kendall",
    "LossLine",
    "LossPlane",
    "Objective",
    "SharpnessBound",
    "SharpnessProfile",
    "SpectralDensity",
    "Trace",
    "WorstCaseSharpness",
    "asam_bound",
    "average_sharpness",
    "between",
    "gibbs_certificate",
    "granulated_kendall",
    "hessian",
    "holdout_bound",
    "interpolate",
    "kendall",
    "kendall_difference",
    "loss_line",
    "loss_plane",
    "normalized_logits",
    "random_direction",
    "sam_bound",
    "sharpness_profile",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "worst_case_sharpness",
]

GEOMETRY = ("*geometry", REQUIRED)
BOUND = [("perturbed_loss", REQUIRED), *((f"*{name}", REQUIRED) for name in ("weight_norm", "k", "n", "rho"))]
BOOTSTRAP = [("*confidence", 0.95), ("*resamples", 2000), ("*seed", 0)]
ASCENT = [GEOMETRY, ("*m", None), ("*steps", 20), ("*restarts", 1), ("*method", "auto_pgd"), ("*seed", 0)]

SIGNATURES = {
    "Objective": [
        ("model", REQUIRED),
        ("loss_fn", REQUIRED),
        ("data", REQUIRED),
        ("*params", None),
        ("*batchnorm", "eval"),
    ],
    "asam_bound": [*BOUND, ("*eta", REQUIRED), ("*delta", 0.05)],
    "average_sharpness": [
        ("objective", REQUIRED),
        ("rho", REQUIRED),
        GEOMETRY,
        ("*samples", 32),
        ("*noise", "normal"),
        ("*seed", 0),
    ],
    "between": [("objective", REQUIRED), ("other", REQUIRED)],
    "gibbs_certificate": [
        ("objective", REQUIRED),
        ("sigma", REQUIRED),
        GEOMETRY,
        ("*prior", REQUIRED),
        ("*prior_sigma", None),
        ("*samples", 100),
        ("*delta", 0.05),
        ("*seed", 0),
    ],
    "granulated_kendall": [("measure", REQUIRED), ("gap", REQUIRED), ("hyperparameters", REQUIRED), *BOOTSTRAP],
    "hessian": [("objective", REQUIRED), ("*geometry", None)],
    "holdout_bound": [("errors", REQUIRED), ("n", REQUIRED), ("*delta", 0.05)],
    "interpolate": [("objective", REQUIRED), ("other", REQUIRED), ("*points", 25)],
    "kendall": [("measure", REQUIRED), ("gap", REQUIRED), *BOOTSTRAP],
    "kendall_difference": [("a", REQUIRED), ("b", REQUIRED), ("gap", REQUIRED), *BOOTSTRAP],
    "loss_line": [("objective", REQUIRED), ("direction", REQUIRED), ("*span", (-1.0, 1.0)), ("*points", 51)],
    "loss_plane": [
        ("objective", REQUIRED),
        ("x_direction", REQUIRED),
        ("y_direction", REQUIRED),
        ("*x_span", (-1.0, 1.0)),
        ("*y_span", (-1.0, 1.0)),
        ("*points", 25),
    ],
    "normalized_logits": [("logits", REQUIRED)],
    "random_direction": [("objective", REQUIRED), ("*seed", 0)],
    "sam_bound": [*BOUND, ("*delta", 0.05)],
    "sharpness_profile": [("objective", REQUIRED), ("rhos", REQUIRED), *ASCENT],
    "spectral_density": [
        ("operator", REQUIRED),
        ("*matvecs", 100),
        ("*draws", 2),
        ("*sigma", None),
        ("*points", 1001),
        ("*seed", 0),
    ],
    "top_eigenvalues": [("operator", REQUIRED), ("k", 1), ("*tol", 1e-4), ("*max_matvecs", 100), ("*seed", 0)],
    "trace": [("operator", REQUIRED), ("*matvecs", 30), ("*seed", 0)],
    "worst_case_sharpness": [("objective", REQUIRED), ("rho", REQUIRED), *ASCENT],
}

RESULTS = {
    "Eigenvalues": "values vectors residuals converged matvecs",
    "GibbsCertificate": "value sample_error sample_error_bound kl vacuous sigma samples delta n",
    "GranulatedKendall": "psi Psi intervals interval n confidence",
    "HoldoutBound": "value error vacuous delta n",
    "Kendall": "tau_a tau_b interval_a interval_b n confidence",
    "LossLine": "positions values",
    "LossPlane": "x y values",
    "SharpnessBound": ("method value perturbed_loss complexity norm_term confidence_term grid_term vacuous delta n"),
    "SpectralDensity": "nodes weights grid density sigma matvecs",
    "Trace": "value stderr matvecs",
}


def arguments(function):
    """Names and defaults, those after a star with a star."""
    return [
        ("*" * (parameter.kind is parameter.KEYWORD_ONLY) + name, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    ]


def test_names():
    assert measure.__all__ == NAMES
    assert all(getattr(measure, name).__doc__ for name in NAMES)
    assert measure.__doc__


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert arguments(getattr(measure, name)) == SIGNATURES[name]


def test_every_function_is_pinned():
    assert {name for name in NAMES if inspect.isfunction(getattr(measure, name))} == SIGNATURES.keys() - {"Objective"}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_frozen(name):
    result = getattr(measure, name)
    assert [field.name for field in dataclasses.fields(result)] == RESULTS[name].split()
    assert result.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("owner", "methods"),
    [
        ("Objective", "flat gradient like loss means named run scales"),
        ("HessianOperator", "as_scipy matvec"),
        ("LossLine", "load save"),
        ("LossPlane", "load save"),
        ("SharpnessBound", "explain"),
        ("HoldoutBound", "explain"),
        ("GibbsCertificate", "explain"),
    ],
)
def test_methods(owner, methods):
    members = {name: value for name, value in vars(getattr(measure, owner)).items() if not name.startswith("_")}
    assert sorted(members) == methods.split()
    assert all(value.__doc__ for value in members.values())


def test_importing_needs_torch_only():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    packages, modules = run.stdout.splitlines()
    assert set(packages.split()) <= {"asam", "torch"}
    needed = "average_case bounds correlation gibbs hessian lanczos landscape logits objective trace worst_case"
    assert set(modules.split()) >= {f"asam.measure.{name}" for name in needed.split()}
    assert not set(modules.split()) & {"asam.measure.page", "asam.measure.plots"}
