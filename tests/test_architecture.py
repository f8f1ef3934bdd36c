"""The rules that hold for every module of sdlisten: what it exports, how long it is, what it loads."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sdlisten

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(sdlisten.__file__).parent
# A __main__.py is no module to import: it is one call, which the tests of what it calls start.
MODULES = sorted(
    path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"
)

MODULE_LINES = 400
FUNCTION_LINES = 60

# Modules without a test file of their own, and why.
TESTED_ELSEWHERE = {
    "__init__.py": "only names, which the first test here resolves",
}

# Slow to load, and of no use to a program that only wants its socket.
HEAVY = {"asyncio", "ctypes", "dataclasses", "inspect", "logging", "re", "subprocess", "typing"}
# What adopting loads, and what a small child or a manager loads.
LIGHT = {
    *("activation", "address", "adopt_or_bind", "binding", "descriptor", "environment", "errors", "listener"),
    *("exec_shim", "handover", "message", "notifier", "receiver", "spawn"),
}

ADOPT = """
import os, socket, sys
passed = socket.create_server(("127.0.0.1", 0)).detach()
os.dup2(passed, 3)
os.environ["LISTEN_PID"] = str(os.getpid())
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
import sdlisten
(listener,) = sdlisten.listen(name="web")
assert listener.origin is sdlisten.Origin.ADOPTED and listener.fileno() == 3, listener
print(*set(sys.modules) - before)
"""

LOAD = """
import socket, sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
__import__(sys.argv[2])
print(*set(sys.modules) - before)
"""


def dotted(path: str) -> str:
    """Return the module name of a path inside the package."""
    return ".".join(["sdlisten", *Path(path).with_suffix("").parts]).removesuffix(".__init__")


def tree_of(path: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse((PACKAGE / path).read_text())


def definitions(tree: ast.Module) -> set[str]:
    """Return the names without underscore that the module itself defines."""
    names = set()
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=targets):
                names.update(target.id for target in targets if isinstance(target, ast.Name))
    return {name for name in names if not name.startswith("_") and name != "TYPE_CHECKING"}


def ruffs_order(name: str) -> tuple[int, str]:
    """Return the key by which ruff (RUF022) sorts `__all__`: CONSTANTS, then Classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function, its docstring not counted."""
    first = function.body[0]
    docstring = first if ast.get_docstring(function) is not None else None
    return length(function) - (length(docstring) if docstring is not None else 0)


def length(node: ast.stmt) -> int:
    """Return the number of lines of a statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def loaded_by(script: str, *words: str, **environ: str) -> set[str]:
    """Return the modules that `script` prints, run by a Python that loads nothing on its own."""
    command = [sys.executable, "-I", "-S", "-c", script, str(PACKAGE.parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("path", MODULES)
def test_exports_are_a_sorted_tuple(path: str) -> None:
    """`__all__` is a tuple in ruff's order, and every name in it can be had."""
    module = importlib.import_module(dotted(path))

    assert isinstance(module.__all__, tuple)
    assert sorted(module.__all__, key=ruffs_order) == list(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", [path for path in MODULES if not path.endswith("__init__.py")])
def test_exports_are_complete(path: str) -> None:
    """A module exports what it defines without underscore, and nothing of other modules."""
    assert definitions(tree_of(path)) == set(importlib.import_module(dotted(path)).__all__)


@pytest.mark.parametrize("path", [path for path in MODULES if path.endswith("__init__.py")])
def test_no_public_name_is_a_module_name(path: str) -> None:
    """A name of a package never hides a module of it, nor the other way round."""
    package = PACKAGE / Path(path).parent
    modules = {place.stem for place in package.iterdir() if place.suffix == ".py" or place.is_dir()}

    assert set() == modules & set(importlib.import_module(dotted(path)).__all__)


@pytest.mark.parametrize("path", MODULES)
def test_modules_and_functions_are_short(path: str) -> None:
    """No module is longer than 400 lines, no function longer than 60 without its docstring."""
    functions = [
        node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lines = len((PACKAGE / path).read_text().splitlines())

    assert lines <= MODULE_LINES
    assert {node.name: code_lines(node) for node in functions if code_lines(node) > FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", [path for path in MODULES if path not in TESTED_ELSEWHERE])
def test_each_module_has_its_tests(path: str) -> None:
    """The tests of a/b.py are in test_b.py, test_a_b.py or, for a package of small modules, test_a.py."""
    parts = Path(path.removesuffix("/__init__.py")).with_suffix("").parts
    candidates = {f"test_{name}.py" for name in (parts[0], parts[-1], "_".join(parts))}

    assert any((REPOSITORY / "tests" / name).exists() for name in candidates), f"none of {sorted(candidates)}"


def test_adopting_a_socket_loads_little() -> None:
    """From `import sdlisten` to an adopted listener, nothing heavy is added to what `import socket` loads."""
    assert set() == HEAVY & loaded_by(ADOPT, LISTEN_FDS="1", LISTEN_FDNAMES="web")


@pytest.mark.parametrize("name", sorted(dotted(path) for path in MODULES if Path(path).stem in LIGHT))
def test_light_modules_load_little(name: str) -> None:
    """A module that small processes import adds nothing heavy to what `import socket` loads."""
    assert set() == HEAVY & loaded_by(LOAD, name)


def test_imports_keep_to_the_contracts() -> None:
    """Imports point downwards, pure modules stay pure: the contracts in pyproject.toml hold."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    options = ["--no-cache", "--no-logo", "--config", str(REPOSITORY / "pyproject.toml")]
    done = subprocess.run(
        [*command, *options], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
