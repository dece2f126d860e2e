"""Measure sharpness, curvature and generalization bounds of a network, and look at its loss landscape.

objective = Objective(model, lambda model, batch: criterion(model(batch[0]), batch[1]), data)
worst_case_sharpness(objective, 0.5, geometry=Geometry(eta=0)).value
"""

from ..geometry import Geometry
from .average_case import AverageSharpness, average_sharpness
from .bounds import HoldoutBound, SharpnessBound, asam_bound, holdout_bound, sam_bound
from .correlation import GranulatedKendall, Kendall, granulated_kendall, kendall, kendall_difference
from .gibbs import GibbsCertificate, gibbs_certificate
from .hessian import HessianOperator, hessian
from .lanczos import Eigenvalues, SpectralDensity, spectral_density, top_eigenvalues
from .landscape import LossLine, LossPlane, between, interpolate, loss_line, loss_plane, random_direction
from .logits import normalized_logits
from .objective import Objective
from .trace import Trace, trace
from .worst_case import SharpnessProfile, WorstCaseSharpness, sharpness_profile, worst_case_sharpness

__all__ = [
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
