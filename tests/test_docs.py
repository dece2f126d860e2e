"""The documentation names tests, files and everything public; its code runs."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import asam
import asam.measure

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/frameworks/*.md"), *ROOT.glob("docs/api/*.md")]
)
LINK = re.compile(r'\]\((?!https?:|#)([^) "#]+)[^)"]*(?:"([^"]*)")?\)')
FILE = re.compile(r"tests/[\w/]+\.py\b")
TEST = re.compile(r"::(test_\w+)")
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
SHOWN = re.compile(r"^::: (\S+)$", re.MULTILINE)
RUN = ("caveats", "choosing-rho", "concepts", "faq", "index", "measuring", "reproducing", "results")
PUBLIC = [
    *(f"asam.{name}" for name in asam.__all__),
    *(f"asam.measure.{name}" for name in asam.measure.__all__ if name != "Geometry"),
    *(f"asam.measure.plots.plot_{kind}" for kind in ("line", "plane", "profile", "density")),
    "asam.integrations.lightning.SharpnessAware",
    "asam.integrations.transformers.SharpnessAwareTrainer",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_tests_of_a_page_are_there(page):
    text = page.read_text()
    for target, title in LINK.findall(text):
        path = (page.parent / target).resolve()
        assert path.exists(), target
        if path.is_relative_to(ROOT / "tests"):
            assert f"def {title}(" in path.read_text(), (target, title)
    files = set(FILE.findall(text))
    for file in files:
        assert (ROOT / file).is_file(), file
    tests = "".join((ROOT / file).read_text() for file in files)
    for name in TEST.findall(text):
        assert f"def {name}(" in tests, name


def classes(source):
    """The classes of a module by their names, as code without docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(("page", "example"), [("fastai", "fastai_learner"), ("skorch", "skorch_net")])
def test_the_recipe_of_a_page_is_that_of_the_example(page, example):
    text = (ROOT / f"docs/frameworks/{page}.md").read_text()
    shown = classes("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    assert len(shown) == 1
    assert shown.items() <= classes((ROOT / f"examples/{example}.py").read_text()).items()


@pytest.fixture
def names():
    """What a reader of a page has: a model, an optimizer, data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.randn(64, 20)
    labels = (inputs[:, 0] > 0).long()
    ours = {name: getattr(asam, name) for name in asam.__all__}
    return ours | {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.functional.cross_entropy,
        "loader": [(inputs[:32], labels[:32]), (inputs[32:], labels[32:])],
        "data": [(inputs, labels)],
        "inputs": inputs,
        "targets": labels,
        "labels": labels,
        "train_inputs": inputs,
        "train_labels": labels,
        "asam": asam.ASAM(model, rho=0.5),
        "device": "cpu",
        "scaler": torch.amp.GradScaler("cpu"),
        "closures": [lambda: nn.functional.cross_entropy(model(inputs), labels)] * 2,
    }


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of it writes files
    for code in FENCE.findall((ROOT / f"docs/{page}.md").read_text()):
        exec(code, names)
    if page == "index":
        assert names["asam"] < names["sgd"] - 5  # points of test error
    if page == "choosing-rho":
        assert names["errors"][names["best"]] < 0.5


def test_every_page_with_code_is_run_here_or_elsewhere():
    with_code = {page.stem for page in PAGES if FENCE.search(page.read_text()) and page.parent.name == "docs"}
    assert with_code - set(RUN) == {"migrating", "recipes"}  # test_migrating.py, test_recipes.py


@pytest.mark.parametrize("page", [page for page in PAGES if FENCE.search(page.read_text())], ids=lambda page: page.stem)
def test_code_parses_and_imports_what_is_there(page):
    for code in FENCE.findall(page.read_text()):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "asam":
                there = {f"asam.{name}" for name in asam.__all__} | {
                    f"asam.measure.{name}" for name in asam.measure.__all__
                }
                assert {f"{node.module}.{alias.name}" for alias in node.names} <= there | set(PUBLIC), code


def test_every_public_name_is_shown_once():
    shown = [name for page in sorted(ROOT.glob("docs/api/*.md")) for name in SHOWN.findall(page.read_text())]
    # a function named as its module is shown by its longer name
    shown = [name.replace("hessian.hessian", "hessian").replace("trace.trace", "trace") for name in shown]
    assert sorted(shown) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    """By the source: what runs is collected from it, and a framework may be missing."""
    module, _, short = name.rpartition(".")
    (found,) = [node for node in definitions(module) if node.name == short]
    assert ">>> " in ast.get_docstring(found)


@cache
def definitions(module):
    """The classes and functions at the top of the files of a package, or of a module."""
    path = ROOT / "src" / Path(*module.split("."))
    trees = [
        ast.parse(file.read_text()) for file in (path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")])
    ]
    return [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]


def test_every_study_is_in_the_table_of_results():
    text = (ROOT / "docs/results.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\(results/(\w+)/table.md\).*\| (\w+ of \w+) \|$", text, re.MULTILINE)
    expected = []
    for path in sorted(ROOT.glob("docs/results/*/summary.json")):
        verdicts = [found["verdict"] for found in json.loads(path.read_text())["findings"]]
        reproduced = sum(verdict.startswith("reproduces") for verdict in verdicts)
        expected.append((path.parent.name, path.parent.name, f"{reproduced} of {len(verdicts)}"))
    assert sorted(rows) == expected
    assert "<!-- all findings -->" in text
