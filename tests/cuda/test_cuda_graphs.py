"""CUDA graphs: a whole step, captured once and replayed, is the step itself."""

import pytest
import torch
from torch import nn

from asam import ASAM

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NORMALIZATIONS = ["elementwise", "filterwise", "layerwise", "none"]
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, capturable=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, capturable=True),
}


class Training:
    """A step on inputs that lie at one place, as a graph needs them."""

    def __init__(self, optimizer, normalization, way):
        torch.manual_seed(0)
        layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)
        self.model = nn.Sequential(*layers).to(DEVICE, torch.float64)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.asam = ASAM(self.model, normalization=normalization)
        self.inputs = torch.zeros(8, 6, dtype=torch.float64, device=DEVICE)
        self.targets = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        self.way = way

    def load(self, step):
        generator = torch.Generator().manual_seed(step)
        self.inputs.copy_(torch.randn(8, 6, dtype=torch.float64, generator=generator))
        self.targets.copy_(torch.randint(3, (8,), generator=generator))

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.way(self.asam, lambda: nn.functional.cross_entropy(self.model(self.inputs), self.targets))
        self.optimizer.step()
        return loss

    def warmed_up(self):
        """Three steps on a side stream, as torch asks for before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(3):
                self.load(step)
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        return self


def plainly(asam, closure):
    return asam.backward(closure)


def through(asam, closure):
    return asam.backward(closure, backward=torch.Tensor.backward)


def by_hand(asam, closure):
    loss = closure()
    loss.backward()
    with asam.perturbed():
        closure().backward()
    return loss.detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", [plainly, through, by_hand])
def test_a_replayed_step_is_the_step(way, optimizer):
    assert_replays(way, optimizer, "elementwise")


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_normalization_can_be_captured(normalization):
    assert_replays(plainly, "SGD", normalization)


def assert_replays(way, optimizer, normalization):
    eager, captured = (Training(optimizer, normalization, way).warmed_up() for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    captured.load(3)
    captured.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = captured.step()
    for step in range(3, 10):
        for training in (eager, captured):
            training.load(step)
        expected = eager.step()
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for (name, tensor), other in zip(
        captured.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert captured.model[1].num_batches_tracked == 10
