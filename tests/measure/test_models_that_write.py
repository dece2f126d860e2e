"""Models that change themselves when they are called: what they write, register and set anew comes back."""

import copy

import torch
from quadratics import cross_entropy
from torch import nn

from asam import Geometry
from asam.measure import Objective, average_sharpness, worst_case_sharpness

GEOMETRY = Geometry(eta=0.0)


class Writing(nn.Module):
    """Writes to a parameter that is not measured, makes others and layers at the first call, and takes a gradient."""

    def __init__(self):
        super().__init__()
        self.head, self.rows = nn.Linear(4, 3), nn.Embedding(5, 4, max_norm=0.1)
        self.mean = nn.Parameter(torch.ones(4), requires_grad=False)
        with torch.no_grad():
            self.rows.weight.fill_(3.0)

    def forward(self, x):
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.ones(4), persistent=False)
            self.layer, self.more = nn.Identity(), nn.Parameter(torch.zeros(()))
        self.mean.data = 0.5 * self.mean.data + 0.1
        self.head.bias.requires_grad_(False).requires_grad_(True)
        self.rows.weight.requires_grad_(False)
        penalty = self.head.weight.square().sum()
        if torch.is_grad_enabled():
            penalty.backward(retain_graph=True)
        return self.head(x + self.rows(torch.arange(4)).mean(0) * self.made) + 0 * penalty


def test_what_the_model_does_to_itself():
    model = Writing()
    model.head.weight.grad = given = torch.ones(3, 4)
    kept = copy.deepcopy(model.state_dict())
    inputs, targets = torch.randn(6, 4), torch.randint(3, (6,))
    objective = Objective(model, cross_entropy, [(inputs, targets)], params=["head.weight"])
    for measure in (
        lambda: worst_case_sharpness(objective, 0.1, geometry=GEOMETRY, steps=2),
        objective.loss,
        objective.gradient,
    ):
        measure()
        assert list(model.state_dict()) == list(kept)
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert [name for name, _ in model.named_children()] == ["head", "rows"]
        assert not list(model.buffers())
        assert not model._non_persistent_buffers_set
        assert model.rows.weight.requires_grad
        assert model.head.weight.grad is given
        assert torch.equal(given, torch.ones(3, 4))
        assert model.mean.grad is model.rows.weight.grad is model.head.bias.grad is None


class Observing(nn.Module):
    """A range that is kept as a frozen parameter, as quantizers do: it grows where the outputs do."""

    def __init__(self):
        super().__init__()
        self.layer, self.top = nn.Linear(4, 3), nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        outputs = self.layer(x)
        self.top.data.copy_(torch.maximum(self.top, outputs.detach().abs().max()))
        return outputs / self.top


def test_what_the_model_writes_away_from_the_weights_alone():
    model, batch = Observing(), (torch.randn(8, 4), torch.randint(3, (8,)))
    model(batch[0])
    top = model.top.item()
    objective = Objective(model, cross_entropy, [batch])
    found = [average_sharpness(objective, 0.5, geometry=Geometry("none")).value for _ in range(2)]
    assert found[0] == found[1]
    assert model.top.item() == top


class Replacing(nn.Module):
    """Sets a parameter and a layer anew in every call, and registers a hook."""

    def __init__(self):
        super().__init__()
        self.head, self.gain, self.act = nn.Linear(4, 3), nn.Parameter(torch.ones(()), requires_grad=False), nn.Tanh()

    def forward(self, x):
        self.gain, self.act = nn.Parameter(self.gain.detach().clone(), requires_grad=False), nn.Tanh()
        self.act.register_forward_hook(lambda *_: None)
        self.head.register_forward_hook(lambda *_: None)
        return self.head(self.act(x)) * self.gain


def test_parameters_layers_and_hooks_that_are_set_anew():
    model = Replacing()
    gain, act = model.gain, model.act
    objective = Objective(model, cross_entropy, [(torch.randn(6, 4), torch.randint(3, (6,)))])
    worst_case_sharpness(objective, 0.1, geometry=GEOMETRY, steps=2)
    assert (model.gain, model.act) == (gain, act)
    assert [name for name, _ in model.named_children()] == ["head", "act"]
    assert not model.head._forward_hooks
