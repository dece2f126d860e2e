"""One of several processes dies, hangs or fails in a pass: the others fail soon, and what they have and write is w."""

import os
import signal
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from mortal import left_by
from processes import batch, everywhere, loss, network
from slow_reference import assert_same, weights
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from asam import ASAM

FAULTY = 1  # the process with the fault; the first one is to survive


def die():
    os._exit(7)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(10)  # longer than the others wait
    os._exit(7)


def fail():
    raise FileNotFoundError("the data are gone")


def replicas():
    return DistributedDataParallel(network())


def shards():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(45, 3)).double()
    for module in (model[0], model[3], model):
        fully_shard(module)
    return model


def local(tensors):
    return {name: t.to_local().clone() if hasattr(t, "to_local") else t.clone() for name, t in tensors.items()}


def faulty(folder, rank, make, act, place):
    """Two good steps, then a fault in one process; each writes its weights in ``finally``."""
    model, calls, seen = make(), [], []
    asam = ASAM(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def closure(step):
        calls.append(None)
        seen.append(local(weights(model)))
        if step == 2 and rank == FAULTY and (len(calls) - 5, place) in ((0, "ascent"), (1, "descent")):
            act()
        return loss(model, batch(step, rank))

    try:
        for step in range(4):
            before = local(weights(model))
            if step == 2 and rank == FAULTY and place == "between":
                act()
            asam.backward(partial(closure, step))
            optimizer.step()
            optimizer.zero_grad()
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise
    finally:
        torch.save(
            {"weights": local(weights(model)), "before": before, "step": step, "seen": seen[-1], "error": told},
            folder / f"{rank}.pt",
        )


def assert_weights_are_w(left):
    assert left["step"] == 2
    assert_same(left["weights"], left["before"])


@pytest.mark.parametrize(
    ("make", "act", "place", "code"),
    [
        (replicas, killed, "ascent", -signal.SIGKILL),
        (replicas, die, "descent", 7),
        pytest.param(replicas, hang, "ascent", 7, marks=pytest.mark.slow),  # it waits for the time limit
        (replicas, fail, "ascent", 1),
        (replicas, fail, "descent", 1),
        (replicas, fail, "between", 1),
        pytest.param(shards, killed, "ascent", -signal.SIGKILL, marks=pytest.mark.fsdp2),
        pytest.param(shards, die, "descent", 7, marks=pytest.mark.fsdp2),
        pytest.param(shards, fail, "descent", 1, marks=pytest.mark.fsdp2),
    ],
)
def test_the_others_fail_soon_and_hold_w(make, act, place, code, tmp_path):
    started = time.monotonic()
    assert left_by(tmp_path, faulty, make, act, place, timeout=5 if act is hang else 30) == [1, code]
    assert time.monotonic() - started < 25  # a dead or failed one is noticed at once, not when the time is up
    files = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert files == (["0.pt", "1.pt"] if act is fail else ["0.pt"])
    left = torch.load(tmp_path / "0.pt")
    assert_weights_are_w(left)
    assert "RuntimeError" in left["error"] or "DistBackendError" in left["error"], left["error"]
    if make is replicas or place == "descent":
        # it failed in the descent pass, with the weights away from w
        assert not torch.equal(next(iter(left["seen"].values())), next(iter(left["before"].values())))
    if act is fail:
        other = torch.load(tmp_path / "1.pt")
        assert_weights_are_w(other)
        assert other["error"] == "FileNotFoundError: the data are gone"


def not_a_number(folder, rank, call):
    """The loss of one process is NaN in one pass of the second step."""
    for scaled in (False, True):
        model = replicas()
        asam = ASAM(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for step in range(4 if scaled else 2):
            calls, before = [], weights(model)

            def closure(calls=calls, step=step, model=model):
                calls.append(None)
                value = loss(model, batch(step, rank))
                return value * float("nan") if (rank, step, len(calls)) == (FAULTY, 1, call) else value

            asam.backward(closure, backward=lambda value, scaler=scaler: scaler.scale(value).backward())
            assert_same(weights(model), before)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            for param in model.parameters():
                one, other = everywhere(param.detach())
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            finite = all(param.isfinite().all() for param in model.parameters())
            assert finite == (scaled or step < 1)
            if scaled:
                assert scaler.get_scale() == (4.0 if step < 1 else 2.0)
                assert torch.equal(model.module.head.weight, before["module.head.weight"]) == (step == 1)
    torch.save({}, folder / f"{rank}.pt")
    dist.barrier()


@pytest.mark.parametrize("call", [1, 2], ids=["ascent", "descent"])
def test_replicas_stay_equal_if_the_loss_of_one_is_nan(call, tmp_path):
    codes = left_by(tmp_path, not_a_number, call)
    assert codes == [0, 0], (tmp_path / "stderr-0.txt").read_text() + (tmp_path / "stderr-1.txt").read_text()
    assert len(list(tmp_path.glob("*.pt"))) == 2


def all_fail_then_go_on(folder, rank):
    """All processes meet their limit in the same pass, skip the batch, and go on."""
    model, expected = replicas(), replicas()
    asam, calls = ASAM(model), []

    def closure():
        calls.append(None)
        value = loss(model, batch(0, rank))
        if len(calls) == 2:
            torch.empty(2**58, dtype=torch.uint8)  # no machine has so much
        return value

    with pytest.raises(RuntimeError, match="allocate memory"):
        asam.backward(closure)
    model.zero_grad()
    for one, ascent in ((model, asam), (expected, ASAM(expected))):
        for step in range(1, 3):
            inputs, targets = batch(step, rank)
            ascent.backward(lambda one=one, inputs=inputs, targets=targets: loss(one, (inputs[:3], targets[:3])))
            with torch.no_grad():
                for param in one.parameters():
                    param -= 0.1 * param.grad
                    param.grad = None
    assert_same(weights(model), weights(expected))
    dist.barrier()


def test_out_of_memory_everywhere_then_smaller_batches(tmp_path):
    codes = left_by(tmp_path, all_fail_then_go_on)
    assert codes == [0, 0], (tmp_path / "stderr-0.txt").read_text()
