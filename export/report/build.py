"""Builds a report: targets, subjects, artefacts, rows, comparisons, pictures, page."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from export.compiler.weight_files import WeightFiles
from export.report import measure
from export.report.contenders import (
    REFERENCE,
    ROUNDED_UP,
    Contender,
    Missing,
    Policies,
    distinct,
    fewer_steps,
    fitted,
    planned,
    published,
    rounded_down,
)
from export.report.decoding import decoder_of
from export.report.judge import Judge, find_judge
from export.report.page import page
from export.report.pictures import draw
from export.report.rows import ReportRow, Ruler
from export.report.verdict import compare, headline, sentences
from tc_lightning.errors import TokenCacheError
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import macs_speedup
from tc_lightning.plan.given import PLANNING, REPORTING, part_for
from tc_lightning.rollout.evaluation import RolloutEvaluator
from tc_lightning.rollout.targets import TargetKey, Targets, cached_targets
from tc_lightning.runs.loaded import LoadedRun, planning_context

FORMAT_VERSION = 1
PLANNING_IMAGES = 4
NOTICE = "tc-lightning report"  # begins report.json: a folder without it is not a report, and is never replaced


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """What the user may choose.

    Args:
        budgets: speed-ups in MACs at which plans are compared; that of the run's own plan is always added.
        images: images that errors are measured on, at least 2.
        batch: images a request.
        seed: seed of those images; the next one is that of the images on which alternatives are tuned.
        most: plans of the planner's front that are measured.
        precision: of the artefacts.
        provider: of ONNX Runtime; torch's half runs on the same device, where it can.
        real: source of real images for the classifier, `module:function`.
        inception: Inception weights for FID.
        command: the command line, for the reader.
        pixels: whether the decoder of the teacher's pipeline, where it is one, makes pixels to be measured and shown.
    """

    budgets: tuple[float, ...]
    images: int
    batch: int
    seed: int
    most: int
    precision: str
    provider: str
    real: str | None
    inception: Path | None
    command: str
    pixels: bool = True


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Everything that was measured, before it is written up."""

    reference: ReportRow
    rows: list[ReportRow]
    failed: list[measure.Failed]
    missing: list[Missing]
    targets: Targets
    judge: Judge | None


def build_report(loaded: LoadedRun, settings: ReportSettings, policies: Policies, folder: Path) -> dict[str, Any]:
    """Measure, and write index.html, report.json and the pictures into an empty folder.

    Returns:
        What `report.json` holds.

    Raises:
        TokenCacheError: if the reference run itself cannot be exported, or something that was given cannot be used.
    """
    judge = find_judge(loaded.plan.model, settings.real)  # what was given is tried before anything takes time
    settings = dataclasses.replace(settings, budgets=_with_own(loaded.plan, settings.budgets))
    reference = loaded.reference
    targets = _targets(loaded, reference, settings.seed, settings.images, "reference run and converged ODE", REPORTING)
    with decoder_of(loaded, settings.provider, settings.pixels) as decoder:
        ruler = Ruler(loaded.model, targets, loaded.plan.model.output, judge, settings.inception, decoder)
        subjects, missing = _subjects(loaded, reference, settings, policies)
        measured = _measure(loaded, subjects, missing, settings, ruler, targets)
    report = _report(loaded, settings, measured)
    pictures = draw(folder, loaded.scores, measured.reference, measured.rows, ruler.reference_seen, settings.budgets)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(page(report, pictures), encoding="utf-8")
    return report


def _with_own(plan: CachePlan, budgets: Sequence[float]) -> tuple[float, ...]:
    """The budgets, and the speed-up of the run's own plan: wherever it is, there is something to compare it with."""
    own = rounded_down(macs_speedup(plan))
    return tuple(sorted({*budgets, *([own] if own >= ROUNDED_UP else [])}))


def _targets(loaded: LoadedRun, reference: CachePlan, seed: int, images: int, name: str, use: str) -> Targets:
    schedule, examples = loaded.model.schedule, part_for(loaded.model.examples, use)
    key = TargetKey(reference.model, schedule, reference.sampler, reference.guidance, seed, images, examples=examples)
    with tqdm(total=key.image_steps, desc=name, unit="step") as bar:
        return cached_targets(loaded.model, key, loaded.run.folder / "targets", bar.update)


def _subjects(
    loaded: LoadedRun, reference: CachePlan, settings: ReportSettings, policies: Policies
) -> tuple[list[Contender], list[Missing]]:
    """All plans, the reference first."""
    tuning = _targets(loaded, reference, settings.seed + 1, PLANNING_IMAGES, "the same, for tuning alternatives", PLANNING)
    context = planning_context(loaded, tuning)
    known = [Contender("reference run", REFERENCE, "reference", reference, 1.0)]
    known += planned(reference, loaded.plan, loaded.run.folder, settings.budgets, settings.most)
    with _progress("fewer steps", "plan", None) as tell:
        known += fewer_steps(loaded.model.schedule, reference, settings.budgets, _judge_plan(loaded, tuning, tell))
        twins = list(fitted(context, reference, loaded.run.folder, settings.budgets, tell))
        known += [one for one in twins if isinstance(one, Contender)]
    with _progress("published methods", "plan", None) as tell:
        others, missing = published(context, reference, settings.budgets, policies, tell)
    return distinct([*known, *others]), [*missing, *(one for one in twins if isinstance(one, Missing))]


def _judge_plan(loaded: LoadedRun, tuning: Targets, tell: Callable[[str], None]) -> Callable[[CachePlan], float]:
    """Error against the converged ODE; published methods choose by their own error, against the reference run."""
    evaluate = RolloutEvaluator(loaded.model, tuning.x_T, tuning.given, tuning.ode)

    def error(plan: CachePlan) -> float:
        tell(f"{plan.sampler.name} {plan.sampler.spacing}, {plan.num_steps} steps")
        return evaluate(plan)

    return error


def _measure(
    loaded: LoadedRun, subjects: Sequence[Contender], missing: list[Missing], settings: ReportSettings, ruler: Ruler, targets: Targets
) -> Measurements:
    requests = measure.Requests(settings.seed, settings.images, settings.batch)
    with tempfile.TemporaryDirectory(prefix="tc-report-") as workshop:
        exported = []
        weights = WeightFiles(loaded.model, settings.precision, Path(workshop), loaded.companions)
        with _progress("export and parity", "plan", len(subjects)) as tell:
            for j, subject in enumerate(subjects):
                tell(subject.name)
                exported.append(measure.export(weights, subject, Path(workshop) / str(j), settings.provider, settings.batch))
                _require_reference(exported)
        artefacts = [e for e in exported if isinstance(e, measure.ContenderArtefact)]
        failed = [e for e in exported if isinstance(e, measure.Failed)]
        with _progress("timing, in turns", "request", len(artefacts) * len(requests.parts)) as tell:
            made = measure.make_in_turns(artefacts, requests, part_for(loaded.model.examples, REPORTING), tell)
    failed += [m for m in made if isinstance(m, measure.Failed)]
    _require_reference(made)
    finished = [(a, m) for a, m in zip(artefacts, made, strict=True) if isinstance(m, measure.Made)]
    reference_ms = finished[0][1].ms
    rows = [ruler.row(a, m, reference_ms) for a, m in tqdm(finished, "figures", unit="plan")]
    return Measurements(rows[0], rows[1:], failed, missing, targets, ruler.judge)


def _require_reference(results: Sequence[object]) -> None:
    """There is nothing to compare with if the first of all plans, the reference run, failed."""
    if isinstance(results[0], measure.Failed):
        raise TokenCacheError(f"the reference run itself cannot be measured: {results[0].reason}")


def _report(loaded: LoadedRun, settings: ReportSettings, measured: Measurements) -> dict[str, Any]:
    comparisons = compare(measured.rows, measured.reference, settings.budgets)
    told = sentences(comparisons, len(measured.missing), len(measured.failed), settings.images)
    return {
        "what": NOTICE,
        "format_version": FORMAT_VERSION,
        "run": loaded.run.name,
        "run_folder": str(loaded.run.folder),
        "teacher": {"weights": str(loaded.run.teacher.weights), "sha256": loaded.plan.model.teacher},
        "model": loaded.plan.model.to_json() | {"branches": loaded.plan.model.branches},
        "guidance": dataclasses.asdict(loaded.plan.guidance),
        "headline": headline(comparisons),
        "sentences": told,
        "comparisons": [c.to_json() for c in comparisons],
        "reference": measured.reference.figures,
        "rows": [row.figures for row in measured.rows],
        "failed": [{"name": f.subject.name, "group": f.subject.group, "reason": f.reason} for f in measured.failed],
        "missing": [dataclasses.asdict(m) for m in measured.missing],
        "classifier_held_out_accuracy": None if measured.judge is None else measured.judge.held_out,
        "settings": _plain(settings),
        "environment": environment(settings.provider),
    }


def environment(provider: str) -> dict[str, Any]:
    """Versions and hardware that the figures depend on."""
    import onnx
    import onnxruntime
    import torchmetrics

    device = torch.cuda.get_device_name() if provider == "cuda" and torch.cuda.is_available() else _cpu_name()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torchmetrics": torchmetrics.__version__,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def _plain(settings: ReportSettings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    return values | {"budgets": list(settings.budgets), "inception": None if settings.inception is None else str(settings.inception)}


@contextlib.contextmanager
def _progress(title: str, unit: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar that is told the name of what begins."""
    with tqdm(total=total, desc=title, unit=unit) as bar:

        def tell(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield tell
