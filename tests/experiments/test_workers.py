import time
from itertools import pairwise

import pytest

from asam.experiments import InputError, workers
from asam.experiments.workers import work_together


def sleep(seconds):
    time.sleep(seconds)


def test_looking_takes_a_small_share_of_the_time(monkeypatch):
    monkeypatch.setattr(workers, "LOOK", 0.01)
    looks = []

    def look():
        looks.append(time.monotonic())
        time.sleep(0.02)
        return True

    work_together(sleep, (3.0,), 1, look)
    assert len(looks) >= 3
    assert all(after - before >= 1 for before, after in pairwise(looks[:-1]))  # the last is when the process has ended


def test_all_is_done_if_it_is_after_the_last_process_has_ended(tmp_path):
    looks = []

    def look():
        looks.append(len(looks))
        return (tmp_path / "done").exists()

    work_together((tmp_path / "done").touch, (), 1, look)
    assert len(looks) >= 2


def test_not_all_is_done_and_no_process_is_left():
    with pytest.raises(InputError, match="the worker processes were killed"):
        work_together(sleep, (0.0,), 2, lambda: False)
