"""torch.compile: no graph break, and nothing is compiled again once both passes have run."""

import pytest
import torch
from slow_reference import assert_near, gradients, weights
from torch import nn
from torch._dynamo.utils import counters

from asam import ASAM


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def compiled_graphs():
    """How many graphs there are by now; that no forward pass was cut in two is checked on the way."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def by_backward(asam, closure):
    return asam.backward(closure)


def through_backward(asam, closure):
    return asam.backward(closure, backward=torch.Tensor.backward)


def by_perturbed(asam, closure):
    loss = closure()
    loss.backward()
    with asam.perturbed():
        closure().backward()
    return loss.detach()


def trained(step, what, backend, steps=5):
    """Train with another rho at each step; what is compiled is the model, the closure or nothing."""
    model = network()
    forward = torch.compile(model, backend=backend, fullgraph=True) if what == "model" else model
    asam = ASAM(forward, rho=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    inputs = torch.randn(steps, 16, 4)

    def loss(x):
        return forward(x).square().mean()

    if what == "closure":
        loss = torch.compile(loss, backend=backend, fullgraph=True)
    losses, graphs = [], []
    for number, x in enumerate(inputs):
        asam.rho = 0.1 * (number + 1)
        losses.append(step(asam, lambda x=x: loss(x)))
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(compiled_graphs())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"losses": torch.stack(losses), **weights(model), **buffers}, graphs


@pytest.mark.parametrize("step", [by_backward, through_backward, by_perturbed])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["model", "closure"])
def test_one_graph_for_all_passes_and_every_rho(what, backend, step):
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled, graphs = trained(step, what, backend)
    assert graphs == [1] * 5
    assert_near(compiled, trained(step, None, None)[0], rtol=1e-5, atol=1e-6)
    assert compiled["1.num_batches_tracked"] == 5


# torch itself: what it imports for a first compilation uses what it has deprecated
IMPORTS = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping serialization of")  # torch 2.6
@pytest.mark.filterwarnings(IMPORTS)
def test_one_graph_for_all_passes_of_inductor():
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled, graphs = trained(by_backward, "model", "inductor")
    assert graphs == [1] * 5
    assert_near(compiled, trained(by_backward, None, None)[0], rtol=1e-4, atol=1e-5)


def test_a_change_of_the_weights_in_place_compiles_nothing_again():
    # what ASAM does between the passes, alone
    model = network()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            forward(torch.ones(16, 4)).square().mean().backward()
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(0.1)
    assert compiled_graphs() == 1


def test_names_and_parameters_are_those_of_the_model_inside():
    # ASAM may be given the compiled model or the one that was compiled
    model = network()
    forward = torch.compile(model, backend="eager")
    results = []
    for given in (model, forward):
        ASAM(given).backward(lambda: forward(torch.ones(16, 4)).square().mean())
        results.append(gradients(model))
        model.zero_grad()
    assert_near(results[0], results[1])
    assert torch.equal(model[1].num_batches_tracked, torch.tensor(2))


@pytest.mark.filterwarnings(IMPORTS)
def test_a_compiled_optimizer_next_to_it():
    model = network()
    asam, optimizer = ASAM(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = torch.compile(optimizer.step, backend="eager")
    expected = network()
    other, plain = ASAM(expected), torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    graphs = []
    inputs = torch.randn(16, 4)
    for _ in range(4):
        asam.backward(lambda: model(inputs).square().mean())
        step()
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
        other.backward(lambda: expected(inputs).square().mean())
        plain.step()
        plain.zero_grad()
    assert graphs[1:] == [graphs[1]] * 3  # the second has a momentum buffer
    assert_near(weights(model), weights(expected), rtol=1e-6, atol=1e-7)
