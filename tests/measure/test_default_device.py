"""Measurements where torch makes new tensors on another device than that of the model."""

import copy

import torch
from torch import nn

from asam import Geometry
from asam.measure import (
    Objective,
    average_sharpness,
    gibbs_certificate,
    granulated_kendall,
    hessian,
    holdout_bound,
    interpolate,
    kendall,
    loss_line,
    random_direction,
    spectral_density,
    top_eigenvalues,
    trace,
    worst_case_sharpness,
)


def test_where_new_tensors_are_made_by_default_is_of_no_account():
    """On "meta", where nothing can be read, as on an accelerator where a generator of the CPU does not serve."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = (torch.randn(6, 3), torch.randint(2, (6,)))

    def loss_fn(model, batch):
        logits = model(batch[0])
        error = (logits.argmax(1) != batch[1]).float().mean()
        return nn.functional.cross_entropy(logits, batch[1]), {"error": error}

    def measured():
        objective, geometry = Objective(model, loss_fn, [batch]), Geometry(eta=0.0)
        operator, direction = hessian(objective), random_direction(objective)
        gap, mu = [0.1, 0.3, 0.2, 0.5], [1.0, 3.0, 2.0, 4.0]
        return [
            worst_case_sharpness(objective, 0.1, geometry=geometry, steps=4, restarts=2).value,
            average_sharpness(objective, 0.1, geometry=geometry, samples=2).value,
            average_sharpness(objective, 0.1, geometry=geometry, samples=2, noise="uniform").value,
            top_eigenvalues(operator, 2).values.tolist(),
            trace(operator, matvecs=6).value,
            spectral_density(operator, matvecs=4, draws=1).density.tolist(),
            operator.as_scipy().matvec([1.0] * len(objective.like)).tolist(),
            loss_line(objective, direction, points=3).values["loss"].tolist(),
            interpolate(objective, copy.deepcopy(model), points=3).values["loss"].tolist(),
            gibbs_certificate(objective, 0.1, geometry=geometry, prior=model.state_dict(), samples=2).value,
            holdout_bound(2, 10).value,
            kendall(mu, gap, resamples=10).interval_a,
            granulated_kendall(mu, gap, {"lr": [1, 1, 2, 2], "wd": [0, 1, 0, 1]}, resamples=10).interval,
        ]

    expected = measured()
    torch.set_default_device("meta")
    try:
        assert measured() == expected
    finally:
        torch.set_default_device(None)
