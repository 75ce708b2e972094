"""A real Triton server, of the nvidia-pytriton package, on this machine alone: it answers what a sampler makes of each row alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import FULL, make_plan, make_teacher
from PIL import Image
from test_commands import SCRIPTS
from test_toy_family import EVERY_MODE, GUIDANCE, SIGNATURE, with_examples
from triton_environment import counters, python_with_server

from export.compiler.compile import export_artefact
from export.runtime.sampler import CachedSampler
from export.serving.triton_client import Client, RequestFailedError
from export.serving.triton_config import Settings
from export.serving.triton_load import OVERFLOWING, Alone, Ask, alone, faults, mixed, send
from export.serving.triton_process import Running, free_ports, started
from export.serving.triton_repository import write_repository
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import skip

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the package carries a server for Linux")
ONE_THREAD = Settings(threads=1, max_batch=8)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has the server, and numpy < 2."""
    return python_with_server(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two conditions, one of them a matrix."""
    out = tmp_path_factory.mktemp("artefacts") / "toy"
    export_artefact(with_examples(), make_plan(SIGNATURE, EVERY_MODE, GUIDANCE), out, "fp32", "cpu", 1, lambda _: None)
    return out


@pytest.fixture(scope="module")
def server(python: str, artefact: Path, unguided: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Three models, by one thread each."""
    repository = tmp_path_factory.mktemp("models") / "repository"
    write_repository([artefact, unguided, toy], repository, ONE_THREAD)
    with started(repository, python) as running:
        yield running


@pytest.fixture(scope="module")
def samplers(artefact: Path, unguided: Path, toy: Path) -> dict[str, CachedSampler]:
    """The same artefacts here, by one thread each."""
    return {path.name: CachedSampler(path, threads=1) for path in (artefact, unguided, toy)}


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


def test_triton_reads_the_config_as_it_was_meant(client):
    config = client.get("/v2/models/toy/config")
    assert [(one["name"], one["data_type"], one["dims"], one["optional"]) for one in config["input"]] == [
        ("kind", "TYPE_INT64", [1], False),
        ("mood", "TYPE_FP32", [2, 3], False),
        ("seed", "TYPE_INT64", [1], False),
        ("index", "TYPE_INT64", [1], True),
        ("guidance", "TYPE_FP32", [1], True),
        ("full", "TYPE_BOOL", [1], True),
    ]
    assert [(one["name"], one["dims"]) for one in config["output"]] == [("image", [3, 8, 8]), ("latent", [3, 8, 8]), ("receipt", [1])]
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"]["preferred_batch_size"] == [2, 4, 8]
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 5000
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 256
    assert [(one["kind"], one["count"]) for one in config["instance_group"]] == [("KIND_CPU", 1)]


@pytest.mark.parametrize("model", ["tiny", "unguided", "toy"])
def test_sixteen_clients_get_what_each_row_would_be_alone(server, samplers, model):
    """Bytes of numpy < 2 there and of this numpy here."""
    count = 200 if model == "tiny" else 40
    outcomes = send(server.address, model, mixed(samplers[model], count, seed=5), clients=16)
    assert len(outcomes) == count
    assert sum(bool(outcome.error) for outcome in outcomes) == round(0.05 * count)
    assert not any(outcome.lost for outcome in outcomes)
    assert faults(Alone(samplers[model]), outcomes) == []


def test_rows_of_several_requests_fill_a_batch(server, samplers, client):
    def batches() -> dict[int, int]:
        stats = client.get("/v2/models/tiny/stats")["model_stats"][0]["batch_stats"]
        return {one["batch_size"]: one["compute_infer"]["count"] for one in stats}

    asks = [Ask({"label": np.array([[n % 5]]), "seed": np.array([[n]])}) for n in range(64)]
    before = batches()
    assert faults(Alone(samplers["tiny"]), send(server.address, "tiny", asks, clients=16)) == []
    ran = {size: count - before.get(size, 0) for size, count in batches().items()}
    assert sum(size * count for size, count in ran.items()) == 64
    assert sum(ran.values()) < 64


def test_an_image_by_json_as_curl_asks_for_it(server, samplers):
    asked = {
        "inputs": [
            {"name": "label", "datatype": "INT64", "shape": [1, 1], "data": [3]},
            {"name": "seed", "datatype": "INT64", "shape": [1, 1], "data": [7]},
        ]
    }
    request = urllib.request.Request(f"http://{server.address}/v2/models/unguided/infer", json.dumps(asked).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        outputs = {one["name"]: one for one in json.loads(answer.read())["outputs"]}
    made = samplers["unguided"].sample([3], seed=7)
    assert outputs["image"]["shape"] == [1, 3, 8, 8]
    assert np.array_equal(np.float32(outputs["image"]["data"]).reshape(1, 3, 8, 8), made.images)
    receipt = json.loads(outputs["receipt"]["data"][0])
    assert receipt["provider"] == "cpu"
    assert receipt["plan_digest"] == samplers["unguided"].manifest["plan_digest"]


def test_only_outputs_that_are_wanted_are_sent(client):
    found = client.infer("unguided", {"label": np.array([[0], [1]]), "seed": np.array([[0], [0]])}, ["image"])
    assert {name: value.shape for name, value in found.items()} == {"image": (2, 3, 8, 8)}


def test_indices_count_within_a_request_and_full_compute_is_of_a_row(client, samplers):
    inputs = {"label": np.array([[0], [1], [2]]), "seed": np.array([[4], [4], [4]]), "full": np.array([[False], [True], [False]])}
    found = client.infer("tiny", inputs)
    receipts = [json.loads(text) for text in found["receipt"][:, 0]]
    assert [receipt["full_compute"] for receipt in receipts] == [False, True, False]
    for row in range(3):
        assert found["latent"][row].tobytes() == alone(samplers["tiny"], Ask(inputs), row)["latent"].tobytes()
    assert found["latent"][2].tobytes() == samplers["tiny"].sample([2], seed=4, first_index=2).latents[0].tobytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label": [[0], [7]]}, r"^row 1: label 7 is out of range: the model has classes 0 to 4"),
        ({"seed": [[-3], [0]]}, r"^row 0: seed -3 is out of range"),
        ({"index": [[0], [-1]]}, r"^row 1: index -1 is out of range"),
        ({"guidance": np.float32([[1.0], [np.nan]])}, r"^row 1: guidance nan is not a number that can be used"),
        ({"guidance": np.float32([[OVERFLOWING], [1.0]])}, r"^row 0: latents became NaN or infinite at step"),
        ({"seed": [[0, 1], [0, 1]]}, r"unexpected shape for input 'seed'"),
        ({"seed": np.float32([[0], [1]])}, r"data-type is 'FP32', but model 'tiny' expects 'INT64'"),
        ({"index": [[0]]}, r"batch size does not match"),
        ({"taste": [[0], [0]]}, r"unexpected inference input 'taste'"),
    ],
)
def test_a_bad_row_is_an_error_of_its_request(client, changed, said):
    inputs = {"label": np.array([[0], [1]]), "seed": np.array([[0], [1]])}
    with pytest.raises(RequestFailedError, match=said) as caught:
        client.infer("tiny", inputs | {name: np.asarray(value) for name, value in changed.items()})
    assert caught.value.status == http.client.BAD_REQUEST
    assert client.infer("tiny", inputs)["latent"].shape == (2, 4, 8, 8)


def test_a_request_of_more_rows_than_a_batch_is_refused(client):
    with pytest.raises(RequestFailedError, match="batch-size must be <= 8"):
        client.infer("tiny", {"label": np.zeros((9, 1), np.int64), "seed": np.zeros((9, 1), np.int64)})


def test_metrics_count_what_ran(server, client):
    before = counters(server, "toy")
    inputs = {"kind": np.array([[0], [1]]), "mood": np.zeros((2, 2, 3), np.float32), "seed": np.array([[0], [1]])}
    receipt = json.loads(client.infer("toy", inputs)["receipt"][0, 0])
    with pytest.raises(RequestFailedError, match="NaN or infinite"):
        client.infer("toy", {name: value[:1] for name, value in inputs.items()} | {"guidance": np.float32([[OVERFLOWING]])})
    with pytest.raises(RequestFailedError, match="seed -1"):
        client.infer("toy", inputs | {"seed": np.array([[0], [-1]])})
    after = counters(server, "toy")
    assert after["tc_images_total"] - before["tc_images_total"] == 2
    assert after["tc_nan_refusals_total"] - before["tc_nan_refusals_total"] == 1
    assert after["tc_cached_steps_total"] - before["tc_cached_steps_total"] == receipt["steps_reading_cache"] > 0
    ms = after["tc_program_milliseconds_total"] - before["tc_program_milliseconds_total"]
    assert ms == pytest.approx(sum(receipt["ms_per_program"].values()), rel=1e-6)
    assert after["tc_model_info"] == 1


# The README


def test_the_readmes_commands_make_an_image(python, tmp_path):
    """As they stand there, with a port of the test's own."""
    teacher = make_teacher(in_channels=1, num_classes=10, output="pixels")
    plan = make_plan(teacher, (FULL, (skip(0, 4),)), Guidance())
    export_artefact(teacher, plan, tmp_path / "artefacts" / "digits", "fp32", "cpu", images=1, report=lambda _: None)
    (tmp_path / "export").symlink_to(SCRIPTS)
    section = (SCRIPTS.parent / "README.md").read_text(encoding="utf-8").partition("### Triton\n")[2]
    (install, write, serve), (curl,) = (block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[:2])
    assert install == "pip install nvidia-pytriton onnxruntime && pip install --no-deps -e ."
    assert serve == "python export/triton_server.py model_repository"
    environment = {**os.environ, "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(SCRIPTS.parent)}
    subprocess.run(write, shell=True, check=True, cwd=tmp_path, env=environment)
    with started(tmp_path / "model_repository", python) as running:
        subprocess.run(curl.replace("localhost:8000", running.address), shell=True, check=True, cwd=tmp_path)
    made = CachedSampler(tmp_path / "artefacts" / "digits").sample([7], seed=42).images
    with Image.open(tmp_path / "seven.pgm") as image:
        assert np.abs(np.asarray(image) - (127.5 * made[0, 0] + 127.5)).max() < 1.0


# Not ready


@pytest.fixture(scope="module")
def unready(python: str, artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with models that cannot be, and one that refuses to let a second request wait."""
    folder = tmp_path_factory.mktemp("unready")
    long = folder / "long_steps"
    export_artefact(make_teacher(), make_plan(make_teacher(), (FULL,) * 400), long, "fp32", "cpu", images=1, report=lambda _: None)
    kinds = {
        "asks_cuda": Settings("cuda"),
        "either": Settings("either", threads=1, max_batch=1),
        "changed": ONE_THREAD,
        "short_queue": Settings(threads=1, queue=1, max_batch=1),
        "long": ONE_THREAD,
    }
    repository = folder / "repository"
    for name, settings in kinds.items():
        (folder / name).symlink_to(long if name == "long" else artefact)
        write_repository([folder / name], folder / "one", settings)
        shutil.copytree(folder / "one" / name, repository / name, symlinks=True)
    config = repository / "changed" / "config.pbtxt"
    digest = CachedSampler(artefact).manifest["plan_digest"]
    config.write_text(config.read_text(encoding="utf-8").replace(digest, "0" * 64), encoding="utf-8")
    with started(
        repository, python, more=["--exit-on-error=false", "--strict-readiness=false", f"--grpc-port={free_ports().http}"]
    ) as running:
        yield running


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("asks_cuda", "CUDA"),
        ("changed", "is not the artefact that this model was written for: write the repository again"),
    ],
)
def test_a_model_that_cannot_be_is_not_ready_and_says_why(unready, model, said):
    with Client(unready.address) as client:
        reasons = {one["name"]: (one["state"], one.get("reason", "")) for one in client.post("/v2/repository/index")}
        state, reason = reasons[model]
        assert state == "UNAVAILABLE"
        assert said in reason
        assert "Traceback" not in reason
        with pytest.raises(RequestFailedError):
            client.get(f"/v2/models/{model}/ready")


def test_either_is_the_cpu_where_there_is_no_gpu(unready):
    with Client(unready.address) as client:
        found = client.infer("either", {"label": np.array([[1]]), "seed": np.array([[2]])})
    assert json.loads(found["receipt"][0, 0])["provider"] == "cpu"


def test_more_requests_than_may_wait_are_refused_at_once(unready, samplers):
    asks = [Ask({"label": np.array([[n % 5]]), "seed": np.array([[n]]), "full": np.array([[True]])}) for n in range(48)]
    outcomes = send(unready.address, "short_queue", asks, clients=16)
    refused = [outcome.error for outcome in outcomes if outcome.error]
    assert refused
    assert all("Exceeds maximum queue size" in error for error in refused)
    made = [outcome for outcome in outcomes if outcome.outputs is not None]
    assert made
    assert faults(Alone(samplers["tiny"]), made) == []


GIVEN_UP = """
import sys, threading, numpy as np, tritonclient.grpc as grpc
client, ended = grpc.InferenceServerClient(sys.argv[1]), threading.Event()
inputs = [grpc.InferInput(name, [8, 1], "INT64").set_data_from_numpy(np.zeros((8, 1), np.int64)) for name in ("label", "seed")]
call = client.async_infer("long", inputs, lambda result, error: (print(error.status()), ended.set()))
ended.wait(0.3)
call.cancel()
ended.wait()
"""


def test_a_request_that_is_given_up_ends_at_its_next_step(unready, python):
    """By gRPC: Triton does not look whether a connection of HTTP has ended. 400 steps would make eight images."""
    address = next(word.partition("=")[2] for word in unready.options if word.startswith("--grpc-port"))
    done = subprocess.run([python, "-c", GIVEN_UP, f"127.0.0.1:{address}"], capture_output=True, text=True, check=True)
    assert "CANCELLED" in done.stdout
    with Client(unready.address) as client:
        found = client.infer("long", {"label": np.array([[1]]), "seed": np.array([[2]])})
    assert json.loads(found["receipt"][0, 0])["images"] == 1
    assert counters(unready, "long")["tc_images_total"] == 1
    assert counters(unready, "long")["tc_nan_refusals_total"] == 0


def test_without_the_package_a_model_says_what_to_install(python, artefact, tmp_path):
    write_repository([artefact], tmp_path / "repository", Settings())
    script = tmp_path / "repository" / "tiny" / "1" / "model.py"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-I", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=bare)
    assert "this model needs export, which the Python that Triton runs does not find" in done.stderr
    assert "pip install --no-deps -e ." in done.stderr


def test_the_load_command_kills_a_server_and_loses_what_was_in_flight_alone(python, artefact, tmp_path):
    counts = ["--requests", "20", "--requests-killed", "60", "--clients", "8", "--max-batch", "4", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    command = [python, SCRIPTS / "triton_load.py", artefact, *counts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert all(one["faults"] == [] for one in found.values())
    assert 1 <= found["killed"]["lost_in_flight"] <= 8
    assert found["batching"]["images"] == found["no batching"]["images"] > 0
    assert sum(int(size) * count for size, count in found["batching"]["batches"].items()) >= found["batching"]["images"]
