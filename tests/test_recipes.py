"""The code of docs/recipes.md runs as it stands there, and takes the passes that its table says."""

import re
from pathlib import Path

import pytest
import torch
from slow_reference import weights
from torch import nn

import asam

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
LOOP, *_ = re.findall(r"```python\n(.*?)```", PAGE.partition("\n## ")[0], re.DOTALL)
CODE = dict(re.findall(r"^## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
PASSES = {name: passes for name, passes, *_ in ROWS[1:]}
STEPS, BATCH = 40, 16


class Counting(nn.Module):
    """A network that counts the samples it has seen."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.layers(x)


class Training:
    """What a recipe finds: a model, an optimizer, a criterion and batches."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = Counting()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.inputs = torch.randn(STEPS, BATCH, 6)
        self.targets = (self.inputs[..., 0] > 0).long() + (self.inputs[..., 1] > 0.5).long()

    def run(self, code, loader=None):
        names = {name: getattr(asam, name) for name in asam.__all__}
        loader = loader or list(zip(self.inputs, self.targets, strict=True))
        if "epochs" in code:  # the same steps in two epochs
            loader = loader[: STEPS // 2]
        names |= {"model": self.model, "optimizer": self.optimizer, "loader": loader, "torch": torch, "epochs": 2}
        exec(code, names | {"criterion": nn.functional.cross_entropy})
        return self.model.seen / (STEPS * BATCH)

    def loss(self):
        with torch.no_grad():
            return nn.functional.cross_entropy(self.model(self.inputs).flatten(0, 1), self.targets.flatten()).item()


def complete(recipe):
    code = CODE[recipe]
    return code if "for " in code else code + LOOP * (2 if "epochs" in code else 1)


def test_the_table_lists_the_recipes_in_their_order():
    assert list(PASSES) == list(CODE)
    assert len(CODE) == 15


@pytest.mark.parametrize("recipe", CODE)
def test_a_recipe_learns_in_the_passes_of_the_table(recipe):
    training = Training()
    before = training.loss()
    training.model.seen = 0
    passes = training.run(complete(recipe))
    if "to" in PASSES[recipe]:
        low, high = map(float, PASSES[recipe].split(" to "))
        assert low < passes < high
    else:
        assert passes == float(PASSES[recipe])
    assert training.loss() < 0.8 * before


def test_a_part_of_a_short_batch_is_something_to_climb_on():
    training = Training()
    training.run(CODE["Sub-batch ascent"], [(training.inputs[0, :3], training.targets[0, :3])])
    assert training.model.seen == 2 + 3
    assert all(weight.isfinite().all() for weight in weights(training.model).values())


def test_the_switch_goes_on_after_a_gradient_that_is_not_finite():
    training = Training()

    def skip(optimizer, *_):
        for param in training.model.parameters():
            param.grad.nan_to_num_(0, 0, 0)

    training.optimizer.register_step_pre_hook(skip)
    training.inputs[3] = torch.nan
    passes = training.run(CODE["Gradient-norm switch"])
    assert 1.1 < passes < 2


def test_recipes_are_different_trainings():
    ends = {}
    for recipe in CODE:
        training = Training()
        training.run(complete(recipe))
        ends[recipe] = weights(training.model)["layers.0.weight"]
    plain = Training()
    plain.run("asam = ASAM(model, rho=0)\n" + LOOP)
    ends["plain"] = weights(plain.model)["layers.0.weight"]
    distances = {(a, b): (ends[a] - ends[b]).norm().item() for a in ends for b in ends if a < b}
    assert min(distances.values()) > 1e-3, min(distances, key=distances.get)
