"""Lightning with the callback, against loops written by hand; what is logged, counted, kept and refused."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from slow_reference import assert_same
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection

from asam import ASAM
from asam.integrations.lightning import SharpnessAware

pytestmark = [
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Module(LightningModule):
    """Batch norm and dropout: buffers move, and random numbers are drawn."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
        ).double()
        self.optimizer, self.passes = optimizer, 0

    def loss(self, batch):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def training_step(self, batch):
        self.passes += 1
        return self.loss(batch)

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def batches(count=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 4, dtype=dtype, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def loader(data=None):
    return DataLoader(batches() if data is None else data, batch_size=None, generator=torch.Generator())


def trainer(*callbacks, epochs=2, logger=False, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": epochs, "log_every_n_steps": 1, **quiet, **options}
    return Trainer(callbacks=list(callbacks), logger=logger, **options)


def fit(module, *callbacks, data=None, **options):
    torch.manual_seed(2)
    trainer(*callbacks, **options).fit(module, loader(data))
    return module.state_dict()


def by_hand(
    module, *, rho=0.5, data=None, epochs=2, accumulate=1, clip=None, autocast=nullcontext, scaler=None, **more
):
    asam = ASAM(module, rho=rho, **more)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    torch.manual_seed(2)
    data = batches() if data is None else data

    def loss(batch):
        with autocast():
            value = module.loss(batch)
        value = value / accumulate
        return value if scaler is None else scaler.scale(value)

    for _ in range(epochs):
        for i, batch in enumerate(data, start=1):
            asam.backward(lambda batch=batch: loss(batch))
            if i % accumulate and i < len(data):
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                clip(module.parameters())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        scheduler.step()
    return module.state_dict()


def half(dtype):
    return lambda: torch.autocast("cpu", dtype, cache_enabled=False)


def amp():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=1)
    return scaler, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


FITS = {
    "plain": ({}, {}),
    "accumulation": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clipping by norm": (
        {"gradient_clip_val": 0.1},
        {"clip": lambda params: nn.utils.clip_grad_norm_(params, 0.1)},
    ),
    "clipping by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"clip": lambda params: nn.utils.clip_grad_value_(params, 0.01)},
    ),
    "64-true": ({"precision": "64-true"}, {}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"autocast": half(torch.bfloat16)}),
    "16-mixed": ({"accumulate_grad_batches": 2}, {"autocast": half(torch.float16), "accumulate": 2}),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_the_loop_written_by_hand(name, optimizer):
    options, same = (dict(part) for part in FITS[name])
    if name == "16-mixed":
        (scaler, plugins), (same["scaler"], _) = amp(), amp()
        options |= plugins
    dtype = torch.float32 if "mixed" in name else torch.float64
    one, other = (Module(optimizer).to(dtype) for _ in range(2))
    assert_same(
        fit(one, SharpnessAware(rho=0.5), data=batches(dtype=dtype), **options),
        by_hand(other, data=batches(dtype=dtype), **same),
    )
    assert one.passes == 28
    if name == "16-mixed":  # the scale became too large for float16, and steps were left out
        assert scaler.state_dict() == same["scaler"].state_dict()
        assert scaler.get_scale() < 2.0**26


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.05, "normalization": "none"},
        {"p": float("inf"), "eta": 0.1, "bias": "fixed"},
        {"params": ["network.0.weight", "network.4.weight"]},
        {"replay_rng": True},
        {"replay_rng": True, "rho": 0.0},
    ],
)
def test_arguments_reach_asam(options):
    assert_same(fit(Module(), SharpnessAware(**options)), by_hand(Module(), **options))


def test_with_rho_0_a_fit_is_lightnings_own():
    one, other = Module(), Module()
    assert_same(fit(one, SharpnessAware(rho=0.0)), fit(other))
    assert one.passes == 14


class Hooks(Module):
    """Every hook of the step is noted, and ``training_step`` gives a dict."""

    def __init__(self):
        super().__init__()
        self.notes = []
        for name in ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"):
            setattr(self, name, lambda *args, name=name: self.notes.append(name))

    def training_step(self, batch, batch_idx):
        self.notes.append(batch_idx)
        return {"loss": self.loss(batch), "extra": batch.pop("extra")}

    def loss(self, batch):
        return super().loss(batch["xy"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.notes.append(sorted(outputs))


def test_two_passes_and_each_hook_once():
    module = Hooks()
    data = [{"xy": xy, "extra": 1} for xy in batches(2)]
    plain = Hooks()
    same = by_hand(plain, data=data, epochs=1, accumulate=2)
    # training_step takes its batch apart: the second pass gets one of its own
    assert_same(fit(module, SharpnessAware(), data=data, epochs=1, accumulate_grad_batches=2), same)
    backward = ["on_before_backward", "on_after_backward"]
    first = [0, "on_before_zero_grad", backward[0], 0, backward[1], ["extra", "loss"]]
    assert module.notes == [*first, 1, backward[0], 1, backward[1], "on_before_optimizer_step", ["extra", "loss"]]


class InPlace(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.tensor(0), "sum")

    def update(self, value):
        self.seen += 1

    def compute(self):
        return self.seen.float()


class Notes(Logger):
    """A logger that keeps what it gets."""

    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((metrics, step))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Logging(Module):
    def __init__(self):
        super().__init__()
        self.mean, self.cat = MeanMetric(), CatMetric()
        self.both = MetricCollection({"one": InPlace(), "other": InPlace()})

    def training_step(self, batch):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss, "count": 1.0}, reduce_fx="sum", on_epoch=True)
        self.log("mean", self.mean(loss), on_step=True)
        self.cat.update(loss)
        self.both.update(loss)
        self.log("metric", self.mean, on_epoch=True)
        self.logger.log_metrics({"by hand": loss.item()}, step=self.global_step)
        self.print("a step")
        return loss

    def on_train_epoch_end(self):
        self.log_dict(self.both)
        self.log("cat", self.cat.compute().sum())


def test_nothing_is_logged_or_counted_twice(capsys):
    def logged(rho):
        module, notes = Logging(), Notes()
        # one step: what is logged of it cannot depend on rho
        fit(
            module,
            SharpnessAware(rho=rho, replay_rng=True),
            data=batches(3),
            epochs=1,
            accumulate_grad_batches=3,
            logger=notes,
        )
        return notes.lines, module

    plain, _ = logged(0.0)
    lines, module = logged(0.5)
    assert lines == plain
    assert len(lines) == 3 + 1 + 1  # by hand, the step, the epoch
    assert lines[-1][0]["one"] == 3
    assert module.cat.update_count == 3
    assert capsys.readouterr().out.count("a step") == 2 * 3  # plain, and with ASAM
    assert "log" not in vars(module)


class Skipping(Module):
    at = ()

    def training_step(self, batch):
        loss = super().training_step(batch)
        return None if self.passes in self.at else loss


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_skipped_step_is_left_alone():
    module, other = Skipping(), Module()
    # passes 1 and 2 are of the first batch, 3 at w of the second, which is left out, 5 at w + e of the third
    module.at = (3, 5)
    fit(module, SharpnessAware(), data=batches(4), epochs=1)
    assert module.passes == 7

    (optimizer,), _ = other.configure_optimizers()
    asam = ASAM(other)
    torch.manual_seed(2)
    for i, batch in enumerate(batches(4)):
        if i in (1, 2):
            for _ in range(i):  # which draw random numbers
                other.loss(batch)
        else:
            asam.backward(lambda batch=batch: other.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
    assert_same(dict(module.named_parameters()), dict(other.named_parameters()))


def test_a_skip_at_w_and_e_alone_is_told_to_a_scaler():
    module = Skipping().float()
    module.at = (2,)
    with pytest.raises(RuntimeError, match="must return a loss at w \\+ e if it does at w, got None"):
        fit(module, SharpnessAware(), data=batches(dtype=torch.float32), **amp()[1])


class Schedule(Callback):
    """rho is halved at each epoch, through the one or the other attribute."""

    def __init__(self, through):
        self.through = through

    def on_train_epoch_start(self, trainer, pl_module):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, SharpnessAware))
        owner = callback if self.through == "callback" else callback.asam
        owner.rho = callback.rho / 2


class Validated(Module):
    def validation_step(self, batch):
        assert not self.training
        self.log("val_loss", self.loss(batch))


@pytest.mark.parametrize("through", ["callback", "asam"])
def test_a_resumed_fit_goes_on_to_the_bit(through, tmp_path):
    def start(epochs, module, **options):
        callback = SharpnessAware(rho=2.0)
        # validation every third batch, and before the first
        one = trainer(callback, Schedule(through), epochs=epochs, val_check_interval=3, num_sanity_val_steps=2)
        one.fit(module, loader(), loader(batches(2)), **options)
        return callback, one

    whole, part, rest = (Validated("adamw") for _ in range(3))
    torch.manual_seed(2)
    start(4, whole)
    torch.manual_seed(2)
    _, one = start(2, part)
    one.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SharpnessAware"] == {"rho": 0.5}
    callback, _ = start(4, rest, ckpt_path=tmp_path / "last.ckpt")
    assert callback.rho == 2 / 2**4
    assert_same(rest.state_dict(), whole.state_dict())
    assert not torch.equal(part.network[0].weight, whole.network[0].weight)


def test_a_second_fit_and_its_rho():
    module, callback, other = Module(), SharpnessAware(rho=2.0), Module()
    fit(module, callback, Schedule("asam"), epochs=1)
    assert callback.rho == 1
    assert callback.asam is None
    callback.rho = 0.3
    assert callback.state_dict() == {"rho": 0.3}
    by_hand(other, rho=1.0, epochs=1)
    assert_same(fit(module, callback), by_hand(other, rho=0.3))


@pytest.mark.parametrize(("error", "told"), [(KeyboardInterrupt, SystemExit), (ZeroDivisionError, ZeroDivisionError)])
def test_an_exception_at_w_and_e_leaves_nothing_behind(error, told, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *args: None)  # Lightning turns Ctrl-C off for good

    class Failing(Logging):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.passes += 1
            if self.passes == 2:
                self.at_w_and_e = {name: param.detach().clone() for name, param in self.named_parameters()}
                raise error(1)
            return loss

    module, callback = Failing(), SharpnessAware()
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    notes = Notes()
    one = trainer(callback, logger=notes)
    with pytest.raises(told, match="1"):
        one.fit(module, loader())
    assert not torch.equal(module.at_w_and_e["network.0.weight"], before["network.0.weight"])
    assert_same(dict(module.named_parameters()), before)
    assert module.both["one"].seen == 1
    assert one.loggers == [notes]
    assert not {"backward", "log", "print"} & vars(module).keys()
    assert "training_step" not in vars(one.strategy)
    assert callback.asam is None
    # and it can train again
    module.load_state_dict(Logging().state_dict())
    assert_same(fit(module, callback, logger=Notes()), by_hand(Logging()))


def test_a_backward_of_the_modules_own_runs_in_both_passes():
    class Own(Module):
        losses = ()

        def backward(self, loss):
            self.losses = (*self.losses, loss.item())
            (2 * loss).backward()

    module, other = Own(), Own()
    fit(module, SharpnessAware(), epochs=1)
    assert len(module.losses) == 14
    asam, ((optimizer,), _) = ASAM(other), other.configure_optimizers()
    torch.manual_seed(2)
    for batch in batches():
        asam.backward(lambda batch=batch: other.loss(batch), backward=other.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module.state_dict(), other.state_dict())


@pytest.mark.slow
def test_a_compiled_module_is_compiled_once():
    class Compiled(Module):
        def training_step(self, batch):
            return self.loss(batch)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    module, plain = Compiled(), Compiled()
    fit(torch.compile(module, backend=backend), SharpnessAware(), epochs=4)
    assert len(graphs) == 1
    assert_same(module.state_dict(), fit(plain, SharpnessAware(), epochs=4))


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
            r"needs automatic_optimization=True\..*call asam\.backward\(closure\) in training_step",
        ),
        (Iterating, {}, RuntimeError, "let training_step take batch, not dataloader_iter"),
        (Searching, {}, TypeError, "must take its step from the gradient, and LBFGS evaluates the loss itself"),
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


def test_ddp_and_fsdp2(tmp_path):
    script = Path(__file__).with_name("lightning_processes.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300)
