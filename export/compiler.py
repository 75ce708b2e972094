"""Compiles a plan and its teacher into an artefact: programs, graphs, weights, proof, and the manifest last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from export.emit import MODULATION_TABLE, Emitter, condition_times
from export.fidelity import Fidelity, measure
from export.folders import replacing_folder
from export.manifest import NAME, ArtefactError, read_manifest, write_manifest
from export.parity import Check, prove, require_parity, trajectory_error
from export.programs import LoweredPlan, Program, computed_tokens, lower
from export.runtime import CachedSampler
from export.weights import SELECTOR, External, place_weights, write_weights
from tc_lightning.content_predictor import Selector, require_selector
from tc_lightning.costs import cache_bytes_per_image, entry_dtype, entry_rows, entry_shape, halves_share, macs_speedup
from tc_lightning.dataflow import Entry
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.dit import DiT
from tc_lightning.plan import CachePlan
from tc_lightning.sampling import model_signature

WEIGHTS = "weights.data"
CONDITION_VALUES = 1 << 26  # modulation values held at a time (256 MiB in fp32); longer requests are conditioned in chunks

Report = Callable[[str], None]


def export_artefact(
    model: DiT,
    plan: CachePlan,
    out: Path,
    precision: str,
    provider: str,
    images: int,
    report: Report = print,
    selector: Selector | None = None,
) -> dict[str, Any]:
    """Write the artefact `out`, replacing an older one only when the new one is proved and complete.

    Args:
        model: the teacher.
        plan: a plan made for it.
        out: folder of the artefact.
        precision: fp32, fp16 or bf16.
        provider: provider that the proof runs on.
        images: images in the proof.
        report: called with a line for each stage.
        selector: the content predictor that the plan names, if it does.

    Returns:
        The manifest.

    Raises:
        PlanError: if the plan is for another model or content predictor.
        TokenCacheError: if `out` exists and is something else, the sampler is stochastic, or a weight does not fit the precision.
        ParityError: if the artefact disagrees with the torch reference; nothing is left under `out`.
    """
    plan.require_model(model_signature(model))
    require_selector(plan, selector)
    for table in (plan.sampler, plan.baseline):
        if table.stochastic:
            raise TokenCacheError(f"the sampler {table.name} adds noise at every step and cannot be exported: plan with ddim.")
    if precision == "bf16" and provider == "cpu":
        raise TokenCacheError(
            "bf16 cannot be proved on the CPU, which has no kernels for it: add --provider cuda, or take fp32 or fp16."
        )
    out = out.resolve()
    _require_replaceable(out)
    with replacing_folder(out) as folder:
        return _compile(model, plan, folder, precision, provider, images, report, selector)


def _compile(
    model: DiT,
    plan: CachePlan,
    folder: Path,
    precision: str,
    provider: str,
    images: int,
    report: Report,
    selector: Selector | None,
) -> dict[str, Any]:
    lowered = lower(plan, share_graphs=provider == "cpu")
    report(f"writing {WEIGHTS} and {len(lowered.programs) + 1} graphs in {precision}")
    manifest = write_unproved(model, plan, lowered, folder, precision, selector)
    sampler = CachedSampler(folder, provider, preload=False, manifest=manifest)
    sampler.session("condition")  # says at once if the provider cannot be used
    report(f"proving parity with torch on {images} images ({provider})")
    checks = prove(model, plan, lowered, sampler, images, selector=selector)
    require_parity(checks, precision, "No manifest was written. Try --precision fp32; if it fails there too, report it with the plan.")
    report(f"comparing with full compute on {images} images")
    fidelity = measure(sampler, images, max(1, images // 2), seed=1)
    sampler.release()
    manifest |= _measured(checks, fidelity, images, provider)
    write_manifest(folder, manifest)
    return manifest


def write_unproved(
    model: DiT, plan: CachePlan, lowered: LoweredPlan, folder: Path, precision: str, selector: Selector | None = None
) -> dict[str, Any]:
    """Write everything but the proof, and return what the manifest will say so far; nobody but the exporter should run this.

    Raises:
        ExportError: if the network does what has no ONNX form; nothing is written then.
    """
    require_selector(plan, selector)
    tensors = model.state_dict() | (selector_tensors(model, plan, selector) if plan.selector and selector else {})
    index = place_weights(tensors, precision)
    emitter = Emitter(plan, model, selector.predictor if selector else None, precision, WEIGHTS, index)
    graphs = {"condition": emitter.condition()} | {name: emitter.step(programs) for name, programs in lowered.graphs.items()}
    write_weights(tensors, folder / WEIGHTS, index)
    _write_graphs(graphs, folder)
    plan.save(folder / "plan.json")
    return _describe(model, plan, lowered, index, precision, graphs) | {"modulations": emitter.modulations}


@torch.no_grad()
def selector_tensors(model: DiT, plan: CachePlan, selector: Selector) -> dict[str, Tensor]:
    """What a weights file holds of a content predictor: all of it, and its adaLN terms at every step, which is what the graphs read."""
    terms = selector.predictor.modulation(model, torch.tensor([row.t for row in plan.sampler.steps]))
    weights = {f"{SELECTOR}.{name}": tensor for name, tensor in selector.predictor.state_dict().items()}
    return weights | {MODULATION_TABLE: torch.cat(terms, 1)}


def _write_graphs(graphs: dict[str, onnx.ModelProto], folder: Path) -> None:
    for name, graph in graphs.items():
        path = folder / f"{name}.onnx"
        onnx.save(graph, str(path))
        onnx.checker.check_model(str(path))


def _describe(
    model: DiT,
    plan: CachePlan,
    lowered: LoweredPlan,
    index: dict[str, External],
    precision: str,
    graphs: dict[str, onnx.ModelProto],
) -> dict[str, Any]:
    """What the runtime must know of the plan, and what a reader wants to."""
    return {
        "plan_digest": plan.digest,
        "plan_summary": plan.summary,
        "selector": plan.selector,
        "teacher": plan.model.teacher,
        "model": dataclasses.asdict(plan.model),
        "dit_config": dataclasses.asdict(model.config),
        "sampler": {"name": plan.sampler.name, "spacing": plan.sampler.spacing},
        "reference": {"name": plan.baseline.name, "spacing": plan.baseline.spacing},
        "guidance": dataclasses.asdict(plan.guidance),
        "steps": plan.num_steps,
        "full_steps": len(plan.baseline),
        "full_offset": condition_times(plan)[1],
        "precision": precision,
        "programs": {p.name: _interface(p, graphs[p.graph], plan) for p in lowered.programs},
        "condition": {"weights": _weights_of(graphs["condition"])},
        "schedule": [dataclasses.asdict(b) for b in lowered.bindings],
        "entries": {entry.name: _entry(entry, slots, plan, precision) for entry, slots in sorted(lowered.slots.items())},
        "condition_values": CONDITION_VALUES,
        "weights": {name: list(entry) for name, entry in index.items()},
        "macs_speedup": macs_speedup(plan),
        "cache_bytes_per_image": cache_bytes_per_image(plan, 4 if precision == "fp32" else 2),
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    }


def _entry(entry: Entry, slots: int, plan: CachePlan, precision: str) -> dict[str, Any]:
    """What the runtime allocates for an entry; `rows` is for one image."""
    shape, rows, dtype = entry_shape(plan, entry), entry_rows(plan, entry), entry_dtype(entry, precision)
    return {"shape": shape, "rows": rows, "dtype": dtype, "slots": slots}


def _interface(program: Program, graph: onnx.ModelProto, plan: CachePlan) -> dict[str, Any]:
    computed = sum(computed_tokens(s, plan.model.tokens, plan.model.block) for s in program.segments)
    return {
        "graph": program.graph,
        "guidance": program.guidance.mode if plan.guidance.doubles_batch else "cond",
        "inputs": [value.name for value in graph.graph.input],
        "outputs": [value.name for value in graph.graph.output],
        "blocks_x_tokens": computed * halves_share(program.guidance),
        "weights": _weights_of(graph),
    }


def _weights_of(graph: onnx.ModelProto) -> list[str]:
    return sorted(tensor.name for tensor in graph.graph.initializer if tensor.external_data)


def _measured(checks: list[Check], fidelity: Fidelity, images: int, provider: str) -> dict[str, Any]:
    programs = [{"where": c.where, "output": c.output, "rel_l2": c.rel_l2} for c in checks if c.where != "trajectory"]
    return {
        "parity": {"trajectory_rel_l2": trajectory_error(checks), "images": images, "provider": provider, "programs": programs},
        "fidelity": {
            "images": images,
            "provider": provider,
            "psnr_db": fidelity.psnr_db,
            "mse": fidelity.mse,
            "wall_speedup": fidelity.wall_speedup,
        },
    }


def _require_replaceable(out: Path) -> None:
    """Never put an artefact in place of something that is not one, or that holds files of someone else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        listed = {NAME, *read_manifest(out, check_files=False)["files"]}
        foreign = sorted(path.name for path in out.iterdir() if path.name not in listed)
    except (ArtefactError, OSError):
        foreign = ["no valid manifest"]
    if foreign:
        raise TokenCacheError(
            f"{out} exists and is not an artefact alone ({', '.join(foreign[:3])}): replacing it would lose that. Name another --out."
        )
