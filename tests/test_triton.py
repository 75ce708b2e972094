"""Model repositories of Triton: written whole or not at all, and what config.pbtxt says. tests/test_triton_server.py runs them."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from test_commands import call, is_one_paragraph
from toy import make_toy

from export.runtime.manifest import ArtefactError, read_manifest
from export.runtime.sampler import CachedSampler
from export.serving.heap import trim
from export.serving.triton_config import Settings, config_of, inputs_of, outputs_of, served_name
from export.serving.triton_repository import ARTEFACT, MARK, write_repository
from export.serving.warm_up import warm_up
from tc_lightning.errors import TokenCacheError


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors(text: str, kind: str) -> list[tuple[str, str, str, bool]]:
    """Name, type, shape and whether it is optional, of the inputs or outputs of a config."""
    found = re.findall(
        rf'^{kind} \[ {{ name: "(\w+)" data_type: (\w+) dims: \[ ([\d, ]+) \]( optional: true)? }} \]$', text, re.MULTILINE
    )
    return [(name, dtype, shape, bool(optional)) for name, dtype, shape, optional in found]


def test_a_config_says_what_a_request_brings_and_gets(artefact):
    text = config_of("tiny", read_manifest(artefact), Settings(max_batch=8, delay_ms=2.5, queue=9, threads=1))
    assert tensors(text, "input") == [
        ("label", "TYPE_INT64", "1", False),
        ("seed", "TYPE_INT64", "1", False),
        ("index", "TYPE_INT64", "1", True),
        ("guidance", "TYPE_FP32", "1", True),
        ("full", "TYPE_BOOL", "1", True),
    ]
    assert tensors(text, "output") == [("latent", "TYPE_FP32", "4, 8, 8", False), ("receipt", "TYPE_STRING", "1", False)]
    for line in (
        'name: "tiny"',
        'backend: "python"',
        "max_batch_size: 8",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        "  preferred_batch_size: [ 2, 4, 8 ]",
        "  max_queue_delay_microseconds: 2500",
        "  default_queue_policy { max_queue_size: 9 }",
        'parameters [ { key: "threads" value: { string_value: "1" } } ]',
    ):
        assert line in text.splitlines()


def test_pixels_are_an_output_where_there_are_any(unguided):
    made = [name for name, *_ in outputs_of(read_manifest(unguided))]
    assert made == ["image", "latent", "receipt"]


def test_conditions_have_their_names_and_shapes():
    given = inputs_of({"model": make_toy().signature("0" * 64).to_json()})
    assert given[:3] == [("kind", "TYPE_INT64", (1,), False), ("mood", "TYPE_FP32", (2, 3), False), ("seed", "TYPE_INT64", (1,), False)]


@pytest.mark.parametrize(
    ("provider", "group"),
    [("cpu", "{ count: 1 kind: KIND_CPU }"), ("cuda", "{ count: 1 }"), ("either", "{ count: 1 }")],
)
def test_an_instance_is_on_each_gpu_or_on_the_cpu(artefact, provider, group):
    """Without a kind Triton makes one on each GPU that it sees; the model itself refuses the CPU where CUDA was asked for."""
    text = config_of("tiny", read_manifest(artefact), Settings(provider))
    assert f"instance_group [ {group} ]" in text
    assert f'key: "provider" value: {{ string_value: "{provider}" }}' in text


def test_without_batching_rows_of_requests_stay_apart(artefact):
    text = config_of("tiny", read_manifest(artefact), Settings(batching=False))
    assert "dynamic_batching" not in text
    assert "max_batch_size: 16" in text


@pytest.mark.parametrize("most", range(1, 40))
def test_few_sizes_are_preferred_and_none_is_too_large(most):
    sizes = Settings(max_batch=most).preferred
    assert len(sizes) <= 3
    assert all(1 < size <= most for size in sizes)
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"provider": "tpu"}, "unknown provider 'tpu'"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"queue": 0}, "queue is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"delay_ms": -1.0}, "delay_ms is -1"),
        ({"delay_ms": float("nan")}, "delay_ms is nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(TokenCacheError, match=re.escape(said)):
        Settings(**wrong)


# The repository


def test_a_repository_links_to_artefacts_or_holds_copies(artefact, unguided, tmp_path):
    write_repository([artefact, unguided], tmp_path / "linked", Settings())
    write_repository([artefact, unguided], tmp_path / "copied", Settings(), copy=True)
    assert (tmp_path / "linked" / "tiny" / "1" / ARTEFACT).readlink() == artefact.resolve()
    assert not any(path.is_symlink() for path in (tmp_path / "copied").rglob("*"))
    assert tree(tmp_path / "copied" / "tiny" / "1" / ARTEFACT) == tree(artefact)
    for name in ("linked", "copied"):
        sampler = CachedSampler(tmp_path / name / "unguided" / "1" / ARTEFACT)
        assert sampler.sample([1]).images.tobytes() == CachedSampler(unguided).sample([1]).images.tobytes()


def test_a_copy_keeps_its_signature(artefact, tmp_path):
    shutil.copytree(artefact, tmp_path / "signed")
    (tmp_path / "signed" / "manifest.json.sig").write_text("{}", encoding="utf-8")
    write_repository([tmp_path / "signed"], tmp_path / "copied", Settings(), copy=True)
    assert (tmp_path / "copied" / "signed" / "1" / ARTEFACT / "manifest.json.sig").read_text(encoding="utf-8") == "{}"


def test_an_older_repository_is_replaced_whole(artefact, unguided, tmp_path):
    out = tmp_path / "repository"
    write_repository([artefact, unguided], out, Settings())
    write_repository([unguided], out, Settings(max_batch=3))
    assert sorted(path.name for path in out.iterdir()) == [MARK, "unguided"]
    assert "max_batch_size: 3" in (out / "unguided" / "config.pbtxt").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_a_damaged_artefact_leaves_the_older_repository_as_it_was(artefact, copied, tmp_path):
    out = tmp_path / "repository"
    write_repository([artefact], out, Settings())
    before = tree(out)
    (copied / "weights.data").write_bytes(b"short")
    with pytest.raises(ArtefactError, match=r"weights\.data has 5 bytes"):
        write_repository([artefact, copied], out, Settings())
    assert tree(out) == before


def test_a_full_disk_leaves_the_older_repository_as_it_was(artefact, tmp_path, monkeypatch):
    out = tmp_path / "repository"
    write_repository([artefact], out, Settings())
    before = tree(out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        write_repository([artefact], out, Settings(), copy=True)
    assert tree(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_what_was_not_written_here_is_not_touched(artefact, tmp_path):
    (mine := tmp_path / "mine").mkdir()
    (mine / "precious.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(TokenCacheError, match="no model repository that was written here"):
        write_repository([artefact], mine, Settings())
    (mine / "precious.txt").rename(tmp_path / "file")
    with pytest.raises(TokenCacheError, match="no model repository that was written here"):
        write_repository([artefact], tmp_path / "file", Settings())
    write_repository([artefact], mine, Settings())  # an empty folder is nobody's
    (mine / "other_model").mkdir()
    with pytest.raises(TokenCacheError, match="holds other_model, which was not written here"):
        write_repository([artefact], mine, Settings())
    (mine / "other_model").rmdir()
    (mine / MARK).write_text("{", encoding="utf-8")
    with pytest.raises(TokenCacheError, match=r"tc-lightning\.json is damaged"):
        write_repository([artefact], mine, Settings())
    assert (mine / "tiny" / "config.pbtxt").is_file()


def test_two_artefacts_of_one_name_are_refused(artefact, tmp_path):
    shutil.copytree(artefact, tmp_path / "other" / "tiny")
    with pytest.raises(TokenCacheError, match="would both be the model tiny: rename one"):
        write_repository([artefact, tmp_path / "other" / "tiny"], tmp_path / "repository", Settings())
    with pytest.raises(TokenCacheError, match="no artefact was given"):
        write_repository([], tmp_path / "repository", Settings())
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("place", [".", "inside", "..", "../.."])
def test_a_repository_and_an_artefact_do_not_hold_each_other(copied, place):
    with pytest.raises(TokenCacheError, match="lie one in the other"):
        write_repository([copied], copied / place, Settings())


@pytest.mark.parametrize("name", ["my model", "ü", ".hidden", "-x", "a+b", "a:b"])
def test_a_name_that_an_address_cannot_hold_is_refused(name):
    with pytest.raises(TokenCacheError, match="Rename the folder"):
        served_name(Path("artefacts") / name)


def test_a_name_is_that_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "dit.v2").mkdir()
    assert served_name(tmp_path / "dit.v2") == "dit.v2"
    (tmp_path / "link-3").symlink_to(tmp_path / "dit.v2")
    assert served_name(tmp_path / "link-3") == "link-3"
    monkeypatch.chdir(tmp_path / "dit.v2")
    assert served_name(Path(".")) == "dit.v2"
    (tmp_path / "dit.v2" / "sub").mkdir()
    assert served_name(Path("sub") / "..") == "dit.v2"


def test_the_command_needs_no_torch(artefact, tmp_path):
    done = call(tmp_path, "to_triton.py", artefact, "--copy", "--threads", 1, "--max-batch", 4, deployed=True)
    assert done.returncode == 0, done.stderr
    assert "model tiny: a copy of" in done.stdout
    assert json.loads((tmp_path / "model_repository" / MARK).read_text(encoding="utf-8")) == {"models": ["tiny"]}
    again = call(tmp_path, "to_triton.py", tmp_path, "--out", tmp_path / "other", deployed=True)
    is_one_paragraph(again, "lie one in the other")
    is_one_paragraph(call(tmp_path, "to_triton.py", tmp_path / "nothing", deployed=True), "does not exist")


# Within a server


def test_warming_up_runs_every_program_at_every_size(artefact, monkeypatch):
    """The sizes that come first are those whose CUDA graphs are kept."""
    sampler, sizes = CachedSampler(artefact, preload=False, max_batch=4), []
    take = sampler._pool.take
    monkeypatch.setattr(sampler._pool, "take", lambda key, layout: (sizes.append(key[0]), take(key, layout))[1])
    warm_up(sampler, [2, 4])
    assert sizes == [4, 2, 1, 3]
    programs = {sampler.graph_of(bound["program"]) for bound in sampler.manifest["schedule"]}
    assert programs <= set(sampler._loaded._sessions)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_free_memory_between_blocks_in_use_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytes(8000) for _ in range(8000)]  # 64 MB, of which every 50th stays
    kept = blocks[::50]
    del blocks
    before = resident()
    trim()
    assert before - resident() > 30e6
    assert len(kept) == 160


def test_a_server_that_is_not_there_is_said(tmp_path):
    is_one_paragraph(call(tmp_path, "triton_server.py", "nowhere"), "does not exist", "export/to_triton.py")
    (tmp_path / "repository").mkdir()
    if importlib.util.find_spec("pytriton") is None:
        is_one_paragraph(call(tmp_path, "triton_server.py", "repository"), "pip install nvidia-pytriton", "NVIDIA's container")
