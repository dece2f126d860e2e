"""The documentation names tests and files that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/frameworks/*.md")])
LINK = re.compile(r'\]\((?!https?:|#)([^) "#]+)[^)"]*(?:"([^"]*)")?\)')
FILE = re.compile(r"tests/[\w/]+\.py\b")
TEST = re.compile(r"::(test_\w+)")


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
