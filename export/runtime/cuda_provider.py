"""The CUDA provider: whether it can be used, its options, one stream for all sessions, the memory of the device.

Needs numpy and onnxruntime alone. Nothing here runs unless CUDA is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort

from tc_lightning.errors import TokenCacheError, first_line

CUDA = "CUDAExecutionProvider"
# Before, a replayed Split or ScatterND read its list of pointers from host memory that others had taken over since
# (microsoft/onnxruntime#32121), and a replay waited for the device whatever it was told (#28686).
GRAPHS_SINCE = (1, 31)
_NON_BLOCKING = 1  # cudaStreamNonBlocking: independent of the default stream, on which PyTorch works
_once = threading.Lock()  # what exists once in a process is made by one thread
T = TypeVar("T")


class RuntimeUnavailableError(TokenCacheError):
    """The provider that was asked for cannot be used."""


def require_cuda(device: int = 0) -> None:
    """Say what is missing, rather than run on the CPU as ONNX Runtime would.

    Args:
        device: the GPU that is to be used, counted from 0.

    Raises:
        RuntimeUnavailableError: with what to do.
    """
    if CUDA not in ort.get_available_providers():
        raise RuntimeUnavailableError(
            "provider cuda was asked for, but this onnxruntime has no CUDA provider: install onnxruntime-gpu, and uninstall "
            "onnxruntime if both are installed (the CPU package hides the other). Or ask for provider cpu."
        )
    if {"onnxruntime", "onnxruntime-gpu"} <= {d.name for d in importlib.metadata.distributions()}:
        raise RuntimeUnavailableError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files: `pip uninstall onnxruntime "
            "onnxruntime-gpu`, then install onnxruntime-gpu alone."
        )
    lane()
    ort.preload_dlls()  # of the nvidia-* packages, if they are installed
    _require_driver()
    if device >= (found := _device_count()) > 0:
        raise RuntimeUnavailableError(
            f"device {device} was asked for, but CUDA sees {found} here, numbered from 0: give {found - 1} or less, or look at "
            "CUDA_VISIBLE_DEVICES, which hides and renumbers devices."
        )
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", device)
        compute_stream(device)
    except Exception as error:
        raise cuda_error("the CUDA provider cannot be loaded", error) from error


def cuda_error(what: str, error: Exception) -> RuntimeUnavailableError:
    """What another library said of CUDA, with which versions were wanted and which are there."""
    return RuntimeUnavailableError(
        f"{what}: {in_short(error)} (onnxruntime-gpu {ort.__version__} is built for CUDA {_built_for()}, the driver is for CUDA "
        f"{_driver_version() or 'unknown'}.) Check that a GPU is visible and has memory left (nvidia-smi), and that the libraries "
        f"found are those of CUDA {_major()} and cuDNN 9: `pip install 'onnxruntime-gpu[cuda,cudnn]'` brings them; the log above "
        "names one that is missing. Or ask for provider cpu."
    )


def in_short(error: Exception) -> str:
    """What ONNX Runtime says; of a failure in CUDA, only what failed: the rest is about source files."""
    said = re.search(r"(CUDA|CUDNN|CUBLAS) failure \d+: [^;]+", str(error))
    return said[0].strip() + "." if said else first_line(error)


def _require_driver() -> None:
    """The driver must be there, and not older than the CUDA that this onnxruntime was built for.

    Raises:
        RuntimeUnavailableError: otherwise.
    """
    version = _driver_version()
    if version is None:
        raise RuntimeUnavailableError(
            "provider cuda was asked for, but this machine has no NVIDIA driver (libcuda cannot be loaded): run where `nvidia-smi` "
            "shows a GPU (in a container, start it with access to one). Or ask for provider cpu."
        )
    if _major().isdigit() and int(version.split(".")[0]) < int(_major()):
        raise RuntimeUnavailableError(
            f"onnxruntime-gpu {ort.__version__} is built for CUDA {_built_for()}, but the driver here is for CUDA {version}: update "
            f"the driver, or install an onnxruntime-gpu that is built for CUDA {version.split('.')[0]}. Or ask for provider cpu."
        )


def _driver_version() -> str | None:
    """CUDA version that the installed driver supports, for example `13.0`; None without a driver."""
    version = _ask_driver("cuDriverGetVersion")
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _device_count() -> int:
    """GPUs that this process may use; 0 if the driver cannot tell."""
    return _ask_driver("cuDeviceGetCount") or 0


def _ask_driver(function: str) -> int | None:
    """What a function of the driver that yields a number says; None without a driver."""
    answer = ctypes.c_int()
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
            driver.cuInit(0)
            if getattr(driver, function)(ctypes.byref(answer)) == 0:
                return answer.value
        except (OSError, AttributeError):
            continue
    return None


def _built_for() -> str:
    return str(getattr(ort, "cuda_version", "")) or "unknown"


def _major() -> str:
    return _built_for().split(".")[0]


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that the provider uses: it is loaded already, and found by its name."""
    for name in (f"libcudart.so.{_major()}", f"cudart64_{_major()}.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"libcudart.so.{_major()} cannot be loaded.")


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_runtime(), function)(*arguments)
    if status != 0:
        describe = _runtime().cudaGetErrorString
        describe.restype = ctypes.c_char_p
        raise OSError(f"{function} failed with CUDA error {status}, {(describe(status) or b'').decode()}.")


@contextlib.contextmanager
def _current(device: int) -> Iterator[None]:
    """Calls of the CUDA runtime within are about this device; the thread's own is as it was afterwards."""
    before = ctypes.c_int()
    _call("cudaGetDevice", ctypes.byref(before))
    _call("cudaSetDevice", ctypes.c_int(device))
    try:
        yield
    finally:
        _call("cudaSetDevice", before)


def compute_stream(device: int = 0) -> int:
    """The stream of all our sessions on a device, so that each program comes after the one before it without the host waiting.

    A stream of our own: CUDA graphs cannot be captured on the default one.
    """
    with _once:
        return _stream(device)


@functools.cache
def _stream(device: int) -> int:
    stream = ctypes.c_void_p()
    with _current(device):
        _call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
    return int(stream.value or 0)


def device_memory_mb(device: int = 0) -> float:
    """Megabytes of a device that are taken, by this process and others."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with _current(device):
        _call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return (total.value - free.value) / 1e6


def provider_options(graphs: bool, device: int = 0) -> dict[str, str]:
    """Options of one session's CUDA provider."""
    return {
        "device_id": str(device),
        "user_compute_stream": str(compute_stream(device)),
        "enable_cuda_graph": "1" if graphs else "0",
        "use_tf32": "0",  # fp32 means fp32, as on the CPU and in PyTorch
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles what each session takes
    }


def why_no_graphs() -> str | None:
    """Why this onnxruntime cannot be trusted to replay CUDA graphs; None if it can."""
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    wanted = ".".join(map(str, GRAPHS_SINCE))
    return None if version >= GRAPHS_SINCE else f"onnxruntime-gpu {ort.__version__}: graphs that use Split are right from {wanted} on"


class Stopped(Exception):  # noqa: N818
    """A request was told to stop."""


class Lane:
    """Runs calls one after the other, on one thread of its own.

    ONNX Runtime keeps captured CUDA graphs for each thread apart: a request from another thread would capture all of them again. And
    while one is being captured, no other thread of the process may allocate on the device.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokencache-cuda")
        self._thread = self._pool.submit(threading.get_ident).result()  # starts it: an interrupt while it starts would go unnoticed

    def run(self, call: Callable[[Callable[[], None]], T]) -> T:
        """Run `call` and return what it returns; a call from within one runs at once.

        `call` is given a function to call now and then: it raises `Stopped` once whoever waits for the result has been interrupted.
        """
        if threading.get_ident() == self._thread:
            return call(lambda: None)
        stop = threading.Event()

        def check() -> None:
            if stop.is_set():
                raise Stopped

        def begin() -> T:
            check()
            return call(check)

        future: Future[T] | None = None
        try:
            future = self._pool.submit(begin)
            while not wait([future], timeout=0.5).done:  # a signal that comes just before a wait is noticed only after it
                pass
            return future.result()
        except BaseException:
            stop.set()
            if future is None or not (future.done() or future.cancel()):
                self._pool.submit(int).result()  # what the call uses must not be taken away from under it: wait until it has ended
            raise


def lane() -> Lane:
    """The lane of the process's GPU work, on whichever devices.

    Raises:
        RuntimeUnavailableError: in the child of a process that has one: neither its thread nor CUDA survives a fork.
    """
    with _once:
        found = _lane()
    if found.process != os.getpid():
        raise RuntimeUnavailableError(
            "the process that this one was forked from has used CUDA, which cannot be used after a fork: start processes with "
            'multiprocessing.get_context("spawn"), or make the first CachedSampler after the fork.'
        )
    return found


@functools.cache
def _lane() -> Lane:
    return Lane()
