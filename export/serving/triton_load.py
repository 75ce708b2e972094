"""A load for a Triton server: requests of many kinds from many clients at once, some of them bad, each answer held against its own row
made alone. Shape suffixes: R rows of a request."""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from export.bench.random_values import random_values
from export.runtime.sampler import CachedSampler
from export.serving.triton_client import Client, RequestFailedError
from export.serving.triton_config import FULL, GUIDANCE, IMAGE, INDEX, LATENT, RECEIPT, SEED
from export.serving.triton_process import is_ready
from tc_lightning.plan.conditions import Condition
from tc_lightning.plan.given import NUMPY_TYPES

BAD_SHARE, FULL_SHARE = 0.05, 0.05
MOST_ROWS = 3
OVERFLOWING = 3e38  # a guidance scale that can be asked for, and of which latents become NaN


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request.

    Args:
        inputs: by name, [R, ...] each.
        wrong: what its error must say; empty if it is a good one.
    """

    inputs: dict[str, np.ndarray]
    wrong: str = ""

    @property
    def rows(self) -> int:
        """R, how many images it asks for."""
        return len(self.inputs[SEED])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request: outputs, or an error; neither if the connection ended before there was an answer."""

    ask: Ask
    ms: float
    outputs: dict[str, np.ndarray] | None = None
    error: str | None = None

    @property
    def lost(self) -> bool:
        """Whether there was no answer."""
        return self.outputs is None and self.error is None


def mixed(sampler: CachedSampler, count: int, seed: int) -> list[Ask]:
    """Requests of one to three rows with conditions, seeds, indices and guidance of their own; every twentieth is bad, in turn in each
    of the ways in which a request can be."""
    rng = np.random.default_rng(seed)
    guided = sampler.manifest["guidance"]["scale"] != 1.0
    bad = set(rng.choice(count, round(BAD_SHARE * count), replace=False).tolist())
    spoil = _spoilers(sampler.conditions, guided)
    asks = []
    for number in range(count):
        ask = _good(sampler.conditions, guided, rng)
        asks.append(spoil[len([n for n in bad if n < number]) % len(spoil)](ask, number) if number in bad else ask)
    return asks


def complete(sampler: CachedSampler, ask: Ask) -> Ask:
    """The same request with nothing left out: Triton puts requests into one batch only if they bring the same inputs."""
    R, scale = ask.rows, sampler.manifest["guidance"]["scale"]
    usual: dict[str, np.ndarray] = {
        INDEX: np.arange(R)[:, None],
        GUIDANCE: np.full((R, 1), scale, np.float32),
        FULL: np.zeros((R, 1), bool),
    }
    return Ask(usual | ask.inputs, ask.wrong)


def _good(conditions: Sequence[Condition], guided: bool, rng: np.random.Generator) -> Ask:
    R = int(rng.integers(1, MOST_ROWS + 1))
    drawn = random_values(tuple(conditions), R, rng).items()
    inputs = {name: value.reshape(R, *(value.shape[1:] or (1,))) for name, value in drawn} | {SEED: rng.integers(0, 2**62, (R, 1))}
    if rng.random() < 0.5:
        inputs[INDEX] = rng.integers(0, 2**40, (R, 1))
    if guided and rng.random() < 0.5:
        inputs[GUIDANCE] = rng.choice(np.array([1.0, 1.5, 4.0], np.float32), (R, 1))
    if rng.random() < FULL_SHARE:
        inputs[FULL] = rng.random((R, 1)) < 0.5
    return Ask(inputs)


def _spoilers(conditions: Sequence[Condition], guided: bool) -> list[Callable[[Ask, int], Ask]]:
    """The ways in which a request can be bad. The last row is, and its error must name its own value."""

    def put(name: str, value: float, said: str) -> Callable[[Ask, int], Ask]:
        def spoil(ask: Ask, number: int) -> Ask:
            array = ask.inputs.get(name, np.ones((ask.rows, 1), np.float32)).copy()
            array[-1] = value if array.dtype.kind == "f" else value - number
            return Ask(ask.inputs | {name: array}, said.format(int(value - number) if array.dtype.kind == "i" else value))

        return spoil

    def misshape(ask: Ask, number: int) -> Ask:
        return Ask(ask.inputs | {SEED: np.ones((ask.rows, 3 + number), np.int64)}, f"[{ask.rows},{3 + number}]")

    first = conditions[0]
    value = put(first.name, np.nan, "NaN") if first.dtype == "fp32" else put(first.name, -1, "{}")
    scales = [put(GUIDANCE, OVERFLOWING, "NaN or infinite at step"), put(GUIDANCE, np.inf, "guidance inf")] if guided else []
    return [value, put(SEED, -1, "seed {}"), *scales, misshape]


def send(
    address: str, model: str, asks: Sequence[Ask], clients: int = 16, done: Callable[[int], None] | None = None, patience: float = 120.0
) -> list[Outcome]:
    """Send requests from so many threads, each with a connection of its own and one request at a time.

    A request whose connection breaks is lost. One that finds no server is not: its client waits for the server and sends it again.

    Args:
        address: host and port.
        model: its name.
        asks: the requests.
        clients: threads.
        done: called with how many are done, after each.
        patience: seconds to wait for a server.

    Returns:
        What became of each, in order.
    """
    outcomes: list[Outcome | None] = [None] * len(asks)
    waiting, lock = iter(range(len(asks))), threading.Lock()
    count = [0]

    def work() -> None:
        client = Client(address)
        while True:
            with lock:
                place = next(waiting, None)
            if place is None:
                return client.close()
            outcomes[place] = _one(client, address, model, asks[place], patience)
            with lock:
                count[0] += 1
                if done is not None:
                    done(count[0])

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(work) for _ in range(clients)]:
            future.result()
    return [outcome for outcome in outcomes if outcome is not None]


def _one(client: Client, address: str, model: str, ask: Ask, patience: float) -> Outcome:
    until = time.monotonic() + patience
    while True:
        started = time.perf_counter()
        try:
            outputs = client.infer(model, ask.inputs)
            return Outcome(ask, 1e3 * (time.perf_counter() - started), outputs)
        except RequestFailedError as error:
            return Outcome(ask, 1e3 * (time.perf_counter() - started), error=str(error))
        except ConnectionRefusedError:
            _wait_for(address, until)
        except (OSError, http.client.HTTPException):
            lost = Outcome(ask, 1e3 * (time.perf_counter() - started))
            _wait_for(address, until)  # what is sent to a server that is ending is lost, too
            return lost


def _wait_for(address: str, until: float) -> None:
    while not is_ready(address):
        if time.monotonic() > until:
            raise TimeoutError(f"no server at {address}")
        time.sleep(0.05)


class Alone:
    """Rows made by themselves, each once, however often it is asked for.

    Args:
        sampler: the artefact, on the same provider and with the same number of threads as the server.
    """

    def __init__(self, sampler: CachedSampler) -> None:
        self.provider, self._sampler = sampler.provider, sampler
        self._made: dict[tuple[int, int], tuple[Ask, dict[str, np.ndarray]]] = {}

    def row(self, ask: Ask, row: int) -> dict[str, np.ndarray]:
        """Outputs of a row of a request by name; of the same object the same."""
        key = id(ask), row
        if key not in self._made:
            self._made[key] = ask, alone(self._sampler, ask, row)  # the request is kept, so that its id stays its own
        return self._made[key][1]


def faults(made: Alone, outcomes: Sequence[Outcome]) -> list[str]:
    """What is not as it must be: an answer that differs from its own rows made alone, in any byte; a good request that failed; a bad
    one that did not, or whose error is not its own. Requests that were lost are not looked at.

    Args:
        made: what rows are by themselves.
        outcomes: what became of the requests.
    """
    found = []
    for number, outcome in enumerate(outcomes):
        if outcome.lost:
            continue
        told = _fault(made, outcome)
        found += [f"request {number}: {told}"] if told else []
    return found


def _fault(made: Alone, outcome: Outcome) -> str | None:
    ask, outputs = outcome.ask, outcome.outputs
    if ask.wrong:
        return None if ask.wrong in (outcome.error or "") else f"was to fail and say {ask.wrong!r}, and said {outcome.error!r}"
    if outputs is None:
        return f"failed: {outcome.error}"
    for row in range(ask.rows):
        for name, value in made.row(ask, row).items():
            if outputs[name][row].tobytes() != value.tobytes():
                return f"row {row}: {name} differs from the one made alone"
        receipt: dict[str, Any] = json.loads(str(outputs[RECEIPT][row, 0]))
        if receipt["provider"] != made.provider:
            return f"row {row}: its receipt names the provider {receipt['provider']}"
    return None


def alone(sampler: CachedSampler, ask: Ask, row: int) -> dict[str, np.ndarray]:
    """A row of a request, made by itself: its outputs by name."""
    given = {c.name: ask.inputs[c.name][row].reshape(1, *c.shape).astype(NUMPY_TYPES[c.dtype], copy=False) for c in sampler.conditions}
    result = sampler.sample(
        conditions=given,
        seed=int(ask.inputs[SEED][row, 0]),
        first_index=int(ask.inputs[INDEX][row, 0]) if INDEX in ask.inputs else row,
        guidance=float(ask.inputs[GUIDANCE][row, 0]) if GUIDANCE in ask.inputs else None,
        full=bool(ask.inputs[FULL][row, 0]) if FULL in ask.inputs else False,
    )
    made = {LATENT: result.latents[0]}
    return made if result.images is None else made | {IMAGE: result.images[0]}
