"""Several networks, optimizers and losses: each is left as a plain loop leaves it."""

import copy

import pytest
import torch
from slow_reference import assert_near, assert_same, gradient, gradients, maximizer, weights
from torch import nn

from asam import ASAM

RHO = 0.3
CASES = ["generator", "discriminator", "both"]


def softplus(scores, sign):
    return nn.functional.softplus(-sign * scores).mean()


class Gan:
    """A generator and a discriminator, both with batch norm; the latent batch of a step is drawn before its passes."""

    def __init__(self):
        torch.manual_seed(0)
        self.generator = nn.Sequential(
            nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
        ).double()
        self.discriminator = nn.Sequential(
            nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
        ).double()
        self.optimizers = [
            torch.optim.Adam(self.discriminator.parameters(), lr=0.02),
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
        ]
        self.latent = torch.randn(5, 2, 16, 2, dtype=torch.float64)
        self.real = torch.randn(5, 16, 3, dtype=torch.float64)

    def train(self, on_discriminator, on_generator):
        """A plain loop, but for the calls that make a loss a gradient."""
        for latent, real in zip(self.latent, self.real, strict=True):
            with torch.no_grad():
                fake = self.generator(latent[0])
            self.optimizers[0].zero_grad()
            on_discriminator(
                lambda f=fake, r=real: softplus(self.discriminator(r), 1) + softplus(self.discriminator(f), -1)
            )
            self.optimizers[0].step()
            self.optimizers[1].zero_grad()
            on_generator(lambda z=latent[1]: softplus(self.discriminator(self.generator(z)), 1))
            self.optimizers[1].step()


def plain(closure):
    closure().backward()


def load(model, values):
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])


def two_passes(gan, name, closure):
    """By hand: adds the gradient at w + e to ``.grad`` of both networks, whose buffers move in the pass at w."""
    model = getattr(gan, name)
    w = weights(model)
    e = maximizer(w, gradient(model, closure), RHO)
    kept = [copy.deepcopy(list(network.buffers())) for network in (gan.generator, gan.discriminator)]
    load(model, {name: w[name] + e[name] for name in w})
    closure().backward()
    load(model, w)
    for network, contents in zip((gan.generator, gan.discriminator), kept, strict=True):
        for buffer, content in zip(network.buffers(), contents, strict=True):
            buffer.copy_(content)


@pytest.mark.parametrize("perturbed", CASES)
def test_a_gan_is_the_one_trained_by_hand(perturbed):
    ours, theirs = Gan(), Gan()
    # what the closure of one runs through is in the model too, so that the buffers of both move once
    networks = nn.ModuleDict({"generator": ours.generator, "discriminator": ours.discriminator})
    on = {}
    for name in ("discriminator", "generator"):
        if perturbed in (name, "both"):
            on[name] = (
                ASAM(networks, rho=RHO, params=getattr(ours, name).parameters()).backward,
                lambda closure, name=name: two_passes(theirs, name, closure),
            )
        else:
            on[name] = plain, plain
    ours.train(on["discriminator"][0], on["generator"][0])
    theirs.train(on["discriminator"][1], on["generator"][1])
    for name in ("discriminator", "generator"):
        assert_near(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict(), rtol=1e-9)
        assert_near(gradients(getattr(ours, name)), gradients(getattr(theirs, name)), rtol=1e-9)


@pytest.mark.parametrize("backward", [None, lambda loss: loss.backward()])
@pytest.mark.parametrize("together", [False, True])
def test_what_the_other_network_is_left_with(together, backward):
    gan = Gan()
    latent = gan.latent[0, 0]

    def closure():
        return softplus(gan.discriminator(gan.generator(latent)), 1)

    at_w = gradient(gan.discriminator, closure)
    before, seen = weights(gan.discriminator), []
    networks = nn.ModuleList([gan.generator, gan.discriminator]) if together else gan.generator

    def watched():
        seen.append(weights(gan.generator))
        return closure()

    ASAM(networks, rho=RHO, params=gan.generator.parameters()).backward(watched, backward=backward)

    assert_same(weights(gan.discriminator), before)
    # .grad, of no use to the generator's step, is of one pass (at w + e) unless a backward of one's own writes it twice
    load(gan.generator, seen[1])
    at_moved = gradient(gan.discriminator, closure)
    twice = backward is not None and not together
    expected = {name: at_moved[name] + (at_w[name] if twice else 0) for name in at_w}
    assert_near(gradients(gan.discriminator), expected)


@pytest.mark.parametrize("together", [False, True])
def test_the_buffers_of_the_other_network_move_once_if_it_is_part_of_the_model(together):
    gan = Gan()
    networks = nn.ModuleList([gan.generator, gan.discriminator]) if together else gan.generator
    ASAM(networks, rho=RHO, params=gan.generator.parameters()).backward(
        lambda: softplus(gan.discriminator(gan.generator(gan.latent[0, 0])), 1)
    )
    assert gan.generator[1].num_batches_tracked == 1
    assert gan.discriminator[1].num_batches_tracked == (1 if together else 2)


def two_heads():
    torch.manual_seed(0)
    sizes = {"body": 4, "left": 1, "right": 3}
    model = nn.ModuleDict({name: nn.Linear(4, size) for name, size in sizes.items()}).double()
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))

    def hidden():
        return torch.tanh(model["body"](inputs))

    return (
        model,
        lambda: model["left"](hidden()).square().mean(),
        lambda: nn.functional.cross_entropy(model["right"](hidden()), targets),
    )


def test_two_losses_in_one_closure_or_in_two():
    results = []
    for separate in (False, True):
        model, left, right = two_heads()
        loss = ASAM(model).backward([left, right] if separate else lambda a=left, b=right: a() + b())
        results.append({"loss": loss, **gradients(model)})
    assert_near(results[1], results[0], rtol=1e-13)


def test_two_optimizers_on_two_parts():
    results = []
    for two in (False, True):
        model, left, right = two_heads()
        parts = [list(model["body"].parameters()), [*model["left"].parameters(), *model["right"].parameters()]]
        if two:
            optimizers = [torch.optim.Adam(parts[0], lr=0.01), torch.optim.Adam(parts[1], lr=0.1)]
        else:
            groups = [{"params": parts[0], "lr": 0.01}, {"params": parts[1], "lr": 0.1}]
            optimizers = [torch.optim.Adam(groups)]
        asam = ASAM(model)
        for _ in range(5):
            asam.backward(lambda: left() + right())  # noqa: B023
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append(weights(model))
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["body.weight"], two_heads()[0]["body"].weight)


def test_two_neighborhoods_in_turn():
    # two ASAM of one model, each for its part and its size; one after the other, not one in the other
    model, left, right = two_heads()
    before = weights(model)
    ASAM(model, rho=0.1, params=model["left"].parameters()).backward(left)
    first = gradients(model)
    ASAM(model, rho=1.0, params=model["right"].parameters()).backward(right)
    assert_same(weights(model), before)
    assert first["right.weight"] is None
    assert torch.equal(first["left.weight"], model["left"].weight.grad)
    assert model["right"].weight.grad.norm() > 0
