"""Lightning: what the second pass must not do twice, steps that are skipped, exceptions."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_problem import Module, amp, batches, by_hand, fit, loader, trainer
from slow_reference import assert_same
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection

from asam import ASAM
from asam.integrations.lightning import SharpnessAware

pytestmark = [
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


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


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Changing(Module):
    """Changes its batch, or what is in it, in the way that most do."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def training_step(self, batch, batch_idx):
        if self.kind == "dict in a list":
            inner = batch[0]
            inner["x"] = inner["x"] / 4
            inner.pop("id", None)
            return self.loss((inner["x"], batch[1]))
        if self.kind == "object":
            batch.x = batch.x / 4
            return self.loss((batch.x, batch.y))
        x, y = batch
        return self.loss((x / 4, y if isinstance(y, torch.Tensor) else next(iter(y))))


@pytest.mark.parametrize("kind", ["dict in a list", "object", "generator"])
def test_both_passes_get_the_batch_as_it_was(kind):
    make = {
        "dict in a list": lambda x, y: [{"x": x, "id": 1}, y],
        "object": Pair,
        "generator": lambda x, y: (x, iter([y, y])),
    }[kind]
    data = batches(4)
    expected = fit(Changing("plain"), SharpnessAware(), data=data, epochs=1)
    assert_same(fit(Changing(kind), SharpnessAware(), data=[make(x, y) for x, y in data], epochs=1), expected)


class Asking(Module):
    """Writes where the logger says."""

    def __init__(self):
        super().__init__()
        self.said = []

    def training_step(self, batch, batch_idx):
        logger = self.logger
        self.said.append((logger.name, logger.version, logger.save_dir, logger.log_dir, self.trainer.logger.root_dir))
        return self.loss(batch)


def test_a_logger_says_the_same_in_both_passes(tmp_path):
    module = Asking()
    fit(module, SharpnessAware(), epochs=1, logger=CSVLogger(tmp_path, "ours"))
    first, again, *_ = module.said
    assert first == again
    assert first[3] == str(tmp_path / "ours" / "version_0")


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
