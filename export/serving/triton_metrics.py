"""What a model counts, in Triton's own metrics, beside those that Triton keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGES, CACHED_STEPS, REFUSED = "tc_images_total", "tc_cached_steps_total", "tc_nan_refusals_total"
MILLISECONDS, PLACE = "tc_program_milliseconds_total", "tc_model_info"
COUNTED = {
    IMAGES: "Images made",
    CACHED_STEPS: "Sampling steps, of a batch each, that read the cache",
    REFUSED: "Rows whose latents or pixels became NaN or infinite",
    MILLISECONDS: "Milliseconds in a program, where they are measured (the CPU)",
}


class Metrics:
    """Counters of one instance of a model.

    Args:
        utils: the python backend's `triton_python_backend_utils`.
        labels: of all counters: the model, its version.
        said: what else is told of the model: where it really runs, which plan it is.
    """

    def __init__(self, utils: Any, labels: Mapping[str, str], said: Mapping[str, str]) -> None:
        kinds = utils.MetricFamily
        self._families = {name: kinds(name=name, description=told, kind=kinds.COUNTER) for name, told in COUNTED.items()}
        self._place = kinds(name=PLACE, description="Where a model runs, and what it is", kind=kinds.GAUGE)
        self._labels, self._metrics = dict(labels), dict[tuple[str, str], Any]()
        self._told = self._place.Metric(labels={**labels, **said})
        self._told.set(1)
        for name in (IMAGES, CACHED_STEPS, REFUSED):
            self._add(name, 0)

    def count(self, receipts: Sequence[Mapping[str, Any]], refused: int) -> None:
        """Count what ran for a batch.

        Args:
            receipts: of the images that were made. Those of the plan, which ran together, tell of one run; so do those of full compute.
            refused: rows that became NaN.
        """
        self._add(IMAGES, len(receipts))
        self._add(REFUSED, refused)
        for receipt in {receipt["full_compute"]: receipt for receipt in receipts}.values():
            self._add(CACHED_STEPS, receipt["steps_reading_cache"])
            for program, ms in (receipt["ms_per_program"] or {}).items():
                self._add(MILLISECONDS, ms, program)

    def _add(self, name: str, value: float, program: str = "") -> None:
        key = name, program
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels=self._labels | ({"program": program} if program else {}))
        self._metrics[key].increment(value)
