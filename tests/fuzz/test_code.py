"""The source runs no code that a file brings: read by its syntax tree, so that a comment cannot hide a call."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("src", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN |= {"os.system", "os.popen", "marshal.loads", "shelve.open", "joblib.load", "torch.hub.load"}
ALLOWED = {
    # the error of a worker, pickled a moment before by the same function
    ("src/asam/experiments/workers.py", "pickle.loads"),
}


def calls(path):
    """The names of the functions that a file calls, as ``module.function``, each with the names of its arguments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_a_file_brings(path):
    name = str(path.relative_to(ROOT))
    for function, arguments in calls(path):
        assert function not in FORBIDDEN or (name, function) in ALLOWED, function
        if function == "torch.load":
            assert arguments.get("weights_only") == "True"
        if function.endswith(".load") and function.startswith(("np.", "numpy.")):
            assert arguments.get("allow_pickle") == "False"
        if function.startswith("subprocess."):
            assert "shell" not in arguments


def test_pickles_are_read_as_data_alone():
    """The archives of CIFAR are pickles: one reader of them, whose classes are those of arrays (see test_cifar)."""
    readers = [path for path in FILES if "pickle" in path.read_text(encoding="utf-8")]
    unpicklers = [
        (path.name, node.name)
        for path in readers
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases)
    ]
    assert unpicklers == [("cifar.py", "_DataOnly")]
