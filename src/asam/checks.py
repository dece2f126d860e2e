"""Checks of arguments: an error names the argument, what it takes and what it got."""

import math
import sys
import warnings
from collections.abc import Callable
from numbers import Integral, Real


def check_number(name: str, value: object, takes: str, holds: Callable[[float], bool]) -> None:
    """Raise unless the value is a real number for which ``holds(value)``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {takes}, got {type(value).__name__}")
    if not holds(float(value)):
        raise ValueError(f"{name} must be {takes}, got {value}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless the value is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= {least}, got {type(value).__name__}")
    if int(value) < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value}")


def check_rho(rho: object) -> None:
    """Raise unless rho, the neighborhood size, is a finite number >= 0."""
    check_number("rho", rho, "a finite number >= 0", lambda rho: 0 <= rho < math.inf)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def warn(message: str) -> None:
    """Warn, at the line that has called this library; ``skip_file_prefixes`` for that is of Python 3.12."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith((f"{__package__}.", "contextlib")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
