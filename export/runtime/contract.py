"""What a manifest has to say, given the plan and the graphs beside it: the compiler writes it, and the runtime asks for it.

Nothing that the runtime goes by is taken on trust. What follows from the plan is derived again, what graphs declare is read from them,
and the rest is checked. Needs neither torch nor onnx nor onnxruntime.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from export.runtime.decoder_contract import DATA, require_decoder
from export.runtime.layout import BYTES, CONDITION, CONSTANT, DECODER, ELEMENT_TYPES, FULL
from export.runtime.manifest import AGAIN, NAME, NULLS, PLAN, WEIGHTS, ArtefactError, read_manifest, require_files
from export.runtime.onnx_header import Header, read_header
from export.runtime.programs import LoweredPlan, Program, computed_tokens, condition_times, lower
from tc_lightning.errors import PlanError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image, entry_dtype, entry_rows, entry_shape, halves_share, macs_speedup
from tc_lightning.plan.dataflow import Entry
from tc_lightning.plan.nulls import nulls_needed

PRECISIONS = ("fp32", "fp16", "bf16")
_MOST = 2**53  # beyond it JSON's numbers are not integers any more


def planned(plan: CachePlan, lowered: LoweredPlan, precision: str) -> dict[str, Any]:
    """What a manifest says that follows from plan, lowering and precision; of programs, all but what their graphs declare."""
    return {
        "plan_digest": plan.digest,
        "plan_summary": plan.summary,
        "plan_in_words": plan.in_words,
        "fit": _fit(plan),
        "selector": plan.selector,
        "corrector": plan.corrector,
        "teacher": plan.model.teacher,
        "model": plan.model.to_json() | {"branches": plan.model.branches},
        "sampler": {"name": plan.sampler.name, "spacing": plan.sampler.spacing},
        "reference": {"name": plan.reference.name, "spacing": plan.reference.spacing},
        "guidance": dataclasses.asdict(plan.guidance),
        "steps": plan.num_steps,
        "full_steps": len(plan.reference),
        "full_offset": condition_times(plan)[1],
        "programs": {program.name: _program(program, plan) for program in lowered.programs},
        "schedule": [dataclasses.asdict(binding) for binding in lowered.bindings],
        "entries": {entry.name: _entry(entry, slots, plan, precision) for entry, slots in sorted(lowered.slots.items())},
        "macs_speedup": macs_speedup(plan),
        "cache_bytes_per_image": cache_bytes_per_image(plan, BYTES[precision]),
    }


def condition_declared(header: Header) -> dict[str, Any]:
    """What a manifest says that the condition graph declares: its weights, how many terms it writes for each step and row, and the
    shape of each constant for one row."""
    terms = header.sizes.get("mods", ())[2:3]
    constants = {name: list(header.sizes[name][1:]) for name in header.outputs if name.startswith(CONSTANT)}
    return {CONDITION: {"weights": declared(header)["weights"]}, "modulations": sum(terms), "constants": constants}


def declared(header: Header) -> dict[str, Any]:
    """What a manifest says of a program that its graph declares."""
    return {"inputs": header.inputs, "outputs": header.outputs, "weights": sorted(header.weights)}


def _program(program: Program, plan: CachePlan) -> dict[str, Any]:
    computed = sum(computed_tokens(s, plan.model.tokens, plan.model.block) for s in program.segments)
    return {
        "graph": program.graph,
        "guidance": program.guidance.mode if plan.guidance.doubles_batch else "cond",
        "blocks_x_tokens": computed * halves_share(program.guidance),
    }


def _entry(entry: Entry, slots: int, plan: CachePlan, precision: str) -> dict[str, Any]:
    """What the runtime allocates for an entry; `rows` is for one image."""
    shape, rows, dtype = entry_shape(plan, entry), entry_rows(plan, entry), entry_dtype(entry, precision)
    return {"shape": shape, "rows": rows, "dtype": dtype, "slots": slots}


def read_artefact(folder: Path, onnxruntime: str) -> dict[str, Any]:
    """The manifest of an artefact that is whole, consistent, and for this version of ONNX Runtime, the one that is installed.

    Raises:
        ArtefactError: if it is not.
    """
    manifest = read_manifest(folder, check_files=False)
    require_onnxruntime(folder, manifest, onnxruntime)
    require_files(folder, manifest)
    try:
        plan = CachePlan.load(folder / PLAN)
        graphs = {path.stem: read_header(path) for path in (folder / name for name in manifest["files"]) if path.suffix == ".onnx"}
    except PlanError as error:
        raise ArtefactError(f"the artefact {folder} cannot be used: {error} {AGAIN}") from error
    except ValueError as error:
        raise ArtefactError(f"a graph of the artefact {folder} cannot be read: {error}. {AGAIN}") from error
    require_consistent(folder / NAME, manifest, plan, graphs)
    return manifest


def graph_file(folder: Path, manifest: Mapping[str, Any], stem: str) -> Path:
    """The file of a graph, which is still what the manifest says: sessions are opened long after an artefact was checked.

    Raises:
        ArtefactError: if the file, or the decoder's weights beside it, was changed meanwhile.
    """
    own = {f"{stem}.onnx", *([DATA] if stem == DECODER else [])}
    require_files(folder, {"files": {name: said for name, said in manifest.get("files", {}).items() if name in own}})
    return folder / f"{stem}.onnx"


def require_onnxruntime(folder: Path, manifest: Mapping[str, Any], found: str) -> None:
    """Check that a version of ONNX Runtime knows what the graphs of an artefact use.

    Raises:
        ArtefactError: naming both versions.
    """
    needs = manifest.get("needs")
    wanted = needs.get("onnxruntime") if isinstance(needs, dict) else None
    if not isinstance(wanted, str) or not re.fullmatch(r"\d{1,9}(\.\d{1,9}){1,2}", wanted):
        raise ArtefactError(f"{folder / NAME} is damaged: it does not say which onnxruntime it needs. {AGAIN}")
    if _release(found) < _release(wanted):
        raise ArtefactError(
            f"the artefact {folder} needs onnxruntime >= {wanted}, found {found}: update it here "
            f"(`pip install 'onnxruntime-gpu>={wanted}'`), or export with a version of this package that is as old."
        )


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (1, 24, 2) of `1.24.2.dev20260101`."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def require_consistent(path: Path, manifest: dict[str, Any], plan: CachePlan, graphs: Mapping[str, Header]) -> None:
    """Check all that is said against the plan, the graphs by file stem, and the sizes of the files.

    Raises:
        ArtefactError: naming the first thing that is not as it must be.
    """
    precision = manifest["precision"]
    if not isinstance(precision, str) or precision not in PRECISIONS:
        _fail(path, f"precision is {precision!r}, not one of {', '.join(PRECISIONS)}")
    programs = manifest["programs"]
    shared = any(program["graph"] != name for name, program in programs.items())
    expected = planned(plan, lower(plan, "cpu" if shared else "cuda"), precision)
    for program in expected["programs"].values():
        program |= declared(_graph(path, graphs, program["graph"]))
    expected |= condition_declared(_graph(path, graphs, CONDITION))
    for key, value in expected.items():
        if _canonical(manifest.get(key)) != _canonical(value):
            _fail(path, f"{key} is not what follows from the plan and the graphs beside it")
    for key in ("condition_values", "modulations"):
        if not _is_int(manifest[key], 1):
            _fail(path, f"{key} is {manifest[key]!r}; a positive integer was expected")
    if nulls_needed(plan.model.conditions, plan.guidance) and NULLS not in manifest["files"]:
        _fail(path, f"the plan is guided, a null value is stored, and it lists no {NULLS}")
    _check_network(path, manifest["network"], plan.model.family)
    require_decoder(path, manifest, graphs)
    _check_weights(path, manifest["weights"], precision, manifest["files"][WEIGHTS]["bytes"])
    for stem in {FULL, CONDITION, *(program["graph"] for program in programs.values())}:
        _check_graph(path, stem, graphs[stem], manifest["weights"])
    for key in ("versions", "parity", "fidelity"):
        if not isinstance(manifest.get(key, {}), dict):
            _fail(path, f"{key} must be an object")


def _fit(plan: CachePlan) -> dict[str, Any] | None:
    """What the sampler's coefficients were fitted at and on, where the plan says so."""
    said = plan.provenance.get("fit")
    if not isinstance(said, dict) or not isinstance(said.get("guidance"), int | float) or not isinstance(said.get("labels"), list):
        return None
    return {"guidance": said["guidance"], "labels": [label for label in said["labels"] if type(label) is int]}


def _graph(path: Path, graphs: Mapping[str, Header], stem: str) -> Header:
    if stem not in graphs:
        _fail(path, f"the plan needs a graph {stem}.onnx, and it lists none")
    return graphs[stem]


def _check_network(path: Path, network: Any, family: str) -> None:
    """The network is of the plan's family, and has a shape of plain values and so, where it is not the family's, a schedule; what they
    mean the family knows, where it is rebuilt."""
    if not isinstance(network, dict) or {*network, "schedule"} != {"family", "config", "schedule"}:
        _fail(path, "network must be an object with family and config, and a schedule where it is not the family's")
    if network["family"] != family:
        _fail(path, f"network is of the family {network['family']!r}, and the plan was made for {family!r}")
    for part in sorted(network.keys() - {"family"}):
        if not isinstance(network[part], dict):
            _fail(path, f"network.{part} must be an object")
        for name, value in network[part].items():
            if type(value) not in (bool, int, float, str) or (type(value) in (int, float) and not abs(value) < _MOST):
                _fail(path, f"network.{part}.{name} is {value!r}; a plain value was expected")


def _check_weights(path: Path, weights: Any, precision: str, size: int) -> None:
    """Every entry is [precision, shape, offset, bytes], and lies within the file."""
    if not isinstance(weights, dict):
        _fail(path, "weights must be an object")
    for name, entry in weights.items():
        if not isinstance(entry, list) or len(entry) != 4 or entry[0] != precision or not isinstance(entry[1], list):
            _fail(path, f"weight {name} must be [{precision}, shape, offset, bytes]")
        dims, place = entry[1], entry[2:]
        if not all(_is_int(value, 1) for value in dims) or not all(_is_int(value, 0) for value in place):
            _fail(path, f"weight {name} has a shape, an offset or a size that is no such thing")
        if math.prod(dims) * BYTES[precision] != place[1] or sum(place) > size:
            _fail(path, f"weight {name} has {place[1]} bytes from {place[0]}: not those of its shape, or beyond the end of {WEIGHTS}")


def _check_graph(path: Path, stem: str, header: Header, weights: Mapping[str, Any]) -> None:
    """Every weight of a graph is where the manifest says."""
    for name, weight in header.weights.items():
        dtype, shape, offset, nbytes = weights.get(name, (None, (), 0, 0))
        found = (ELEMENT_TYPES.get(dtype), tuple(shape), WEIGHTS, offset, nbytes)
        if found != tuple(weight):
            _fail(path, f"weight {name} is not what the graph {stem} takes it for")


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < _MOST


def _canonical(value: Any) -> str:
    """JSON that differs wherever values do: 1, 1.0 and true are equal to Python."""
    return json.dumps(value, sort_keys=True)


def _fail(path: Path, reason: str) -> NoReturn:
    raise ArtefactError(f"{path} is damaged: {reason}. {AGAIN}")
