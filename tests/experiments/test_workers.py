"""Several processes at one piece of work, and the parent that looks how far they are."""

import multiprocessing
import time
from itertools import pairwise

import pytest

from asam.experiments import InputError, workers
from asam.experiments.workers import work_together


def test_looking_takes_a_small_share_of_the_time(monkeypatch):
    monkeypatch.setattr(workers, "LOOK", 0.01)
    looks = []

    def look():
        looks.append(time.monotonic())
        time.sleep(0.02)
        return True

    work_together(time.sleep, (3.0,), 1, look)
    assert len(looks) >= 3
    assert all(after - before >= 1 for before, after in pairwise(looks[:-1]))  # the last is when the process has ended


def test_work_that_ended_during_a_look_is_done(tmp_path):
    def look():
        seen = (tmp_path / "done").exists()
        while multiprocessing.active_children():
            time.sleep(0.01)
        return seen

    work_together((tmp_path / "done").touch, (), 1, look)
    assert (tmp_path / "done").exists()


def test_not_all_is_done_and_no_process_is_left():
    with pytest.raises(InputError, match="the worker processes were killed"):
        work_together(time.sleep, (0.0,), 2, lambda: False)
