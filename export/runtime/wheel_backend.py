"""Builds the wheel `tc-lightning-runtime` out of a checkout: `pip wheel export/runtime`.

A build backend as PEP 517 has it. Sources lie where the rest of the package uses them: here, and in what of `tc_lightning` is imported
from here. The wheel has them under one import name of its own, so that nothing on a serving machine claims `export` or `tc_lightning`:

    export.runtime.public     tc_lightning_runtime          its front
    export.runtime.sampler    tc_lightning_runtime.sampler
    tc_lightning.plan.costs   tc_lightning_runtime.plan.costs

What belongs to it follows from the imports, beginning at the front and the command. Names of modules are rewritten in import statements
and in docstrings, and nothing else is. The same sources give the same bytes. Standard library only.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import re
import sys
import tomllib
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE, FOLDER = "tc_lightning_runtime", "export/runtime"
FRONT, COMMAND = "export.runtime.public", "export.runtime.__main__"
ROOTS = ("export.runtime", "export", "tc_lightning")  # packages whose modules come to stand under PACKAGE; the longest name first
OURS = {"export", "tc_lightning", "data"}
OTHERS = sys.stdlib_module_names | {"numpy", "onnxruntime"}
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the earliest date that an archive can give a file
_MODULE = re.compile(rb"from[\s\\]+([\w.]+)")
_NAMED = re.compile(rb"(?<![\w./])(?:export|tc_lightning)(?:\.\w+)+")


class WheelError(Exception):
    """The wheel cannot be built."""


class UnsupportedOperation(Exception):  # noqa: N818
    """PEP 517's name for what a backend does not do."""


class Module(NamedTuple):
    """A module of the checkout: its dotted name, its file, and what is in it."""

    name: str
    path: Path
    source: str

    @property
    def tree(self) -> ast.Module:
        """The source, parsed."""
        return ast.parse(self.source)


def build_wheel(wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None) -> str:
    """Write the wheel into a folder.

    Returns:
        its file name.

    Raises:
        WheelError: if a module that belongs to it imports what a serving machine need not have, or there is no checkout around here.
    """
    name, content = wheel(CHECKOUT)
    (Path(wheel_directory) / name).write_bytes(content)
    return name


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> NoReturn:
    """There is none: the sources are those of the whole checkout.

    Raises:
        UnsupportedOperation: always, with what to do.
    """
    raise UnsupportedOperation(
        "tc-lightning-runtime has no source distribution, since its sources are in several folders of a checkout: build the wheel "
        f"alone, with `pip wheel {FOLDER}` or `python -m build --wheel {FOLDER}`."
    )


def wheel(checkout: Path) -> tuple[str, bytes]:
    """File name and bytes of the wheel of a checkout.

    Raises:
        WheelError: see `build_wheel`.
    """
    if not (checkout / "tc_lightning" / "__init__.py").is_file():
        raise WheelError(
            f"tc-lightning-runtime is built of a whole checkout, and {checkout} is none: in a checkout of tc-lightning, "
            f"`pip wheel {FOLDER}` with pip 21.3 or newer, which builds folders where they are."
        )
    version = _toml(checkout / "pyproject.toml")["version"]
    info = f"{PACKAGE}-{version}.dist-info"
    files = {path: text.encode() for path, text in sources(checkout, version).items()}
    files |= {
        f"{PACKAGE}/py.typed": b"",
        f"{info}/METADATA": metadata(checkout, version).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tc-lightning\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/licenses/LICENSE": _text(checkout / "LICENSE").encode(),
    }
    record = "".join(f"{path},sha256={_digest(files[path])},{len(files[path])}\n" for path in sorted(files))
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    return f"{PACKAGE}-{version}-py3-none-any.whl", _archive(files)


def sources(checkout: Path, version: str) -> dict[str, str]:
    """Every module of the wheel, by its path there.

    Raises:
        WheelError: if one imports what it must not, or two would have one name.
    """
    modules = closure(checkout)
    names: dict[str, str] = {}
    for name in sorted(modules.keys() - {*ROOTS}):  # in their place is the front
        if (other := names.setdefault(_place(name), name)) != name:
            raise WheelError(f"{other} and {name} would both be {_place(name)} in the wheel: rename one.")
    files = {}
    for place, name in names.items():
        is_package = name == FRONT or modules[name].path.name == "__init__.py"
        text = _rewritten(modules[name], modules.keys())
        text += f'__version__ = "{version}"\n' if name == FRONT else ""
        files[place.replace(".", "/") + ("/__init__.py" if is_package else ".py")] = text
    return files


def closure(checkout: Path) -> dict[str, Module]:
    """The modules that front and command import, and those that these import, with the packages that they are in, by name.

    Raises:
        WheelError: if one of them imports what it must not.
    """
    found: dict[str, Module] = {}
    waiting = [FRONT, COMMAND]
    while waiting:
        name = waiting.pop()
        if name and name not in found:
            path = _file(checkout, name)
            assert path is not None, name
            found[name] = Module(name, path, _text(path))
            waiting += [name.rpartition(".")[0], *(() if name in ROOTS else _imports(found[name], checkout))]
    return found


def metadata(checkout: Path, version: str) -> str:
    """The wheel's metadata, of the pyproject.toml and the README beside this file."""
    project = _toml(checkout / FOLDER / "pyproject.toml")
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {version}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        "License-File: LICENSE",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {wanted}" for wanted in project["dependencies"]),
    ]
    for extra, several in project["optional-dependencies"].items():
        lines += [f"Provides-Extra: {extra}", *(f'Requires-Dist: {wanted}; extra == "{extra}"' for wanted in several)]
    return "\n".join([*lines, "Description-Content-Type: text/markdown", "", _text(checkout / FOLDER / project["readme"])])


def _imports(module: Module, checkout: Path) -> Iterator[str]:
    """The modules of the checkout that a module imports, wherever in it."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(module, node, alias.name):
                    if alias.asname is None:
                        _refuse(module, node, f"import {alias.name}", "its name there is another: write `from ... import ...`")
                    yield _known(module, node, checkout, alias.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                _refuse(module, node, ast.unparse(node), "relative imports are not followed: name the module whole")
            if _is_ours(module, node, node.module or ""):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield _known(module, node, checkout, inner if _file(checkout, inner) else node.module or "")


def _is_ours(module: Module, node: ast.stmt, name: str) -> bool:
    top = name.partition(".")[0]
    if top not in OURS | OTHERS:
        _refuse(module, node, f"import {name}", "the runtime needs numpy and onnxruntime alone")
    return top in OURS


def _known(module: Module, node: ast.stmt, checkout: Path, name: str) -> str:
    """A module of the checkout that may be imported in the wheel."""
    if name in (*ROOTS, FRONT) or not name.startswith(ROOTS) or _file(checkout, name) is None:
        _refuse(module, node, f"import {name}", "nothing in the wheel has that name: import a module of export or tc_lightning")
    return name


def _refuse(module: Module, node: ast.stmt, what: str, why: str) -> NoReturn:
    raise WheelError(
        f"{module.path}, line {node.lineno}: `{what}` cannot stand in {module.name}, which is part of tc-lightning-runtime; {why}."
    )


def _file(checkout: Path, name: str) -> Path | None:
    """The file of a module or package; None if there is none."""
    path = checkout.joinpath(*name.split("."))
    return next((file for file in (path.with_name(f"{path.name}.py"), path / "__init__.py") if file.is_file()), None)


def _place(name: str) -> str:
    """Dotted name in the wheel of a module of the checkout."""
    inner = next((name.removeprefix(f"{root}.") for root in ROOTS if name.startswith(f"{root}.")), "")
    return PACKAGE if name in (*ROOTS, FRONT) else f"{PACKAGE}.{inner}"


def _rewritten(module: Module, known: Collection[str]) -> str:
    """The source of a module as it is in the wheel; `known` are the names of all modules there."""
    data = module.source.encode()
    starts = [0, *(found.end() for found in re.finditer(rb"\n", data))]
    edits: list[tuple[int, int, bytes]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
            found = _MODULE.match(data, starts[node.lineno - 1] + node.col_offset)
            assert found is not None, ast.unparse(node)
            edits.append((found.start(1), found.end(1), _place(node.module or "").encode()))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in OURS:
                    start = starts[alias.lineno - 1] + alias.col_offset
                    edits.append((start, start + len(alias.name), _place(alias.name).encode()))
        elif text := _docstring(node):
            start = starts[text.lineno - 1] + text.col_offset
            stop = starts[(text.end_lineno or 0) - 1] + (text.end_col_offset or 0)
            edits.append((start, stop, _NAMED.sub(lambda name: _in_words(name[0].decode(), known).encode(), data[start:stop])))
    for start, stop, new in sorted(edits, reverse=True):
        data = data[:start] + new + data[stop:]
    return data.decode()


def _docstring(node: ast.AST) -> ast.Constant | None:
    body = node.body if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else []
    first = body[0].value if body and isinstance(body[0], ast.Expr) else None
    return first if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def _in_words(name: str, known: Collection[str]) -> str:
    """A dotted name that a docstring tells a reader: rewritten if it is of a module in the wheel, or of what is in one."""
    module, rest = name, ""
    while module and module not in known:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    return _place(module) + rest if module and not (rest and module in ROOTS) else name


def _archive(files: dict[str, bytes]) -> bytes:
    """A zip archive that depends on its files alone: they are stored, since compressed bytes differ between versions of zlib."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(files, key=lambda path: (".dist-info/" in path, path)):  # metadata last, as wheels have it
            entry = zipfile.ZipInfo(path, _LONG_AGO)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix, a file that all may read
            archive.writestr(entry, files[path])
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _toml(path: Path) -> dict[str, Any]:
    """The table `project` of a pyproject.toml."""
    project: dict[str, Any] = tomllib.loads(_text(path))["project"]
    return project


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
