"""Adaptive Sharpness-Aware Minimization (Kwon et al., ICML 2021) as a gradient.

asam = ASAM(model, rho=0.5)
loss = asam.backward(lambda: criterion(model(inputs), targets))   # was: criterion(...).backward()
"""

from .geometry import Geometry
from .minimizer import ASAM, SAM
from .optimizer import SharpnessAwareOptimizer
from .parameters import norm_parameters, weight_parameters

__version__ = "0.1.0"

__all__ = ["ASAM", "SAM", "Geometry", "SharpnessAwareOptimizer", "norm_parameters", "weight_parameters"]
