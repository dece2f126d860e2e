"""Command lines that must end well: with a result, or with one line that says what cannot be."""

import io
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from asam.experiments import cli

WILD_NUMBERS = [0, 1, -1, 2, 0.5, -0.5, 1e-320, 1e308, 1e18, 2**31, 2**63 - 1, 2**63, 10**400, math.inf, math.nan]
WILD_TEXTS = [
    "",
    " ",
    "-",
    "--",
    "0x10",
    "1_000",
    "1e999",
    "nan",
    "-inf",
    "true",
    "null",
    "../x",
    "a:b",
    "\n",
    "é\u2028",
]
# the same examples every time, since a failure must not come and go; the slow tests look at more of them
OPTIONS = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class WorkBegunError(Exception):
    """Raised in place of the work that a command would start now."""


def ends_well(*arguments):
    """The exit code of a command line in this process; that it says what it must, and raises nothing, is checked."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["asam", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.run()
        except WorkBegunError:
            return 0
    assert code in (0, 2), (arguments, code)
    if code == 2:
        lines = err.getvalue().splitlines()
        assert len(lines) == 1, (arguments, lines)
        assert lines[0].startswith("asam: "), (arguments, lines)
        assert len(lines[0]) > len("asam: ") + 5
    return code


def wild_values():
    """Values of any type that JSON has."""
    leaves = st.one_of(st.none(), st.booleans(), st.sampled_from(WILD_NUMBERS), st.sampled_from(WILD_TEXTS), st.text())
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))


def damaged(draw, content):
    """The bytes of a file with some of them changed, cut off, or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "put", "zero"]))
        if how == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[place:]
        elif how == "put":
            content[place:place] = draw(st.binary(max_size=20))
        else:
            content[place : place + 64] = bytes(len(content[place : place + 64]))
    return bytes(content)
