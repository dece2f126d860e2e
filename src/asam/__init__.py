"""Adaptive Sharpness-Aware Minimization (Kwon et al., ICML 2021) as a gradient.

asam = ASAM(model, rho=0.5)
loss = asam.backward(lambda: criterion(model(inputs), targets))   # was: criterion(...).backward()
"""

from .direction import Gradient, Momentum
from .economical import EconomicalASAM
from .geometry import Geometry
from .minimizer import ASAM, SAM
from .optimizer import SharpnessAwareOptimizer
from .parameters import norm_parameters, weight_parameters

__version__ = "0.1.0"

__all__ = [
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
