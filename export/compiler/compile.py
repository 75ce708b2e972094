"""Compiles a plan and its teacher into an artefact: programs, graphs, weights, proof, and the manifest last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from export.compiler.decoder import require_decodable, write_decoder
from export.compiler.emit import Emitter
from export.compiler.fidelity import PIXEL_IMAGES, Fidelity, PixelFidelity, measure, measure_pixels
from export.compiler.parity import Check, prove, require_parity, trajectory_error
from export.compiler.symbolic import IR_VERSION, ONNXRUNTIME, OPSET
from export.compiler.weight_files import WeightFiles, tensors_of
from export.compiler.weights import External, place_weights, write_weights
from export.folders import replacing_folder
from export.runtime.contract import condition_declared, declared, planned
from export.runtime.layout import DECODER
from export.runtime.manifest import NAME, NULLS, WEIGHTS, ArtefactError, read_manifest, write_manifest
from export.runtime.onnx_header import Header, read_header
from export.runtime.programs import LoweredPlan, lower
from export.runtime.sampler import CachedSampler
from tc_lightning.errors import TokenCacheError
from tc_lightning.models.checkpoints.pipeline import Vae
from tc_lightning.models.companions import NO_COMPANIONS, Companions
from tc_lightning.models.conditions import require_null
from tc_lightning.models.families import own_schedule
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.given import REPORTING, part_for
from tc_lightning.plan.nulls import nulls_needed
from tc_lightning.plan.rows_file import write_arrays
from tc_lightning.rollout.sampling import model_signature

CONDITION_VALUES = 1 << 26  # modulation values held at a time (256 MiB in fp32); longer requests are conditioned in chunks

Report = Callable[[str], None]


def export_artefact(
    model: Network,
    plan: CachePlan,
    out: Path,
    precision: str,
    provider: str,
    images: int,
    report: Report = print,
    companions: Companions = NO_COMPANIONS,
    vae: Vae | None = None,
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
        companions: the networks that the plan names.
        vae: where the decoder of the model's latents is; None for an artefact of latents alone, or a model of pixels.

    Returns:
        The manifest.

    Raises:
        PlanError: if the plan is for another model, or names a network that is not among the companions.
        TeacherError: if the plan is guided and a condition of the model has no null value, or the VAE is not one of its latents.
        TokenCacheError: if `out` exists and is something else, the sampler is stochastic, or a weight does not fit the precision.
        ParityError: if the artefact disagrees with the torch reference; nothing is left under `out`.
    """
    plan.require_model(model_signature(model))
    require_null(model.conditions, plan.guidance, model.nulls)
    companions.named_by(plan)
    if vae is not None:
        require_decodable(vae, plan.model)
    for table in (plan.sampler, plan.reference):
        if table.stochastic:
            raise TokenCacheError(f"the sampler {table.name} adds noise at every step and cannot be exported: plan with ddim.")
    if precision == "bf16" and provider == "cpu":
        raise TokenCacheError(
            "bf16 cannot be proved on the CPU, which has no kernels for it: add --provider cuda, or take fp32 or fp16."
        )
    out = out.resolve()
    _require_replaceable(out)
    with replacing_folder(out) as folder:
        return _compile(model, plan, folder, precision, provider, images, report, companions, vae)


def _compile(
    model: Network,
    plan: CachePlan,
    folder: Path,
    precision: str,
    provider: str,
    images: int,
    report: Report,
    companions: Companions,
    vae: Vae | None,
) -> dict[str, Any]:
    lowered = lower(plan, provider)
    report(f"writing {WEIGHTS} and {len(lowered.programs) + 1} graphs in {precision}")
    manifest = write_unproved(model, plan, lowered, folder, precision, companions)
    if vae is not None:
        report(f"writing {DECODER}.onnx in fp32 from {vae.folder}")
        manifest |= {DECODER: write_decoder(vae, plan.model.latent, folder, provider)}
    sampler = CachedSampler(folder, provider, preload=False, manifest=manifest)
    sampler.session("condition")  # says at once if the provider cannot be used
    report(f"proving parity with torch on {images} images ({provider})")
    checks = prove(model, plan, lowered, sampler, images, companions=companions)
    require_parity(checks, precision, "No manifest was written. Try --precision fp32; if it fails there too, report it with the plan.")
    report(f"comparing with full compute on {images} images")
    fidelity = measure(sampler, images, max(1, images // 2), seed=1, examples=part_for(model.examples, REPORTING))
    seen = measure_pixels(sampler, fidelity, PIXEL_IMAGES)
    sampler.release()
    manifest |= _measured(checks, fidelity, seen, images, provider)
    write_manifest(folder, manifest)
    return manifest


def write_unproved(
    model: Network, plan: CachePlan, lowered: LoweredPlan, folder: Path, precision: str, companions: Companions = NO_COMPANIONS
) -> dict[str, Any]:
    """Write everything but the proof, and return what the manifest will say so far; nobody but the exporter should run this.

    Raises:
        ExportError: if the network does what has no ONNX form; nothing is written then.
    """
    tensors = tensors_of(model, plan, companions)
    index = place_weights(tensors, precision)
    graphs = _emit(model, plan, lowered, precision, index, companions)
    write_weights(tensors, folder / WEIGHTS, index)
    manifest = _write_around(graphs, index, model, plan, lowered, folder, precision)
    for path in sorted(folder.glob("*.onnx")):
        onnx.checker.check_model(str(path))
    return manifest


def write_sharing(weights: WeightFiles, plan: CachePlan, lowered: LoweredPlan, folder: Path) -> None:
    """Write an artefact with its manifest, but without a proof, for measurements: its weights are those that others have, too.

    Its graphs are checked by ONNX Runtime, which loads them: onnx's own checker refuses weights that have several links.
    """
    index, listing = weights.link(plan, folder)
    graphs = _emit(weights.model, plan, lowered, weights.precision, index, weights.companions)
    content = _write_around(graphs, index, weights.model, plan, lowered, folder, weights.precision)
    write_manifest(folder, content, known={WEIGHTS: listing})


def _emit(
    model: Network, plan: CachePlan, lowered: LoweredPlan, precision: str, index: dict[str, External], companions: Companions
) -> dict[str, onnx.ModelProto]:
    """The graphs by file stem; the views of weights that they take are added to the index."""
    emitter = Emitter(plan, model, companions.named_by(plan), precision, WEIGHTS, index)
    return {"condition": emitter.condition()} | {name: emitter.step(programs) for name, programs in lowered.graphs.items()}


def _write_around(
    graphs: dict[str, onnx.ModelProto],
    index: dict[str, External],
    model: Network,
    plan: CachePlan,
    lowered: LoweredPlan,
    folder: Path,
    precision: str,
) -> dict[str, Any]:
    """Write the graphs, the plan and null values beside a weights file, and return what the manifest will say of it all."""
    headers = _write_graphs(graphs, folder)
    plan.save(folder / "plan.json")
    if nulls_needed(plan.model.conditions, plan.guidance):
        write_arrays(folder / NULLS, model.nulls or {})
    return _describe(model, plan, lowered, index, precision, headers)


def _write_graphs(graphs: dict[str, onnx.ModelProto], folder: Path) -> dict[str, Header]:
    for name, graph in graphs.items():
        onnx.save(graph, str(folder / f"{name}.onnx"))
    return {name: read_header(folder / f"{name}.onnx") for name in graphs}


def _describe(
    model: Network,
    plan: CachePlan,
    lowered: LoweredPlan,
    index: dict[str, External],
    precision: str,
    graphs: dict[str, Header],
) -> dict[str, Any]:
    """What the runtime must know of the plan, and what a reader wants to."""
    described = planned(plan, lowered, precision)
    programs = {name: entry | declared(graphs[entry["graph"]]) for name, entry in described["programs"].items()}
    return {
        **described,
        "programs": programs,
        **condition_declared(graphs["condition"]),
        "condition_values": CONDITION_VALUES,
        "network": _network(model),
        "precision": precision,
        "weights": {name: list(entry) for name, entry in index.items()},
        "needs": {"onnxruntime": ONNXRUNTIME, "opset": OPSET, "ir_version": IR_VERSION},
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    }


def _network(model: Network) -> dict[str, Any]:
    """What makes the network again: its family, its shape, and its schedule where that is not the family's."""
    schedule = own_schedule(model)
    told = {"family": model.family, "config": dataclasses.asdict(model.config)}
    return told if schedule is None else told | {"schedule": schedule}


def _measured(checks: list[Check], fidelity: Fidelity, seen: PixelFidelity | None, images: int, provider: str) -> dict[str, Any]:
    programs = [{"where": c.where, "output": c.output, "rel_l2": c.rel_l2} for c in checks if c.where != "trajectory"]
    return {
        "parity": {"trajectory_rel_l2": trajectory_error(checks), "images": images, "provider": provider, "programs": programs},
        "fidelity": {
            "images": images,
            "provider": provider,
            "psnr_db": fidelity.psnr_db,
            "mse": fidelity.mse,
            "wall_speedup": fidelity.wall_speedup,
        }
        | ({} if seen is None else {"pixels": dataclasses.asdict(seen)}),
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
