"""What a plan takes on the clock here: the milliseconds of its programs, each measured once, whatever plan it came with.

Two plans that do the same in a step (segments, forecasts, halves of guidance) run the same program, so that a search over hundreds of
plans times a handful of programs.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import weakref
from pathlib import Path

from export.compiler.compile import write_sharing
from export.compiler.weight_files import WeightFiles
from export.runtime.manifest import read_manifest
from export.runtime.programs import FULL, LoweredPlan, Program, lower
from export.runtime.sampler import CachedSampler
from tc_lightning.models.content_predictor import Selector
from tc_lightning.models.network import Network
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.given import Arrays, drawn

ROUNDS = 3  # requests that are timed, after one that warms up; their median counts


class ProgramClock:
    """Measures plans of one model: plan -> (milliseconds an image of all its steps, of one full step of the reference).

    Args:
        model: the teacher.
        provider: `cpu` or `cuda`.
        batch: images at a time.
        precision: fp32, fp16 or bf16.
        selector: the content predictor that plans may name.

    Raises:
        RuntimeUnavailableError: if the provider cannot be used.
    """

    def __init__(
        self, model: Network, provider: str = "cpu", batch: int = 8, precision: str = "fp32", selector: Selector | None = None
    ) -> None:
        self.provider, self.batch, self.examples = provider, batch, model.examples
        folder = Path(tempfile.mkdtemp(prefix="tc-clock-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._weights = WeightFiles(model, precision, folder, selector)
        self._known: dict[tuple[object, ...], float] = {}

    def __call__(self, plan: CachePlan) -> tuple[float, float]:
        """See the class."""
        lowered = lower(plan, self.provider)
        keys = {program.name: _key(program, len(lowered.graphs[program.graph]) > 1) for program in lowered.programs}
        if not all(key in self._known for key in keys.values()):
            self._measure(plan, lowered, keys)
        steps = sum(self._known[keys[bound.program]] for bound in lowered.bindings)
        return steps, self._known[keys[FULL]]

    def _measure(self, plan: CachePlan, lowered: LoweredPlan, keys: dict[str, tuple[object, ...]]) -> None:
        """Time every program of the plan that is not known, in requests of the plan and of full compute."""
        with tempfile.TemporaryDirectory(dir=self._weights.folder) as folder:
            path = Path(folder)
            write_sharing(self._weights, plan, lowered, path)
            manifest = read_manifest(path, check_files=False)
            sampler = CachedSampler(path, self.provider, max_batch=self.batch, manifest=manifest)
            given = drawn(plan.model.conditions, 0, range(self.batch), self.examples)
            runs = [self._times(sampler, given) for _ in range(ROUNDS + 1)][1:]
        for name, key in keys.items():
            if name in runs[0]:
                self._known.setdefault(key, statistics.median(run[name] for run in runs) / self.batch)

    def _times(self, sampler: CachedSampler, given: Arrays) -> dict[str, float]:
        """Milliseconds of one run of each program."""
        spent: dict[str, float] = {}
        for full in (True, False):
            receipt = sampler.sample(conditions=given, full=full, timing=True).receipt
            spent |= {name: receipt["ms_per_program"][name] / runs for name, runs in receipt["steps_per_program"].items()}
        return spent


def _key(program: Program, shared: bool) -> tuple[object, ...]:
    """What two programs that take the same time have in common."""
    shapes = tuple(s.outline for s in program.segments)
    return (shapes, program.guidance.outline, tuple(sorted(entry.kind for entry in program.writes)), program.name == FULL, shared)
