"""What all commands have in common: help that fits the screen, completion, refusals in a line of standard error."""

import io
import sys
import threading

import pytest
import typer

from asam import __main__
from asam.experiments import InputError, cli, files, reproduce, terminal, translation

COMMANDS = list(typer.main.get_command(cli.app).commands)


@pytest.fixture
def said(capsys, monkeypatch):
    """The exit code of a command line, and what it wrote on standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["asam", *arguments])
        code = cli.run()
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_eighty_columns(command, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = said(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    listed = reproduce.STUDIES if command == "reproduce" else COMMANDS if command == "" else []
    assert all(name in out for name in listed)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("train", ["vit", "resnet20", *translation.SIZES]),
        ("measure", ["run of asam compare or train"]),
        ("landscape", ["Runs of asam compare or train"]),
    ],
)
def test_help_names_every_kind_of_network_and_of_run(command, names, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = said(command, "--help")[1]
    assert all(name in out for name in names)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["measure", "two\nlines"], "two lines is not a run of asam compare or asam train, and there is no such file"),
        (["train", "--seed", str(2**63)], f"the options: seed must be less than 2**63, got {2**63}"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml: No such file or directory"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments, line, said):
    assert said(*arguments) == (2, "", f"asam: {line}\n")


@pytest.mark.parametrize(
    ("arguments", "begins", "place"),
    [
        ([], "Missing command", "asam"),
        (["trian"], "No such command 'trian'", "asam"),
        (["doctor", "--jsn"], "No such option", "asam doctor"),
        (["measure"], "Missing argument", "asam measure"),
        (["train", "--epochs", "many"], "Invalid value for '--epochs'", "asam train"),
    ],
)
def test_a_wrong_line_is_refused_with_the_way_to_help(arguments, begins, place, said):
    code, out, err = said(*arguments)  # what stands in between is said by typer, by each version in its own way
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"asam: {begins}")
    assert err.endswith(f" See {place} --help.\n")


@pytest.mark.parametrize("bar", [lambda: terminal.progress("work", 3), lambda: terminal.counted("work")])
def test_a_refusal_leaves_no_bar(bar, capsys):
    with pytest.raises(InputError), bar():
        raise InputError("no")
    assert capsys.readouterr().err == ""
    with bar():
        pass
    assert "work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        ("asam me", ["measure"]),
        ("asam train --batch", ["--batch-size"]),
        ("asam train --precision b", ["bfloat16"]),
        ("asam train --precision x", []),
    ],
)
def test_completion(words, proposed, said, monkeypatch, capsys):
    monkeypatch.setenv("_ASAM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit) as end:
        said()
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == proposed


def test_a_script_for_completion(said, monkeypatch, capsys):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # whatever starts the tests
    with pytest.raises(SystemExit) as end:
        said("--show-completion")
    assert end.value.code == 0
    assert "_ASAM_COMPLETE=complete_bash" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["optuna", "asam.nowhere"])
def test_a_library_that_is_not_there(missing, monkeypatch, capsys):
    def run():
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli, "run", run)
    if missing == "optuna":
        with pytest.raises(SystemExit) as end:
            __main__.main()
        assert end.value.code == 2
        assert capsys.readouterr().err == "asam: the command line needs optuna: pip install 'asam[experiments]'\n"
    else:  # a mistake of ours
        with pytest.raises(ModuleNotFoundError):
            __main__.main()


def test_signs_that_the_encoding_lacks_are_replaced(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "run", lambda: print("± …", flush=True))
    with pytest.raises(SystemExit):
        __main__.main()
    assert out.buffer.getvalue() == b"? ?\n"


def test_an_output_without_an_encoding(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "run", lambda: print("± …"))
    with pytest.raises(SystemExit):
        __main__.main()
    assert out.getvalue() == "± …\n"


def test_a_path_that_is_no_unicode_can_stand_in_a_file(tmp_path):
    files.write(tmp_path / "a.html", "<code>\udcff</code>")
    assert (tmp_path / "a.html").read_bytes() == b"<code>?</code>"


@pytest.mark.parametrize("command", [["train"], ["compare"], ["reproduce", "toy", "--quick"]])
def test_a_folder_that_is_no_unicode(command, said, tmp_path):
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of tests
    message = f"{tmp_path}/\\udcff has a name that is no Unicode: choose another --out"
    assert said(*command, "--out", f"{tmp_path}/\udcff") == (2, "", f"asam: {message}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "compare", "landscape"])
def test_a_folder_in_which_another_process_writes(command, said, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_network.py").write_text("from torch import nn\ndef make(): return nn.ReLU(), None.__eq__, []")
    target = ["own_network:make"] if command == "landscape" else []
    with files.held(tmp_path / "out"):
        code, out, err = said(command, *target, "--out", str(tmp_path / "out"), "--force")
    message = f"asam: {tmp_path / 'out'}: another process is writing there: wait for it or choose another --out\n"
    assert (code, out, err) == (2, "", message)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_waited_for_where_commands_share_the_work(tmp_path):
    with files.held(tmp_path):
        other = threading.Thread(target=lambda: files.held(tmp_path, wait=True).__enter__(), daemon=True)
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()


def test_an_interrupt_before_there_is_a_command(monkeypatch, capsys):
    def run():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", run)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert (end.value.code, capsys.readouterr().err) == (130, "asam: interrupted\n")
