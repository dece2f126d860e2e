"""What a study cannot run with: one line that says what to do, before anything is written."""

import importlib
import sys

import pytest

from asam.experiments import InputError, cli, reproduce


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """The line that a command ends with; it has code 2 and left the folder as it was, new or with something in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")

    def command(*arguments):
        said = []
        for out in ("here", "new"):
            monkeypatch.setattr(sys, "argv", ["asam", "reproduce", *arguments, "--force", "--out", out])
            code = cli.run()
            printed = capsys.readouterr()
            assert (code, printed.out) == (2, "")
            said.append(printed.err)
        assert said[0] == said[1]
        assert said[0].startswith("asam: ")
        assert said[0].count("\n") == 1
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["mine.txt"]
        assert not (tmp_path / "new").exists()
        return said[0]

    return command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["noise", "--paper"], "cifar10 needs --data-dir: the folder of cifar-10-python.tar.gz"),
        (["images", "--paper"], "cifar10 needs --data-dir: the folder of cifar-10-python.tar.gz"),
        (["imagenet", "--paper"], "imagenet needs --data-dir: ImageNet's folder of train/ and val/"),
        (["translation", "--paper"], "needs IWSLT'14 German-English: name a folder of train, valid and test files"),
        (["noise", "--paper", "--data-dir", "nowhere"], "nowhere holds neither cifar-10-python.tar.gz nor"),
        (["images", "--paper", "--data-dir", "nowhere"], "name their folder with --data-dir"),
        (["imagenet", "--paper", "--data-dir", "nowhere"], "nowhere/train"),
        (["translation", "--paper", "--data-dir", "nowhere"], "nowhere/train.de cannot be read"),
        (["images", "--quick", "--data-dir", "nowhere"], "nowhere/train-images-idx3-ubyte.gz is not there"),
        (["imagenet", "--quick", "--data-dir", "nowhere"], "nowhere/train"),
        (["translation", "--quick", "--data-dir", "nowhere"], "nowhere/train.de cannot be read"),
        (["correlation", "--data-dir", "nowhere"], "nowhere/train-images-idx3-ubyte.gz is not there"),
        (["correlation", "--quick", "--seeds", "3"], "correlation has no --seeds: leave it out"),
        (["rescaling", "--data-dir", "here"], "rescaling has no --data-dir: leave it out"),
        (["rho", "--quick", "--data-dir", "here"], "rho has no --data-dir: leave it out"),
        (["bias", "--paper"], "bias has no --paper: it has quick, laptop"),
        (["rescaling", "--quick", "--paper"], "--quick and --paper exclude each other"),
        (["noise", "--quick", "--seeds", "0"], "--seeds"),
        (["table7"], "there is no study table7: choose one of geometry, toy, invariance"),
    ],
)
def test_one_line_says_what_to_do(refused, arguments, says):
    assert says in refused(*arguments)


@pytest.mark.parametrize("name", reproduce.STUDIES)
def test_every_study_refuses_what_it_has_not(name):
    study = reproduce.find(name)
    assert study.name == name
    assert {"quick", "laptop"} <= study.settings.keys() <= {"quick", "laptop", "paper"}
    with pytest.raises(InputError, match=f"^{name} has no --monthly: it has quick, laptop"):
        reproduce.configured(study, "monthly")
    for option, value in (("seeds", 3), ("data_dir", "here")):
        for scale, settings in study.settings.items():
            if not hasattr(settings, option):
                said = f"^{name} has no --{option.replace('_', '-')}: leave it out"
                with pytest.raises(InputError, match=said):
                    reproduce.configured(study, scale, **{option: value})


@pytest.mark.parametrize("name", ["rescaling", "noise", "bias", "rho", "bound"])
def test_what_was_asked_for_is_in_the_settings_and_nothing_else_changes(name):
    study = reproduce.find(name)
    assert reproduce.configured(study, "quick") == study.settings["quick"]
    settings = reproduce.configured(study, "quick", seeds=7, data_dir=None)
    assert settings.seeds == 7
    assert reproduce.configured(study, "quick", seeds=study.settings["quick"].seeds) == study.settings["quick"]


def test_without_the_networks_nothing_begins(refused, monkeypatch):
    """The networks of the paper come from a package that is not always there."""
    monkeypatch.setitem(sys.modules, "pytorchcv", None)
    for module in [name for name in sys.modules if name.startswith("pytorchcv.")]:
        monkeypatch.delitem(sys.modules, module)
    for name in ("noise", "images", "imagenet"):
        module = importlib.import_module(f"asam.experiments.studies.{name}")
        if hasattr(module, "load"):  # as if CIFAR was there
            monkeypatch.setattr(module, "load", lambda *arguments: None)
        arguments = [name, "--paper"] if name != "imagenet" else [name, "--quick"]
        assert "comes from pytorchcv: pip install --no-deps pytorchcv" in refused(*arguments)
