"""Any command line ends with a result or a refusal in one line; what would then be worked on is not."""

from dataclasses import fields
from unittest.mock import patch

import pytest
import typer
from fuzzing import OPTIONS, WILD_NUMBERS, WILD_TEXTS, WorkBegunError, ends_well
from hypothesis import given, settings
from hypothesis import strategies as st

from asam.experiments import cli, compare, landscapes, measuring, reproduce, sessions, tuning
from asam.experiments.run import Run

COMMANDS = typer.main.get_command(cli.app).commands
PLACES = ["new", "full", "a-file", "a-file/under", ""]  # of --out; nothing is written outside the folder
MEANT = {item.name: item.metadata["choices"] for item in fields(Run)} | {
    "target": ["run.toml", "os:getcwd", "full", "a-file"],
    "targets": ["full", "a-file", "os:getcwd"],
    "name": [*reproduce.STUDIES],
    "storage": ["sqlite:///new.db", "sqlite://", "sqlite:///a-file", "mysql://a:b@c/d"],
    "config": ["run.toml", "a-file", "full"],
    "like": ["imagenet"],
    "model": ["os:getcwd", "cnn"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "run.toml").write_text("epochs = 1")
    return tmp_path


def texts():
    """What may stand on a command line: no zero byte."""
    return st.one_of(
        st.sampled_from(WILD_TEXTS),
        st.sampled_from(WILD_NUMBERS).map(str),
        st.text(st.characters(exclude_characters="\0"), max_size=12),
    )


def value(draw, parameter):
    """Something that could be meant, or not."""
    if parameter.name == "out":
        return draw(st.sampled_from(PLACES))
    meant = st.sampled_from(MEANT.get(parameter.name) or ["1", "2", "0.5"])
    return draw(st.one_of(meant, meant, texts()))


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from([*COMMANDS]))
    options = [option for option in COMMANDS[name].params if option.param_type_name == "option"]
    needed = [argument for argument in COMMANDS[name].params if argument.param_type_name == "argument"]
    words = [value(draw, argument) for argument in needed if draw(st.integers(0, 9))]
    for option in draw(st.lists(st.sampled_from(options), max_size=4)):
        words.append(option.opts[0])
        if not option.is_flag:
            words.append(value(draw, option))
    if not draw(st.integers(0, 5)):
        words.insert(draw(st.integers(0, len(words))), draw(texts()))
    return [name, *words]


def check(folder, words):
    with (
        patch.multiple(sessions, execute=_accept),
        patch.multiple(compare, execute=_accept),
        patch.multiple(landscapes, compute=_accept),
        patch.multiple(measuring, measure=_accept),
        patch.multiple(reproduce, reproduce=_accept),
        patch.multiple(tuning, tune=_accept),
    ):
        ends_well(*words)
    assert (folder / "full" / "mine.txt").read_text() == "mine"
    assert (folder / "a-file").read_text() == "mine"


def _accept(*arguments, **named):
    raise WorkBegunError


@given(words=command_lines())
@settings(OPTIONS, max_examples=12)
def test_command_lines(folder, words):
    check(folder, words)


@pytest.mark.slow
@given(words=command_lines())
@settings(OPTIONS, max_examples=500)
def test_many_command_lines(folder, words):
    check(folder, words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_alone(command, folder):
    """Each option with a wild value: what is drawn at random may miss one."""
    words = {"measure": ["full"], "landscape": ["full"], "tune": ["run.toml"], "reproduce": ["toy"]}.get(command, [])
    for option in COMMANDS[command].params:
        if option.param_type_name == "option" and not option.is_flag and option.name != "out":
            for text in ("", "nan", "-1", "\N{SNOWMAN}"):
                check(folder, [command, *words, option.opts[0], text])
