"""What `pip install` must bring, and what must hold of every source file."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "export", "tc_lightning")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = {"pytest-xdist", "ruff", "mypy", "ray", "model-signing", "pyopenssl", "litserve"}  # run, not imported
OF_OTHERS = {"jsonargparse"}  # Lightning's command line imports it, and does not ask for it
OF_TRITON = {"triton_python_backend_utils"}  # in the process of a model alone
SERVERS = {f"export/serving/{name}.py" for name in ("app", "front", "worker")}  # which serve.py imports, and says what to install
SOURCES = sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))


def imported(paths: list[Path]) -> set[str]:
    """Top-level names that files import, wherever in the file."""
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def distributions(names: set[str]) -> dict[str, set[str]]:
    """The distributions that bring each name, as pip spells them, for names that are neither Python's nor ours."""
    ours = {*PACKAGES, *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    known = importlib.metadata.packages_distributions()
    return {name: {spelled(d) for d in known.get(name, [name])} for name in names - ours - OF_TRITON - set(sys.stdlib_module_names)}


def spelled(distribution: str) -> str:
    """Name of a requirement, without version and extras."""
    return re.split(r"[\[<>=!~; ]", re.sub(r"[-_.]+", "-", distribution.lower()), maxsplit=1)[0]


def requirements(extra: str = "") -> set[str]:
    return {spelled(line) for line in (PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])}


def extras() -> set[str]:
    """What some commands need, and most users do not."""
    return set().union(*(requirements(extra) for extra in PROJECT["optional-dependencies"] if extra != "test"))


def test_what_is_imported_is_declared_and_the_other_way_round():
    used = distributions(imported([path for path in SOURCES if path.parents[0].name != "tests"]))
    undeclared = {name: found for name, found in used.items() if not found & (requirements() | extras())}
    assert undeclared == {}
    assert requirements() - OF_OTHERS - set().union(*used.values()) == set()


def test_what_an_extra_brings_is_imported_late():
    """Whoever does not need it need not have it."""
    extra = {name for name, found in distributions(imported(SOURCES)).items() if found & (extras() - requirements())}
    assert extra == {"diffusers", "transformers", "ray", "model_signing", "cryptography", "litserve", "fastapi", "starlette"}
    for path in SOURCES:
        if path.parent.name != "tests" and path.relative_to(ROOT).as_posix() not in SERVERS:
            at_once = [
                node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            assert not [ast.unparse(node) for node in at_once if extra & set(re.findall(r"\w+", ast.unparse(node)))], path


def test_what_the_tests_import_is_declared():
    used = distributions(imported([path for path in SOURCES if path.parents[0].name == "tests"]))
    undeclared = {name: found for name, found in used.items() if not found & (requirements() | requirements("test"))}
    assert undeclared == {}
    assert requirements("test") - TOOLS - set().union(*used.values()) == set()


TEXT = {"read_text", "write_text"}
TEXT_PLACE = {"read_text": 0, "write_text": 1}


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that open a text file in whatever encoding the machine prefers."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in TEXT and len(node.args) <= TEXT_PLACE[name]:
            yield node.lineno
        if name in ("open", "fdopen", "NamedTemporaryFile") and _is_text(node):
            yield node.lineno


def _is_text(call: ast.Call) -> bool:
    """Whether `open(path, mode)` or `path.open(mode)` is for text; other libraries' `open` is not for files of text."""
    method = isinstance(call.func, ast.Attribute)
    if method and isinstance(call.func.value, ast.Name) and call.func.value.id in ("Image", "os", "zipfile", "tarfile"):
        return False
    given = [call.args[0 if method else 1]] if len(call.args) > (0 if method else 1) else []
    mode = next((k.value for k in call.keywords if k.arg == "mode"), given[0] if given else ast.Constant("r"))
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value


@pytest.mark.parametrize("call", ["p.read_text()", "p.write_text('x')", "open('x')", "p.open()", "p.open('a')", "open('x', mode='w')"])
def test_a_missing_encoding_is_noticed(call):
    assert list(without_encoding(ast.parse(call))) == [1]


@pytest.mark.parametrize(
    "call", ["p.read_text('utf-8')", "p.write_text('x', encoding='utf-8')", "open('x', 'rb')", "p.open('wb')", "Image.open(p)"]
)
def test_an_encoding_that_is_there_is_seen(call):
    assert list(without_encoding(ast.parse(call))) == []


def test_text_files_are_opened_with_an_encoding():
    found = [f"{path.relative_to(ROOT)}:{line}" for path in SOURCES for line in without_encoding(ast.parse(path.read_text("utf-8")))]
    assert found == []  # ruff's PLW1514 sees those of which it knows that they are paths
