"""The certificate of a network with noise in its weights: its parts, and whether it holds."""

import math

import pytest
import torch
from operators import cross_entropy, examples, loss_only, mlp
from scipy.special import ndtr
from sklearn.datasets import load_digits
from slow_reference import scale
from torch import nn

from asam import Geometry
from asam.measure import Objective, gibbs_certificate
from asam.measure.bounds import inverse_kl

FLAT = Geometry("none")


def certificate(model=None, before=None, data=None, sigma=0.1, **arguments):
    model = mlp() if model is None else model
    before = dict(mlp().named_parameters()) if before is None else before
    arguments = {"geometry": FLAT, "samples": 10} | arguments
    return gibbs_certificate(Objective(model, cross_entropy, data or [examples()]), sigma, prior=before, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "layerwise", "none"])
@pytest.mark.parametrize("bias", ["unscaled", "scaled"])
def test_kl_matches_torch(normalization, bias, dtype):
    torch.manual_seed(1)
    before = {name: p + 0.1 * torch.randn_like(p) for name, p in mlp(dtype=dtype).named_parameters()}
    geometry = Geometry(normalization, eta=0.05, bias=bias)
    found = certificate(mlp(dtype=dtype), before, [examples(dtype)], 0.2, geometry=geometry, prior_sigma=0.3, samples=1)
    expected = 0.0
    for name, p in mlp(dtype=dtype).named_parameters():
        w, w0 = p.detach().double(), before[name].detach().double()
        posterior = torch.distributions.Normal(w, 0.2 * scale(name, w, normalization, 0.05, bias))
        prior = torch.distributions.Normal(w0, 0.3 * scale(name, w0, normalization, 0.05, bias))
        expected += torch.distributions.kl_divergence(posterior, prior).sum().item()
    assert found.kl == pytest.approx(expected, rel=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("geometry", [FLAT, Geometry(), Geometry(bias="fixed"), Geometry("layerwise", eta=0)])
def test_kl_of_the_prior_itself_is_zero(geometry):
    assert certificate(geometry=geometry).kl == 0


def test_value_from_its_parts():
    before = {name: p + 0.01 for name, p in mlp().named_parameters()}
    found = certificate(before=before, samples=7, delta=0.1, sigma=0.3)
    assert (found.samples, found.delta, found.n, found.sigma) == (7, 0.1, 12, 0.3)
    assert found.kl == pytest.approx(31 * 0.01**2 / (2 * 0.3**2), rel=1e-12)
    # half of delta for the draws, half for the sample
    assert found.sample_error_bound == inverse_kl(found.sample_error, math.log(2 / 0.1) / 7)
    assert found.value == inverse_kl(found.sample_error_bound, (found.kl + math.log(2 * math.sqrt(12) / 0.05)) / 12)
    assert found.sample_error < found.sample_error_bound < found.value
    assert found.vacuous == (found.value >= 0.99)
    assert certificate(before=before, samples=7, delta=0.1, sigma=0.3) == found


def test_sample_error_is_that_of_the_draws():
    """With next to no noise it is the network's own error, with much of it that of guessing among three classes."""
    own = Objective(mlp(), cross_entropy, [examples()]).means()["error"]
    assert certificate(sigma=1e-9).sample_error == pytest.approx(own)
    assert certificate(sigma=1e3, samples=400).sample_error == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("normalization", "broken", "value", "kl"),
    [
        ("elementwise", "posterior", 0.0, math.inf),
        ("elementwise", "prior", 0.0, math.inf),
        ("elementwise", "prior", math.nan, math.inf),
        ("none", "prior", math.nan, math.nan),
        ("none", "prior", math.inf, math.inf),
    ],
)
def test_certifies_nothing_without_a_finite_kl(normalization, broken, value, kl):
    """With a scale of 0 on one side only neither distribution knows the other."""
    model, other = mlp(), mlp()
    with torch.no_grad():
        (model if broken == "posterior" else other)[0].weight[1, 2] = value
    geometry = Geometry(normalization, eta=0, bias="scaled")
    found = certificate(model, dict(other.named_parameters()), geometry=geometry)
    assert found.kl == pytest.approx(kl, nan_ok=True)
    assert found.value == 1
    assert found.vacuous
    assert found.explain() == (
        "Gibbs certificate 1: vacuous; with noise of scale 0.1 T in the weights the error on the sample is "
        f"{found.sample_error:.3g}, and KL = {kl} nats for 12 examples."
    )


def test_a_weight_fixed_on_both_sides_costs_nothing():
    """The prior is given as the parameters themselves, which move while the error is taken."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[1, 2] = 0
    found = certificate(model, dict(model.named_parameters()), geometry=Geometry(eta=0, bias="scaled"))
    assert found.kl == 0


def test_a_bias_that_is_fixed_may_not_have_been_trained():
    before = {name: p + name.endswith("bias") for name, p in mlp().named_parameters()}
    assert certificate(before=before, geometry=Geometry(bias="unscaled")).kl < math.inf
    assert certificate(before=before, geometry=Geometry(bias="fixed")).kl == math.inf


def test_holds():
    """On 20 samples from N(+-m, I) with labels +-1 the Gibbs classifier, whose error is known, never errs more often.

    The error of a linear classifier v is Phi(-<v, m> / ||v||).
    """
    m = torch.tensor([1.0, 0.5]).double()

    def loss_fn(model, batch):
        margin = model(batch[0])[:, 0] * batch[1]
        return nn.functional.softplus(-margin).mean(), {"error": (margin <= 0).double().mean()}

    values = []
    for seed in range(20):
        torch.manual_seed(seed)
        labels = torch.randint(0, 2, (300,)).double() * 2 - 1
        data = [(labels[:, None] * m + torch.randn(300, 2).double(), labels)]
        model = nn.Linear(2, 1, bias=False).double()
        before = {"weight": torch.zeros(1, 2)}
        optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

        def closure(model=model, data=data, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_fn(model, data[0])[0]
            loss.backward()
            return loss

        optimizer.step(closure)
        found = gibbs_certificate(
            Objective(model, loss_fn, data), 0.3, geometry=FLAT, prior=before, prior_sigma=1.0, samples=60
        )
        v = model.weight.detach() + 0.3 * torch.randn(20000, 2).double()
        error = ndtr((-(v @ m) / v.norm(dim=1)).numpy()).mean()
        assert error <= found.value
        values.append(found.value)
    assert max(values) < 0.5  # a bound of 1 would hold too


def test_is_not_vacuous_on_digits():
    digits = load_digits(n_class=2)
    inputs, targets = torch.tensor(digits.data).double() / 16, torch.tensor(digits.target)
    model = nn.Linear(64, 2).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(30):
        gradients = torch.autograd.grad(loss_only(model, (inputs, targets)), list(model.parameters()))
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), gradients, alpha=0.5)
    found = certificate(model, before, [(inputs, targets)], 0.2, samples=200)
    assert found.n == 360
    assert found.sample_error < 0.02
    assert found.sample_error_bound < found.value < 0.3
    assert not found.vacuous
    assert found.explain() == (
        f"Gibbs certificate {found.value:.3g}: with probability 0.95 over the sample the network with noise of scale "
        f"0.2 T in its weights errs on new data at most so often; on the sample {found.sample_error:.3g}."
    )


def test_refuses_a_loss_without_an_error():
    with pytest.raises(ValueError, match=r"loss_fn must return the 0-1 error: \(loss, \{'error': ...\}\)"):
        gibbs_certificate(
            Objective(mlp(), loss_only, [examples()]), 0.1, geometry=FLAT, prior=dict(mlp().named_parameters())
        )


@pytest.mark.parametrize("error", [2.0, -0.5, math.nan])
def test_refuses_an_error_that_is_not_a_rate(error):
    objective = Objective(mlp(), lambda model, batch: (loss_only(model, batch), {"error": error}), [examples()])
    with pytest.raises(ValueError, match=rf"the error that loss_fn returns must be in \[0, 1\], got {error}"):
        gibbs_certificate(objective, 0.1, geometry=FLAT, prior=dict(mlp().named_parameters()))


def test_refuses_a_prior_of_another_network():
    before = dict(mlp().named_parameters())
    with pytest.raises(ValueError, match=r"prior lacks the parameter '2\.bias'"):
        certificate(before={name: p for name, p in before.items() if name != "2.bias"})
    with pytest.raises(ValueError, match=r"'2\.bias' must have shape \(3,\), got \(4,\)"):
        certificate(before=before | {"2.bias": torch.zeros(4)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, "sigma must be a finite number > 0, got 0.0"),
        ({"prior_sigma": math.inf}, "prior_sigma must be a finite number > 0, got inf"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"delta": 0}, "delta must be a number between 0 and 1, got 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        certificate(**arguments)


def test_a_prior_is_a_mapping():
    with pytest.raises(TypeError, match=r"^prior must be a mapping from names to tensors, .* got Linear$"):
        certificate(before=nn.Linear(2, 3))


def test_a_prior_holds_tensors():
    objective = Objective(nn.Linear(2, 1), lambda model, x: (model(x).mean(), {"error": 0.0}), [torch.ones(4, 2)])
    with pytest.raises(TypeError, match=r"^prior must hold tensors, got NoneType for 'weight'$"):
        gibbs_certificate(objective, 1.0, geometry=Geometry("none"), prior={"weight": None, "bias": None})
    prior = {"weight": torch.ones(1, 2, dtype=torch.long), "bias": torch.ones(1)}
    with pytest.raises(TypeError, match=r"^prior must hold real floating point, got torch\.int64 for 'weight'$"):
        gibbs_certificate(objective, 1.0, geometry=Geometry("none"), prior=prior)
