"""Other authors' implementations take the same steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from asam import ASAM, SAM, Gradient, Momentum, norm_parameters


def gsam(g00, g01, g11):
    return -0.4, 1 + 0.4 * g01 / g11


DATA = Path(__file__).parent / "reference"
OFFICIAL = json.loads((DATA / "official_trajectories.json").read_text())
VARIANTS = {
    "sam_official": (lambda model: SAM(model, rho=0.1), 1e-12),
    "asam_official": (lambda model: ASAM(model, rho=0.5, eta=0.01), 1e-12),
    "asam_davda54": (lambda model: ASAM(model, rho=2.0, eta=0.0, bias="scaled"), 1e-10),
    "sam_on": (lambda model: SAM(model, rho=0.5, params=norm_parameters(model)), 1e-12),
    "friendly_sam": (lambda model: SAM(model, rho=0.2, direction=Gradient(mean=-1, decay=0.6)), 1e-12),
    "friendly_asam": (
        lambda model: ASAM(model, rho=0.2, eta=0.0, bias="scaled", direction=Gradient(mean=-1, decay=0.6)),
        1e-12,
    ),
    # the recording code adds 1e-7 to the norm
    "vasso": (lambda model: SAM(model, rho=0.2, direction=Gradient(0.4, 0.6, decay=0.6)), 1e-7),
    # alpha = gamma / (1 - gamma) = 4
    "wsam_coupled": (lambda model: SAM(model, rho=0.1, combine=lambda g00, g01, g11: (1 - 4.0, 4.0)), 1e-12),
    "gsam": (lambda model: SAM(model, rho=0.1, combine=gsam), 1e-10),
    "gsam_adaptive": (lambda model: ASAM(model, rho=0.1, eta=0.0, bias="scaled", combine=gsam), 1e-10),
    "asam_on": (lambda model: ASAM(model, rho=0.5, eta=0.01, bias="scaled", params=norm_parameters(model)), 1e-12),
}


def load(name):
    with np.load(DATA / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(scope="module")
def official():
    return load("official_trajectories.npz")


@pytest.fixture(scope="module")
def variants():
    return load("variant_trajectories.npz")


def network(name):
    if name == "mlp_bn":
        return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


def below(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def train(model, asam, optimizer, inputs, targets):
    """The losses, and the weights after every step."""
    losses, trajectory = [], []
    for x, y in zip(inputs, targets, strict=True):
        losses.append(asam.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)))
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return torch.stack(losses), trajectory


def assert_within(actual, expected, tolerance):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: case["case"])
def test_the_asam_authors_steps(case, official):
    name, key = case["model"], case["case"]
    model = network(name).double()
    model.load_state_dict(below(official, f"{name}/initial/"))
    asam = SAM(model, rho=case["rho"]) if case["algorithm"] == "SAM" else ASAM(model, rho=case["rho"], eta=case["eta"])
    base = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[case["optimizer"]]
    optimizer = base(model.parameters(), **case["optimizer_args"])

    losses, trajectory = train(model, asam, optimizer, official[f"{name}/inputs"], official[f"{name}/targets"])

    assert len(trajectory) == 12
    # behind a batch norm Adam divides rounding noise by its own size
    tolerance = 1e-12 if case["optimizer"] == "sgd" else 1e-9
    assert_within(trajectory[0], below(official, f"{key}/after1/"), tolerance)
    assert_within(trajectory[-1], below(official, f"{key}/after12/"), tolerance)
    torch.testing.assert_close(losses, official[f"{key}/loss"], rtol=0, atol=1e-12)


def test_momentum_sam(variants):
    model = Normalized().double()
    model.load_state_dict(below(variants, "initial/"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    asam = SAM(model, rho=0.3, direction=Momentum(optimizer))
    _, trajectory = train(model, asam, optimizer, variants["inputs"], variants["targets"])
    assert_within(trajectory[-1], below(variants, "momentum_sam/after8/"), 1e-10)


@pytest.mark.parametrize("case", VARIANTS)
def test_other_authors_steps(case, variants):
    make, tolerance = VARIANTS[case]
    model = Normalized().double()
    model.load_state_dict(below(variants, "initial/"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    _, trajectory = train(model, make(model), optimizer, variants["inputs"], variants["targets"])

    assert len(trajectory) == 8
    assert_within(trajectory[0], below(variants, f"{case}/after1/"), tolerance)
    assert_within(trajectory[-1], below(variants, f"{case}/after8/"), tolerance)


def test_every_recorded_case_is_run():
    assert len(OFFICIAL) == 12
    assert {*VARIANTS, "momentum_sam"} == {
        case["case"] for case in json.loads((DATA / "variant_trajectories.json").read_text())
    }
