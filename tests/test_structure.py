"""The tree itself: data flows one way, no circles, no late imports that hide one, and files of a size that can be read."""

from __future__ import annotations

import ast
import statistics
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tc_lightning", "data", "export")
FILES = {path: path.read_text(encoding="utf-8") for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported(tree: ast.AST) -> set[str]:
    """Modules of the project that a tree imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


IMPORTS = {name: imported(ast.parse(FILES[path])) - {name} for name, path in MODULES.items()}


def require_no_circle(edges: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_no_module_is_part_of_a_circle() -> None:
    leaves = {name: {other for other in others if MODULES[other].stem != "__init__"} for name, others in IMPORTS.items()}
    require_no_circle(leaves)


def test_no_folder_is_part_of_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        own = folder_of(name)
        edges.setdefault(own, set()).update({folder_of(o) for o in others if "." in o} - {own})
    require_no_circle(edges)


def test_nothing_of_the_package_is_imported_late() -> None:
    late = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        for function in ast.walk(ast.parse(FILES[path]))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and imported(node)
    ]
    assert not late


def test_nothing_in_the_method_imports_what_goes_in_or_what_comes_out() -> None:
    wrong = {name: bad for name, others in IMPORTS.items() if (bad := {o for o in others if not o.startswith(name.split(".")[0])})}
    assert not [name for name in wrong if name.startswith("tc_lightning")]
    assert not [name for name, others in wrong.items() if name.startswith("data") and any(o.startswith("export") for o in others)]


def test_the_plan_and_the_runtime_need_no_torch() -> None:
    for folder in ("tc_lightning/plan", "export/runtime"):
        for path in (ROOT / folder).glob("*.py"):
            assert not {"torch", "lightning", "onnx"} & {
                alias.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "").split(".")[0]
                for node in ast.walk(ast.parse(FILES[path]))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }, path


def test_files_are_of_a_size_that_can_be_read() -> None:
    lines = {str(path.relative_to(ROOT)): text.count("\n") for path, text in FILES.items()}
    assert statistics.median(lines.values()) < 130
    assert not {name: count for name, count in lines.items() if count > 330}


def test_tests_are_of_a_size_that_can_be_read() -> None:
    lines = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > 330}


def test_few_things_stand_at_the_root() -> None:
    inside = [
        path for path in (ROOT / "tc_lightning").iterdir() if path.name != "__pycache__" and path.stem not in ("__init__", "__main__")
    ]
    assert len(inside) <= 12
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name in PACKAGES} == set(PACKAGES)
