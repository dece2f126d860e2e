import gc
import multiprocessing
import signal

import pytest
import torch

collect_ignore = ["fuzz/coverage_guided.py"]  # a script that needs atheris
torch.set_num_threads(1)
gc.disable()  # until all is imported: nothing of that is garbage
# a shell's background job is deaf to Ctrl-C, and so would be all that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
# imported once for all processes that a server forks; not modules of the tests, which it does not find
PRELOADED = "torch._dynamo torch.distributed.fsdp torch.utils.tensorboard sklearn.datasets asam.experiments.runs"
multiprocessing.set_forkserver_preload([*PRELOADED.split(), "asam.experiments.sessions", "asam.experiments.cli"])


def pytest_collection_finish():
    gc.enable()


def pytest_runtest_setup(item):
    if item.get_closest_marker("fsdp2") and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 on the CPU needs a torch newer than 2.6")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def only_new_objects():
    """Let the collector list only what the tests of a module make, for those that count what is alive."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
