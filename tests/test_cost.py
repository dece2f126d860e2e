"""What a step costs beyond its two passes: operations, synchronizations, memory."""

import gc
from collections import Counter

import pytest
import torch
from torch import is_tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asam import ASAM, SAM, Geometry, SharpnessAwareOptimizer

# what touches no memory
VIEWS = ("detach", "lift_fresh", "slice", "view")
# what brings a value back to the host
SYNCHRONIZING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


class Operations(TorchDispatchMode):
    """The names of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(run):
    with Operations() as mode:
        run()
    return mode.names


def plain_layers():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(80)))


def normalized_layers():
    return nn.Sequential(*(layer for _ in range(40) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8))))


def problem(layers, device="cpu"):
    with torch.device(device):
        model, inputs = layers(), torch.randn(4, 8)
    assert len(list(model.parameters())) == 160
    return model, lambda: model(inputs).square().mean()


def ours(make, layers):
    """The operations of ``asam.backward`` that are not those of two bare passes."""
    model, closure = problem(layers)
    asam = make(model)
    asam.backward(closure)
    model.zero_grad()
    bare = operations(lambda: torch.autograd.grad(closure(), list(asam._params.values())))
    bare += operations(lambda: closure().backward())
    model.zero_grad()
    whole = Counter(operations(lambda: asam.backward(closure)))
    assert whole >= Counter(bare)
    return list((whole - Counter(bare)).elements())


MAKERS = {
    "ASAM": ASAM,
    "ASAM p=1.5": lambda model: ASAM(model, p=1.5),
    "ASAM p=inf": lambda model: ASAM(model, p=float("inf")),
    "ASAM scaled": lambda model: ASAM(model, bias="scaled"),
    "ASAM weights": lambda model: ASAM(model, bias="fixed"),
    "SAM": SAM,
}


ONE_BY_ONE = pytest.mark.skipif(not hasattr(torch, "_foreach_clone"), reason="this torch copies buffers one by one")


@pytest.mark.parametrize("layers", [plain_layers, pytest.param(normalized_layers, marks=ONE_BY_ONE)])
@pytest.mark.parametrize("make", MAKERS)
def test_operations_for_160_tensors(make, layers):
    every = ours(MAKERS[make], layers)
    names = [name for name in every if name not in VIEWS]
    # two blocks, of 8 x 8 and of 8, for each of which p = 1.5 takes most
    assert 0 < len(names) <= 75, names
    # with biases fixed there are 40 of each, too few for a block of one shape: they are laid end to end one by one
    one_by_one = make == "ASAM weights" and layers is normalized_layers
    assert len(every) - len(names) <= (6 * 80 + 10 if one_by_one else 15)
    # on the CPU: the norm of each block, to see whether it may be used as it is
    assert sum(name in SYNCHRONIZING for name in names) <= 2


@pytest.mark.parametrize("make", ["ASAM", "SAM"])
def test_list_calls_for_160_tensors(make):
    calls = [name for name in ours(MAKERS[make], plain_layers) if name.startswith("_foreach")]
    assert "_foreach_copy_" in calls
    assert len(calls) <= 16 + 1, calls


class Traffic(TorchDispatchMode):
    """The bytes that operations read and write, whether those come from a cache or not."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("copy_", "_foreach_copy_"):  # what is there is written over, not read
            self.bytes += 2 * sum(tensor.nbytes for tensor in tree_leaves(args[0]))
        elif name not in (*VIEWS, "unbind"):
            read = {(tensor.data_ptr(), tensor.nbytes) for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
            written = [tensor.nbytes for tensor in tree_leaves(result) if is_tensor(tensor)]
            self.bytes += sum(size for _, size in read) + sum(written)
        return result


def many_shapes():
    return nn.Sequential(*(nn.Linear(8 + i % 9, 8 + i % 9) for i in range(80)))


def large_layers():
    return nn.Linear(1000, 1000)


@pytest.mark.parametrize(
    ("make", "layers", "most"),
    [
        (ASAM, plain_layers, 20),
        (ASAM, many_shapes, 20.2),  # T of the biases, which is 1, is written too
        (ASAM, large_layers, 20.1),
        (SAM, plain_layers, 12),
        (SAM, many_shapes, 12),
        (SAM, large_layers, 8.1),
    ],
)
def test_traffic_of_the_way_to_the_perturbed_weights_and_back(make, layers, most):
    model = layers()
    asam = make(model)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    with Traffic() as traffic, asam.perturbed():
        pass
    assert 8 < traffic.bytes / size_of(model.parameters()) <= most + 1e-3


@pytest.mark.parametrize("normalization", ["elementwise", "filterwise", "layerwise", "none"])
@pytest.mark.parametrize("p", [1.5, 2, float("inf")])
def test_no_value_comes_back_from_an_accelerator(normalization, p):
    # "meta" is none of the CPU's memory, as an accelerator is none
    model, closure = problem(normalized_layers, "meta")
    asam = ASAM(model, normalization=normalization, p=p)
    names = operations(lambda: asam.backward(closure))
    closure().backward()

    def through():
        with asam.perturbed():
            pass

    names += operations(through)
    names += operations(lambda: asam.backward(closure, backward=lambda loss: loss.backward()))
    names += operations(lambda: asam.geometry.scales(dict(model.named_parameters())))
    assert not [name for name in names if name in SYNCHRONIZING]


def test_a_step_of_fake_tensors():
    with FakeTensorMode():
        model, closure = problem(normalized_layers)
        assert ASAM(model).backward(closure).shape == ()


def test_what_synchronizes_would_be_seen():
    names = operations(
        lambda: (torch.ones(()).item(), bool(torch.ones(()) > 0), torch.equal(torch.ones(2), torch.ones(2)))
    )
    assert set(names) >= {"_local_scalar_dense", "equal"}


def live_bytes():
    """The bytes of every storage that a new tensor within Python's reach holds."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):  # not the fake ones that a compiled model leaves behind
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def wide():
    return nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 200), nn.Linear(200, 1))


def size_of(params):
    return sum(param.numel() * param.element_size() for param in params)


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("limit", [2**17, 5000])
@pytest.mark.parametrize(
    "make",
    [
        ASAM,
        SAM,
        lambda model: ASAM(model, p=1.5),
        lambda model: ASAM(model, normalization="filterwise"),
        lambda model: ASAM(model, params=["0.weight"]),
        lambda model: ASAM(model, bias="fixed"),
    ],
    ids=["ASAM", "SAM", "p=1.5", "filterwise", "params", "fixed"],
)
@pytest.mark.parametrize("way", ["backward", "through", "perturbed", "optimizer"])
def test_extra_memory_is_one_copy_of_what_is_perturbed(way, make, limit, monkeypatch):
    monkeypatch.setattr("asam.blocks.CPU_BLOCK", limit)
    model = wide()
    asam = make(model)
    perturbed = size_of(asam._params.values())
    inputs = torch.randn(4, 200)
    optimizer = SharpnessAwareOptimizer(asam, torch.optim.SGD(model.parameters(), lr=0.1))
    used = []

    def closure():
        used.append(live_bytes())
        return model(inputs).square().mean()

    def full():
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss.detach()

    before = live_bytes()
    if way == "backward":
        asam.backward(closure)
    elif way == "through":
        asam.backward(closure, backward=lambda loss: loss.backward())
    elif way == "optimizer":
        optimizer.step(full)
    else:
        full()
        with asam.perturbed():
            full()
    at_w, at_perturbed = used
    assert at_w == before
    # besides the copy: the loss and two numbers that make up the norm
    assert perturbed <= at_perturbed - at_w <= perturbed + 200
    model.zero_grad()
    assert live_bytes() == before


@pytest.mark.usefixtures("only_new_objects")
def test_the_ascent_gradient_is_let_go_block_by_block(monkeypatch):
    # while the weights move, gradient and copy together are one set of tensors, and one block of scratch
    monkeypatch.setattr("asam.blocks.CPU_BLOCK", 10_000)
    params = {str(i): torch.randn(100, 100) for i in range(10)}
    size, used, copies = 40_000, [], []
    grads = [torch.randn(100, 100) for _ in params]
    before = live_bytes()
    for block in Geometry().blocks(list(params), list(params.values()), grads, 0.1):
        copies.append([target.clone() for target in block.targets])
        block.move()
        used.append(live_bytes() - before)
        del block
    assert grads == []
    assert max(used) <= size + 200
    assert used[-1] <= size + 200


def test_the_graph_is_looked_at_once_while_the_same_gradients_are_missing(monkeypatch):
    looks = []
    monkeypatch.setattr("asam.passes.check_reaches_parameters", looks.append)
    model, inputs = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]), torch.randn(4, 3)
    asam = ASAM(model)
    for used in (0, 0, 0, 1, 1, 0):
        asam.backward(lambda used=used: model[used](inputs).square().mean())
    assert len(looks) == 3
