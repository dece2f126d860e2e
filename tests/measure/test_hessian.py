"""Products with the Hessian: closed forms, ``torch.func``, SciPy and curvlinops."""

import itertools
import warnings

import pytest
import torch
from operators import Chain, chain_loss, columns, cross_entropy, dense_hessian, examples, loss_only, mlp
from scipy.sparse.linalg import eigsh
from slow_reference import scale
from torch import nn

from asam import Geometry
from asam.measure import Objective, hessian, spectral_density, top_eigenvalues, trace

SCALED = Geometry(eta=0, bias="scaled")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.used = nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer(1, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.layer(x[..., None])[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(1, 6)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        q, k, v = self.qkv(x[..., None]).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


class Encoder(nn.Module):
    """The block of the library, whose fast path in eval mode has no gradient."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(1, 2)
        self.block = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.1, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.block(self.lift(x[..., None])).mean(1))


MODELS = {
    "tanh": mlp,
    "relu": lambda: mlp(nn.ReLU),
    "layer-norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)),
    "batch-norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
    "tied": Tied,
    "frozen": frozen,
    "unused": Unused,
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "attention": Attention,
    "encoder": Encoder,
}


@pytest.fixture(scope="module")
def curvlinops():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torch.jit.script
        import curvlinops
    return curvlinops


def close(actual, expected, rtol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-3 * rtol)


def ragged(batch, *sizes):
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


def test_softmax_regression():
    """The Hessian is the mean of (diag p - p p') kron x x'."""
    model, (inputs, targets) = nn.Linear(3, 3, bias=False).double(), examples()
    probabilities = (inputs @ model.weight.T).softmax(1).detach()
    expected = sum(
        torch.kron(p.diag() - torch.outer(p, p), torch.outer(x, x)) for p, x in zip(probabilities, inputs, strict=True)
    ) / len(inputs)
    close(columns(hessian(Objective(model, cross_entropy, [(inputs, targets)]))), expected, rtol=1e-12)


@pytest.mark.parametrize("weights", [[1.5], [2.0, 0.75], [-0.1, 3.0, -5.0], [10.0, 0.01, 5.0, 3.0]])
def test_a_chain_has_the_same_adaptive_curvature_however_it_is_rescaled(weights):
    """At a product of y = 1.5 in L factors THT is y^2 times the matrix of ones."""
    operator = hessian(Objective(Chain(weights), chain_loss, [torch.full((1,), 1.5).double()]), geometry=SCALED)
    signs = torch.tensor(weights).double().sign()
    close(columns(operator), 1.5**2 * torch.outer(signs, signs), rtol=1e-12)
    expected = pytest.approx(len(weights) * 1.5**2, rel=1e-12)
    assert top_eigenvalues(operator).values.item() == expected
    assert trace(operator).value == expected


@pytest.mark.parametrize("name", MODELS)
def test_matches_autograd(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]().double(), examples()
    expected = dense_hessian(model, loss_only, batch)
    assert expected.abs().max() > 1e-2
    objective = Objective(model, cross_entropy, ragged(batch, 1, 7, 4))
    operator = hessian(objective)
    assert operator.shape == expected.shape
    assert operator.dtype == torch.float64
    product = columns(operator)
    close(product, expected)
    if name == "unused":
        assert not product[:6].any()
        assert not product[:, :6].any()


def test_in_single_precision():
    batch = examples()
    expected = dense_hessian(mlp(), loss_only, batch)
    operator = hessian(Objective(mlp(dtype=torch.float32), cross_entropy, [examples(torch.float32)]))
    assert columns(operator).dtype == torch.float32
    torch.testing.assert_close(columns(operator).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("normalization", "eta", "bias"),
    [
        *itertools.product(["elementwise", "filterwise", "layerwise"], [0.0, 0.01], ["unscaled", "scaled", "fixed"]),
        *itertools.product(["none", lambda w: w.abs().amax() + 0.1], [0.0], ["unscaled", "scaled", "fixed"]),
    ],
)
def test_scaled_by_a_geometry(normalization, eta, bias):
    model, batch = mlp(), examples()
    parts = [scale(name, w.detach(), normalization, eta, bias) for name, w in model.named_parameters()]
    scales = torch.cat([part.flatten() for part in parts])
    geometry = Geometry(normalization, eta=eta, bias=bias)
    operator = hessian(Objective(model, cross_entropy, [batch]), geometry=geometry)
    close(operator.scales, scales, rtol=1e-12)
    close(columns(operator), scales[:, None] * dense_hessian(model, loss_only, batch) * scales)


@pytest.mark.parametrize("geometry", [None, SCALED])
def test_a_matrix_is_multiplied_column_by_column(geometry):
    operator = hessian(Objective(mlp(), cross_entropy, ragged(examples(), 5, 7)), geometry=geometry)
    matrix = torch.randn(31, 4, dtype=torch.float64)
    product = operator @ matrix
    assert product.shape == (31, 4)
    assert torch.equal(product, torch.stack([operator.matvec(column) for column in matrix.T], dim=1))


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [1, 11]])
def test_does_not_depend_on_the_batches(sizes):
    v = torch.randn(31, dtype=torch.float64)
    whole, cut = (hessian(Objective(mlp(), cross_entropy, data)) for data in ([examples()], ragged(examples(), *sizes)))
    close(cut @ v, whole @ v, rtol=1e-12)


def test_of_a_linear_loss_is_zero():
    objective = Objective(mlp(nn.Identity), lambda model, x: sum(p.sum() for p in model.parameters()), [torch.ones(1)])
    assert not columns(hessian(objective)).any()


def test_a_parameter_that_enters_linearly():
    """The gradient with respect to the last bias has no graph, the others have."""
    objective = Objective(mlp(), lambda model, x: model(x).mean(), [examples()[0]])
    product = columns(hessian(objective))
    close(product, dense_hessian(mlp(), lambda model, x: model(x).mean(), examples()[0]))
    assert not product[-3:].any()
    assert product[:16, 16:28].any()


@pytest.mark.parametrize("names", [["0.weight"], ["2.bias", "0.bias"], ["2.weight", "2.bias"]])
def test_of_some_parameters(names):
    objective = Objective(mlp(), cross_entropy, [examples()], params=names)
    close(columns(hessian(objective)), dense_hessian(mlp(), loss_only, examples(), names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_scipy(dtype):
    operator = hessian(Objective(mlp(dtype=dtype), cross_entropy, [examples(dtype)]))
    linear = operator.as_scipy()
    assert linear.shape == operator.shape
    matrix = torch.randn(31, 3, dtype=dtype)
    array = matrix.numpy()
    array.flags.writeable = False  # such as a broadcast array
    for product in (linear.matmat(array), linear @ array):
        assert product.dtype == linear.dtype == array.dtype
        assert torch.equal(torch.from_numpy(product), operator @ matrix)
    assert torch.equal(torch.from_numpy(linear.T @ array[:, 0]), operator @ matrix[:, 0])
    assert torch.equal(torch.from_numpy(linear @ array[::-1, 0]), operator @ matrix[:, 0].flip(0))
    exact = torch.linalg.eigvalsh(dense_hessian(mlp(), loss_only, examples()))
    found = torch.from_numpy(eigsh(linear, k=3, which="LA", return_eigenvectors=False)).double()
    close(found.sort().values, exact[-3:], rtol=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", ["tanh", "relu", "batch-norm", "tied"])
def test_matches_curvlinops(curvlinops, name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    data = ragged(examples(), 5, 7)
    theirs = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), [p for p in model.parameters() if p.requires_grad], data
    )
    ours = hessian(Objective(model, cross_entropy, data))
    assert ours.shape == theirs.shape
    matrix = torch.randn(ours.shape[0], 3, dtype=torch.float64)
    close(ours @ matrix, (theirs @ matrix).detach())
    values = eigsh(theirs.to_scipy(), k=2, which="LA", return_eigenvectors=False, tol=1e-12)
    close(top_eigenvalues(ours, 2, tol=1e-7).values, torch.from_numpy(values).sort(descending=True).values)
    exact = (theirs @ torch.eye(ours.shape[0], dtype=torch.float64)).trace().item()
    assert trace(ours, matvecs=3 * ours.shape[0]).value == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 2), (1,), (), (2, 3, 1)])
def test_what_is_no_column_is_refused(shape):
    model = nn.Linear(2, 1, bias=False)
    operator = hessian(Objective(model, lambda model, x: model(x).square().mean(), [torch.ones(1, 2)]))
    with pytest.raises(ValueError, match=r"takes a vector of shape \(2,\) or a matrix of such columns, got shape"):
        operator.matvec(torch.ones(shape))


class Once(torch.autograd.Function):
    """tanh, with a backward pass by hand that autograd is told not to follow."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh().square())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(4, 2), Once.apply], "the backward pass of Once is marked with @once_differentiable"),
        ([nn.Linear(4, 3), Once.apply, nn.Linear(3, 2)], "the backward pass of Once is marked"),
        ([nn.EmbeddingBag(9, 3), nn.Linear(3, 2)], "the derivative for '_embedding_bag_backward' is not implemented"),
    ],
)
def test_a_loss_without_a_second_derivative_is_refused(layers, message):
    model = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))
    inputs = torch.tensor([[1, 2], [3, 4]]) if isinstance(layers[0], nn.EmbeddingBag) else torch.randn(2, 4)

    def loss_fn(model, batch):
        x = batch
        for layer in layers:
            x = layer(x)
        return x.square().sum()

    with pytest.raises(ValueError, match=f"^the loss has no second derivative: {message}"):
        hessian(Objective(model, loss_fn, [inputs])) @ torch.ones(sum(p.numel() for p in model.parameters()))


def test_a_model_that_torch_has_compiled_has_no_products():
    model = torch.compile(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), backend="aot_eager")
    objective = Objective(model, lambda model, batch: model(batch).square().mean(), [torch.randn(7, 6)])
    with pytest.raises(ValueError, match=r"^the loss has no second derivative: "):
        hessian(objective) @ torch.ones(41)


def test_a_product_takes_a_tensor():
    operator = hessian(Objective(mlp(), cross_entropy, [examples()]))
    with pytest.raises(TypeError, match=r"^a product takes a torch tensor, got ndarray: for NumPy use as_scipy\(\)$"):
        operator @ torch.ones(31).numpy()


def test_what_lies_before_the_measured_parameters_does_not_count():
    body, head = nn.Linear(4, 3), nn.Linear(3, 2)
    model, inputs = nn.ModuleList([body, head]), torch.randn(8, 4)

    def loss_with(function):
        return lambda model, x: model[1](function(model[0](x))).square().mean()

    vector = torch.ones(head.weight.numel())
    products = [
        hessian(Objective(model, loss_with(function), [inputs], params=["1.weight"])) @ vector
        for function in (Once.apply, torch.tanh)
    ]
    torch.testing.assert_close(*products)
    with pytest.raises(ValueError, match="marked with @once_differentiable"):
        hessian(Objective(model, loss_with(Once.apply), [inputs])) @ torch.ones(23)


def test_a_backward_pass_that_fails_for_another_reason_says_so():
    model = nn.Linear(4, 2)

    def loss_fn(model, x):
        out = model(x)
        if broken:
            out.register_hook(lambda grad: 1 / 0)
        return out.square().mean()

    broken = []
    operator = hessian(Objective(model, loss_fn, [torch.randn(3, 4)]))
    broken.append(1)
    with pytest.raises(ZeroDivisionError):
        operator @ torch.ones(10)


def test_what_has_no_products_is_refused():
    model = nn.Linear(2, 1)
    objective = Objective(model, lambda model, x: model(x).square().mean(), [torch.ones(1, 2)])
    for function in (top_eigenvalues, trace, spectral_density):
        with pytest.raises(
            TypeError, match=r"^operator must have a matvec, such as hessian\(objective\), got Objective$"
        ):
            function(objective)


def test_a_complex_vector_is_refused():
    operator = hessian(Objective(mlp(), cross_entropy, [examples()]))
    vector = torch.ones(operator.shape[0], dtype=torch.complex128)
    for product in (lambda: operator @ vector, lambda: operator.as_scipy() @ vector.numpy()):
        with pytest.raises(TypeError, match=r"^a product takes a real vector, got torch\.complex128$"):
            product()


def test_the_model_in_another_dtype_since():
    model = mlp(dtype=torch.float32)

    def loss_fn(model, batch):
        return cross_entropy(model, (batch[0].to(model[0].weight.dtype), batch[1]))

    operator = hessian(Objective(model, loss_fn, [examples(torch.float32)]))
    before = top_eigenvalues(operator).values
    model.double()
    torch.testing.assert_close(top_eigenvalues(operator).values, before, rtol=1e-4, atol=0)
