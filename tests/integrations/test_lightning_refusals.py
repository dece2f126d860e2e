"""Lightning: what cannot work is refused, in a sentence."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_problem import Module, fit

from asam import ASAM, SharpnessAwareOptimizer
from asam.integrations.lightning import SharpnessAware

pytestmark = [
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def test_wrong_arguments_are_told_at_once():
    with pytest.raises(ValueError, match=r"rho must be a finite number >= 0, got -1"):
        SharpnessAware(rho=-1)
    with pytest.raises(ValueError, match="normalization must be one of"):
        SharpnessAware(normalization="rows")
    with pytest.raises(TypeError, match="replay_rng must be a bool, got int"):
        SharpnessAware(replay_rng=1)
    with pytest.raises(TypeError, match="params must be an iterable of names or parameters, got str"):
        SharpnessAware(params="weight")
    with pytest.raises(ValueError, match=r"rho must be a finite number >= 0, got inf"):
        SharpnessAware().rho = float("inf")
    with pytest.raises(ValueError, match="params names 'weight', which is not a parameter of the model"):
        fit(Module(), SharpnessAware(params=["weight"]))


class Manual(Module):
    automatic_optimization = False


class Iterating(Module):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


class Searching(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Twice(Module):
    def configure_optimizers(self):
        return SharpnessAwareOptimizer(ASAM(self), torch.optim.SGD(self.parameters(), lr=0.1))


class Several(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.network[0], self.network[4])]


class Engine(SingleDeviceStrategy):
    handles_gradient_accumulation = True


class Other(SharpnessAware):
    pass


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (
            Manual,
            {},
            RuntimeError,
            r"needs automatic_optimization=True\..*call asam\.backward\(closure, backward=self\.manual_backward\)",
        ),
        (Iterating, {}, RuntimeError, "let training_step take batch, not dataloader_iter"),
        (Searching, {}, TypeError, "must take its step from the gradient, and LBFGS evaluates the loss itself"),
        (Twice, {}, TypeError, "must not return a SharpnessAwareOptimizer beside SharpnessAware"),
        (Module, {"strategy": Engine}, TypeError, "must leave the backward pass to the module, as Engine does not"),
        (Module, {"callbacks": [Other]}, RuntimeError, "must hold one SharpnessAware, got more"),
        # Lightning's own
        (Module, {"callbacks": [SharpnessAware]}, RuntimeError, "Found more than one stateful callback of type `Sharp"),
        (Several, {}, RuntimeError, "multiple optimizers is only supported with manual optimization"),
    ],
)
@pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor")
def test_what_cannot_work_is_told_when_a_fit_starts(make, options, error, message):
    module, options = make(), dict(options)
    if "strategy" in options:
        options["strategy"] = options["strategy"]("cpu")
    with pytest.raises(error, match=message):
        fit(module, SharpnessAware(), *(more() for more in options.pop("callbacks", [])), **options)
    assert module.passes == 0
