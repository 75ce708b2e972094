"""The runtime as a wheel of its own: what is in it, what it refuses, and that it runs beside numpy and onnxruntime alone."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from export.runtime.__main__ import main
from export.runtime.sampler import CachedSampler
from export.runtime.wheel_backend import (
    CHECKOUT,
    OTHERS,
    PACKAGE,
    UnsupportedOperation,
    WheelError,
    build_sdist,
    sources,
    wheel,
)
from tc_lightning.errors import TokenCacheError

LABELS, SEED = [0, 3, 1], 5
RUNTIME = CHECKOUT / "export" / "runtime"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
PROBE = """
import importlib.util, json, sys
import numpy, onnxruntime, tc_lightning_runtime as package
absent = [name for name in ("torch", "onnx", "export", "data", "tc_lightning") if importlib.util.find_spec(name) is None]
public = [name for name in package.__all__ if hasattr(package, name)]
print(json.dumps([numpy.__version__, onnxruntime.__version__, package.__version__, absent, public == package.__all__]))
"""


def pip(*arguments: str | Path, python: Path | None = None) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip to build and install wheels with")
    other = ["--python", str(python)] if python else []
    command = [sys.executable, "-m", "pip", *other, *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as pip builds it of a checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    done = pip("wheel", "--no-deps", "--wheel-dir", folder, RUNTIME)
    assert done.returncode == 0, done.stderr
    return next(folder.iterdir())


@pytest.fixture(scope="module", params=["1.26", "2"])
def python(request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A version of numpy, and the interpreter of an environment with it, onnxruntime for the CPU and the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    found = folder / "bin" / "python"
    wanted = (f"numpy=={request.param}.*", f"onnxruntime=={ort.__version__}")
    done = pip("install", "--only-binary", ":all:", "--no-compile", *wanted, python=found)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {' and '.join(wanted)} here: {done.stderr.strip()[-300:]}")
    done = pip("install", "--no-index", "--no-compile", f"{built}[cpu]", python=found)  # nothing but these is wanted
    assert done.returncode == 0, done.stderr
    return request.param, found


def run(python: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an interpreter that sees neither this folder nor our environment."""
    return subprocess.run([python, "-I", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)


def test_a_clean_environment_has_the_wheel_and_nothing_else_of_ours(python: tuple[str, Path], tmp_path: Path) -> None:
    version, interpreter = python
    done = run(interpreter, "-c", PROBE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    numpy, onnxruntime, own, absent, complete = json.loads(done.stdout)
    assert numpy.startswith(f"{version}.")
    assert (onnxruntime, own) == (ort.__version__, project(CHECKOUT)["version"])
    assert absent == ["torch", "onnx", "export", "data", "tc_lightning"]
    assert complete


def test_there_it_makes_the_very_latents_that_it_makes_here(python: tuple[str, Path], artefact: Path, tmp_path: Path) -> None:
    asked = ("--labels", *map(str, LABELS), "--seed", str(SEED), "--threads", "1", "--out", "latents.npy", "--receipt", "receipt.json")
    done = run(python[1], "-m", PACKAGE, artefact, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = CachedSampler(artefact, threads=1).sample(LABELS, seed=SEED)
    assert np.load(tmp_path / "latents.npy").tobytes() == here.latents.tobytes()
    receipt = json.loads((tmp_path / "receipt.json").read_text(encoding="utf-8"))
    assert (receipt["plan_digest"], receipt["cache_engaged"]) == (here.receipt["plan_digest"], True)


def test_there_it_verifies_an_artefact(python: tuple[str, Path], copied: Path, tmp_path: Path) -> None:
    done = run(python[1], "-m", PACKAGE, copied, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "files are whole" in done.stdout
    weights = bytearray((copied / "weights.data").read_bytes())
    weights[-1] ^= 1
    (copied / "weights.data").write_bytes(weights)
    done = run(python[1], "-m", PACKAGE, copied, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*weights\.data.*\n", done.stderr)


def test_two_builds_are_the_same_to_the_byte(built: Path, tmp_path: Path) -> None:
    """One by pip, and one in this process, of files elsewhere and with other dates."""
    for name in ("export", "tc_lightning"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, False, shutil.ignore_patterns("__pycache__"), shutil.copyfile)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(CHECKOUT / name, tmp_path / name)
    assert wheel(tmp_path) == (built.name, built.read_bytes())


def test_it_claims_one_import_name_and_is_typed(built: Path) -> None:
    version = project(CHECKOUT)["version"]
    names = zipfile.ZipFile(built).namelist()
    assert {name.partition("/")[0] for name in names} == {PACKAGE, f"{PACKAGE}-{version}.dist-info"}
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}-{version}.dist-info/licenses/LICENSE"} <= {*names}
    for folder in (CHECKOUT, RUNTIME):
        assert built.name in (folder / "README.md").read_text(encoding="utf-8")


def test_modules_import_each_other_numpy_onnxruntime_and_the_standard_library_alone() -> None:
    files = sources(CHECKOUT, "1")
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files}
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= OTHERS, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module in modules or (node.module or "").partition(".")[0] in OTHERS, (path, node.module)


def test_the_record_is_of_what_is_there() -> None:
    _, content = wheel(CHECKOUT)
    archive = zipfile.ZipFile(io.BytesIO(content))
    record = next(entry for entry in archive.namelist() if entry.endswith("/RECORD"))
    said = dict(line.split(",", 1) for line in archive.read(record).decode().splitlines())
    assert said.pop(record) == ","
    for path, listing in said.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(path)).digest()).rstrip(b"=").decode()
        assert listing == f"sha256={digest},{len(archive.read(path))}"
    assert {*said, record} == {*archive.namelist()}


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_wants_what_the_whole_package_wants_of_numpy_and_onnxruntime() -> None:
    whole, own = project(CHECKOUT), project(RUNTIME)
    assert {*own["dependencies"], *own["optional-dependencies"]["gpu"]} <= {*whole["dependencies"]}
    assert own["optional-dependencies"]["cpu"] == [line.replace("-gpu", "") for line in own["optional-dependencies"]["gpu"]]
    assert (own["requires-python"], own["license"]) == (whole["requires-python"], whole["license"])


def test_without_onnxruntime_it_says_which_to_install() -> None:
    without = f"import sys; sys.modules['onnxruntime'] = None; sys.path.insert(0, {str(CHECKOUT)!r}); import export.runtime.public"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert re.search(r"ModuleNotFoundError: .*`pip install onnxruntime` for the CPU.*`pip install onnxruntime-gpu`", done.stderr)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    main()


def test_the_command_takes_conditions_from_a_file_and_writes_pixels(unguided: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", label=LABELS)
    command(monkeypatch, unguided, "--conditions", "rows.npz", "--images", "images.npy", "--threads", "1")
    result = CachedSampler(unguided, threads=1).sample(LABELS)
    assert result.images is not None
    assert np.load("images.npy").tobytes() == result.images.tobytes()
    assert np.load("latents.npy").tobytes() == result.latents.tobytes()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["--labels", "1", "--images", "images.npy"], "has no decoder: leave out --images"),
        (["--labels", "1", "--out", "nowhere/latents.npy"], "nowhere does not exist"),
        (["--labels", "1", "--out", "one.npy", "--receipt", "one.npy"], r"--out and --receipt are both .*one\.npy"),
        (["--labels", "99"], "label 99 is not a class"),
    ],
)
def test_the_command_writes_nothing_where_something_is_wrong(asked, why, artefact: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenCacheError, match=why):
        command(monkeypatch, artefact, *asked)
    assert not list(tmp_path.iterdir())


def test_the_command_says_so_if_there_is_nothing_to_write(artefact: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, artefact, "--receipt", "receipt.json")
    assert "ask for some with --labels or --conditions" in capsys.readouterr().err


def test_there_is_no_source_distribution(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperation, match=r"pip wheel export/runtime"):
        build_sdist(str(tmp_path))


def test_without_a_checkout_around_it_there_is_no_wheel(tmp_path: Path) -> None:
    with pytest.raises(WheelError, match=r"pip 21\.3 or newer"):
        wheel(tmp_path)


def test_no_module_beside_the_backend_hides_one_of_python() -> None:
    assert not {path.stem for path in RUNTIME.glob("*.py")} & {*sys.stdlib_module_names}  # pip puts that folder first on the path


def toy(folder: Path, **modules: str) -> Path:
    """A checkout of a few lines; `__` in a name is a dot."""
    given = {"export.runtime.public": "", "export.runtime.__main__": ""} | {k.replace("__", "."): v for k, v in modules.items()}
    for name, text in given.items():
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
    return folder


def test_names_of_modules_are_rewritten_and_nothing_else(tmp_path: Path) -> None:
    public = '''"""See `tc_lightning.plan.costs.macs`, `export.runtime`, `tc_lightning.models` and export/runtime/a.py."""
é = "é"; from tc_lightning.plan.costs import (
    macs,
)
from export.runtime import layout
import export.command as command, json
text = "tc_lightning.plan.costs"
'''
    files = sources(
        toy(tmp_path, export__runtime__public=public, export__runtime__layout="", export__command="", tc_lightning__plan__costs=""),
        "1.2",
    )
    assert (
        files[f"{PACKAGE}/__init__.py"]
        == '''"""See `tc_lightning_runtime.plan.costs.macs`, `tc_lightning_runtime`, `tc_lightning.models` and export/runtime/a.py."""
é = "é"; from tc_lightning_runtime.plan.costs import (
    macs,
)
from tc_lightning_runtime import layout
import tc_lightning_runtime.command as command, json
text = "tc_lightning.plan.costs"
__version__ = "1.2"
'''
    )
    assert {*files} == {f"{PACKAGE}/{name}.py" for name in ("__init__", "__main__", "layout", "command", "plan/__init__", "plan/costs")}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("import torch", "line 2: `import torch` cannot stand in tc_lightning.noise, .* numpy and onnxruntime alone"),
        ("from PIL import Image", "`import PIL` cannot stand"),
        ("def f():\n    import onnx", "line 3: `import onnx` cannot stand"),
        ("from data.images import load", "nothing in the wheel has that name"),
        ("from tc_lightning.elsewhere import load", "nothing in the wheel has that name"),
        ("from tc_lightning import __version__", "`import tc_lightning` cannot stand"),
        ("import tc_lightning.noise", "its name there is another"),
        ("from . import noise", "relative imports"),
    ],
)
def test_what_a_serving_machine_need_not_have_is_refused(line: str, why: str, tmp_path: Path) -> None:
    checkout = toy(tmp_path, export__runtime__public="from tc_lightning.noise import f", tc_lightning__noise=f"f = 1\n{line}\n")
    with pytest.raises(WheelError, match=why):
        sources(checkout, "1")


def test_two_modules_of_one_name_are_refused(tmp_path: Path) -> None:
    both = "from tc_lightning.errors import a\nfrom export.runtime.errors import b\n"
    checkout = toy(tmp_path, export__runtime__public=both, tc_lightning__errors="a = 1", export__runtime__errors="b = 1")
    with pytest.raises(
        WheelError, match=r"export\.runtime\.errors and tc_lightning\.errors would both be tc_lightning_runtime\.errors"
    ):
        sources(checkout, "1")
