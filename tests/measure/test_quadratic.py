import math
import random

import pytest

from asam.measure.quadratic import _trust_region


def bound(values, g, rho):
    """What no point of the ball exceeds: the Lagrange dual at its minimum, by bisection."""

    def norm(mu):
        return math.hypot(*(part / (mu - value) for part, value in zip(g, values, strict=True) if mu > value))

    low = max(values[-1], 0.0)
    high = low + math.hypot(*g) / rho
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if norm(middle) > rho else (low, middle)
    parts = (part**2 / (high - value) for part, value in zip(g, values, strict=True) if high > value)
    return (sum(parts) + high * rho**2) / 2


@pytest.mark.parametrize("seed", range(20))
def test_trust_region_reaches_the_dual_bound(seed):
    # curvatures and slopes over many orders of magnitude, some equal and some 0: the hard case among them
    draws = random.Random(seed)
    for _ in range(200):
        size = draws.randint(1, 4)
        values = sorted(draws.gauss(0, 1) * 10 ** draws.uniform(-6, 6) for _ in range(size))
        if draws.random() < 0.2:
            values = sorted([*values[:-1], values[0]])
        g = [(draws.random() > 0.15) * draws.gauss(0, 1) * 10 ** draws.uniform(-12, 6) for _ in range(size)]
        rho = 10 ** draws.uniform(-4, 3)

        u = _trust_region(values, g, rho)

        assert math.hypot(*u) <= rho * (1 + 1e-11)
        value = sum(a * b + c * a * a / 2 for a, b, c in zip(u, g, values, strict=True))
        assert value >= (1 - 1e-9) * bound(values, g, rho), (values, g, rho)


def test_trust_region_without_slope_or_curvature():
    assert _trust_region([0.0, 0.0], [0.0, 0.0], 1.0) == [0.0, 0.0]
