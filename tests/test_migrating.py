"""The pairs of docs/migrating.md end in the same weights, its loops run, and what README.md says of a peer is so."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from torch import nn

import asam

PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
BLOCKS = {
    title: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for title, section in re.findall(r"^## ([^\n]*)\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


class TwoCalls:
    """The interface of davda54/sam and of the authors, from the formulas: climb, then come back and step."""

    def __init__(self, optimizer, rho, eta, scaled):
        self.optimizer, self.rho, self.eta, self.scaled = optimizer, rho, eta, scaled

    def first_step(self, zero_grad=True):
        self.kept = {}
        scales = {name: param.detach().abs() + self.eta if self.scaled(name) else 1.0 for name, param in PARAMS.items()}
        norm = torch.stack([(scales[name] * param.grad).norm() for name, param in PARAMS.items()]).norm()
        with torch.no_grad():
            for name, param in PARAMS.items():
                self.kept[name] = param.clone()
                param += self.rho * scales[name] ** 2 * param.grad / norm
        self.optimizer.zero_grad()

    def second_step(self, zero_grad=True):
        with torch.no_grad():
            for name, param in PARAMS.items():
                param.copy_(self.kept[name])
        self.optimizer.step()
        self.optimizer.zero_grad()

    ascent_step, descent_step = first_step, second_step


PARAMS = {}


def davda54(params, base, rho, adaptive, **kwargs):
    return TwoCalls(base(params, **kwargs), rho, 0.0, lambda name: adaptive)


def authors(optimizer, model, rho, eta):
    return TwoCalls(optimizer, rho, eta, lambda name: "weight" in name)


def run(code, **names):
    """What the code leaves behind: its names, and the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    before = [param.detach().clone() for param in model.parameters()]
    PARAMS.clear()
    PARAMS.update(model.named_parameters())
    loader = [(torch.randn(8, 6).double(), torch.randint(3, (8,))) for _ in range(8)]
    names |= {"model": model, "loader": loader, "torch": torch, "criterion": nn.functional.cross_entropy}
    exec(code, names)
    after = [param.detach().clone() for param in model.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return names, after


@pytest.mark.parametrize(
    ("title", "other"),
    [("davda54/sam", {"SAM": davda54}), ("The authors' code", {"ASAM": authors}), ("pytorch_optimizer", {})],
)
def test_before_and_after_are_the_same_training(title, other):
    before, after = BLOCKS[title]
    _, theirs = run(before, **other)
    _, ours = run(after, ASAM=asam.ASAM)
    for a, b in zip(theirs, ours, strict=True):
        # pytorch_optimizer takes its norm in float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if title == "pytorch_optimizer" else 1e-12)


def test_a_checkpoint_of_pytorch_optimizer_goes_on():
    before, after = BLOCKS["pytorch_optimizer"]
    old, _ = run(before)
    new, _ = run(after)
    plain = torch.optim.SGD(new["model"].parameters(), lr=1.0)
    plain.load_state_dict(old["optimizer"].state_dict())
    moments = [plain.state[param]["momentum_buffer"] for param in new["model"].parameters()]
    theirs = [old["optimizer"].state[param]["momentum_buffer"] for param in old["model"].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(moments, theirs, strict=True))
    assert plain.param_groups[0]["lr"] == 0.1
    plain.step()


def test_loops_that_stay_are_the_changed_line():
    by_hand, with_step = BLOCKS["A loop that must stay as it is"]
    names = {"ASAM": asam.ASAM, "SharpnessAwareOptimizer": asam.SharpnessAwareOptimizer}
    line = "for inputs, targets in loader:\n    asam.backward(lambda: criterion(model(inputs), targets))\n"
    line = f"asam = ASAM(model, rho=0.5)\n{line}    optimizer.step()\n    optimizer.zero_grad()"
    base = "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
    _, changed = run(base + line, **names)
    for code in (base + by_hand, with_step):
        _, found = run(code, **names)
        assert all(torch.equal(a, b) for a, b in zip(found, changed, strict=True))


@pytest.mark.skipif(not version("pytorch_optimizer").startswith("4.1."), reason="README.md names version 4.1")
def test_what_is_said_of_pytorch_optimizer():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), torch.randn(16, 4)
    before = [param.detach().clone() for param in model.parameters()]

    def restored():
        return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def closure(scale=1.0):
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * scale
        loss.backward()
        return loss

    optimizer = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0)
    closure()
    optimizer.step(closure)
    assert restored()  # exactly
    assert model[1].num_batches_tracked == 2
    closure()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert not restored()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(closure())  # the scaler starts with its first loss
    closure(1024.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer, lambda: closure(1024.0))
    scaled = model[2].bias.grad.clone()
    closure()
    assert (scaled / model[2].bias.grad).abs() > 100
