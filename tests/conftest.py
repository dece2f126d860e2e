import gc

import pytest
import torch

torch.set_num_threads(1)


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
