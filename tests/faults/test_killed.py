"""A process that ends in the middle of a step, with the weights at w + e: what it leaves on disk, and to go on from."""

import signal

import pytest
import torch
from doomed import STEPS, Training, at, exit_code, killed, signalled


def assert_equal(actual, expected):
    """Equal to the bit, whatever is nested in them."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_equal(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    else:
        assert actual == expected


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The checkpoint before each step and after the last."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with torch.random.fork_rng():
        Training().run(each=lambda training: training.save(folder / str(training.step)))
    return [torch.load(folder / str(step), weights_only=True) for step in range(STEPS + 1)]


@pytest.mark.parametrize("call", [1, 2], ids=["ascent", "descent"])
def test_kill_9_in_either_pass_changes_nothing(call, uninterrupted, tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert exit_code(killed, path, 5, call) == -signal.SIGKILL
    assert_equal(torch.load(path, weights_only=True), uninterrupted[5])
    assert_equal(Training().resume(path).run(), uninterrupted[-1])


@pytest.mark.parametrize("call", [1, 2], ids=["ascent", "descent"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 3)], ids=["SIGINT", "SIGTERM with a handler that exits"]
)
def test_a_checkpoint_in_finally_holds_w(number, code, call, uninterrupted, tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert exit_code(signalled, path, number, call) == code
    left, before = torch.load(path, weights_only=True), uninterrupted[5]
    assert left["step"] == 5
    model, model_before = left["parts"][0], before["parts"][0]
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"):
        assert torch.equal(model[name], model_before[name])
    # the ascent pass has moved them; the descent pass does not
    assert model["1.num_batches_tracked"] == model_before["1.num_batches_tracked"] + 1
    assert_equal(model["1.running_mean"], uninterrupted[6]["parts"][0]["1.running_mean"])
    assert_equal(left["parts"][1:], before["parts"][1:])


def out_of_memory():
    """For real: no machine has so much."""
    torch.empty(2**58, dtype=torch.uint8)


def dataset_is_gone():
    raise FileNotFoundError("the data are gone")


@pytest.mark.parametrize("call", [1, 2], ids=["ascent", "descent"])
@pytest.mark.parametrize(
    ("act", "error", "message"),
    [(out_of_memory, RuntimeError, "allocate memory"), (dataset_is_gone, FileNotFoundError, "are gone")],
    ids=["out of memory", "data"],
)
def test_the_next_attempt_is_as_if_there_had_been_none(act, error, message, call):
    training, expected = Training(), Training()
    with pytest.raises(error, match=message):
        training.run(at(0, call, act))
    for name, buffer in expected.model.named_buffers():  # what the ascent pass has moved
        training.model.get_buffer(name).copy_(buffer)
    torch.manual_seed(1)
    got = training.run()
    torch.manual_seed(1)
    assert_equal(got, expected.run())
