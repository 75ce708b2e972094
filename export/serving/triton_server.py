"""Runs the Triton server that the nvidia-pytriton package carries. Standard library only.

The package's own Python interface is not used: the server loads a model repository, as NVIDIA's container does.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tc_lightning.errors import TokenCacheError

CHECKOUT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
ELSEWHERE = "Or run the repository in NVIDIA's container: tritonserver --model-repository /models."


class ServerError(TokenCacheError):
    """The server is not there, or cannot run with this Python."""


@dataclasses.dataclass(frozen=True)
class Installed:
    """What the package carries, for this version of Python.

    Args:
        binary: the server.
        backend: folder of the python backend.
        stub: the process that a model runs in: it embeds this version of Python.
        libraries: folder of the shared libraries that both need.
    """

    binary: Path
    backend: Path
    stub: Path
    libraries: Path


@dataclasses.dataclass(frozen=True)
class Ports:
    """Where the server listens; no gRPC unless it has a port."""

    address: str = "127.0.0.1"
    http: int = 8000
    metrics: int = 8002
    grpc: int | None = None


def find_server() -> Installed:
    """The server of the nvidia-pytriton package that is installed for this Python.

    Raises:
        ServerError: if it is not, or has no stub for this Python.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            f"no Triton server is installed for {sys.executable}: `pip install nvidia-pytriton onnxruntime`, in an environment of its "
            f"own, since it needs numpy < 2. {ELSEWHERE}"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    root = package / "tritonserver"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(f"nvidia-pytriton has no python backend for Python {version}: use another version of Python. {ELSEWHERE}")
    _require_shared_python(version)
    return Installed(root / "bin" / "tritonserver", root / "backends" / "python", stub, package.parent / "nvidia_pytriton.libs")


def _require_shared_python(version: str) -> None:
    """The stub embeds Python, and so needs it as a shared library."""
    name = f"libpython{version}.so.1.0"
    for library in (str(Path(sysconfig.get_config_var("LIBDIR") or "") / name), name):
        with contextlib.suppress(OSError):
            ctypes.CDLL(library)
            return
    raise ServerError(
        f"{sys.executable} has no {name}, which Triton's python backend embeds: install it (libpython{version} on Debian and Ubuntu), "
        f"or use a Python that was built with --enable-shared. {ELSEWHERE}"
    )


def serve(repository: Path, ports: Ports, more: Sequence[str] = ()) -> int:
    """Run the server until it ends; SIGTERM and SIGINT are handed on to it.

    Args:
        repository: a model repository.
        ports: where it listens.
        more: further options of tritonserver.

    Returns:
        Its exit status.

    Raises:
        ServerError: if there is no server, or no repository.
    """
    if not repository.is_dir():
        raise ServerError(f"the model repository {repository} does not exist: write it with `python export/to_triton.py ARTEFACT`.")
    installed = find_server()
    with _backends(installed) as backends, _shared_memory() as prefix:
        command = [
            str(installed.binary),
            f"--model-repository={repository.resolve()}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            *_listening(ports),
            *more,
        ]
        with subprocess.Popen(command, env=_environment(installed)) as process:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda caught, _: process.send_signal(caught))
            return process.wait()


def _listening(ports: Ports) -> list[str]:
    http = [f"--http-address={ports.address}", f"--http-port={ports.http}"]
    metrics = [f"--metrics-address={ports.address}", f"--metrics-port={ports.metrics}"]
    grpc = ["--allow-grpc=false"] if ports.grpc is None else [f"--grpc-address={ports.address}", f"--grpc-port={ports.grpc}"]
    return [*http, *metrics, *grpc]


@contextlib.contextmanager
def _backends(installed: Installed) -> Iterator[Path]:
    """A folder of backends whose python backend has the stub for this version of Python beside it."""
    with tempfile.TemporaryDirectory(prefix="tc-lightning-triton-") as folder:
        python = Path(folder) / "python"
        python.mkdir()
        for path in installed.backend.iterdir():
            (python / path.name).symlink_to(path)
        stub = python / installed.stub.name
        stub.unlink(missing_ok=True)
        shutil.copyfile(installed.stub, stub)
        stub.chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def _shared_memory() -> Iterator[str]:
    """A prefix for the names of shared memory, which a server that is killed would leave behind."""
    prefix = f"tc-lightning-{os.getpid()}-{secrets.token_hex(4)}-"
    try:
        yield prefix
    finally:
        for path in SHARED_MEMORY.glob(f"{prefix}*"):
            path.unlink(missing_ok=True)


def _environment(installed: Installed) -> dict[str, str]:
    """The stub finds Python and its packages by PATH, and this package by PYTHONPATH where it is not installed."""
    shared = str(sysconfig.get_config_var("LIBDIR") or "")
    ahead = {
        "PATH": [str(Path(sys.executable).parent)],
        "LD_LIBRARY_PATH": [str(installed.libraries), shared],
        "PYTHONPATH": [str(CHECKOUT)],
    }
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONHOME"},
        **{name: os.pathsep.join(filter(None, [*places, os.environ.get(name, "")])) for name, places in ahead.items()},
    }
