"""Images a GPU makes in an hour, on paper: multiply-accumulates over the arithmetic that it is assumed to reach.

Counted is the network alone: no encoder of texts, no decoder of latents, no time in which a GPU waits for requests. A plan that needs a
third of the MACs is taken to need a third of the time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tc_lightning.errors import TokenCacheError

FLOP_OF_A_MAC = 2
HOUR_S = 3600.0
H100_TFLOPS = 989.0  # H100 SXM, bf16, dense, from NVIDIA's data sheet
ASSUMED_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a network's image takes at full compute.

    Args:
        name: for the table.
        step_macs: MACs of a full step for one sample (`tc_lightning.plan.costs.full_step_macs`).
        steps: sampling steps of an image.
        doubled: whether guidance makes two samples of an image.

    Raises:
        TokenCacheError: if MACs or steps are not possible.
    """

    name: str
    step_macs: float
    steps: int
    doubled: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.step_macs < math.inf:
            raise TokenCacheError(f"{self.name}: {self.step_macs} MACs a step cannot be: give a number above 0.")
        if self.steps < 1:
            raise TokenCacheError(f"{self.name}: {self.steps} steps cannot be: give 1 or more.")

    @property
    def image_flop(self) -> float:
        """Floating-point operations of an image at full compute."""
        return FLOP_OF_A_MAC * self.step_macs * self.steps * (2 if self.doubled else 1)


RELEASED = (
    Shape("DiT-XL/2 256", 118_621_421_568, 50),
    Shape("DiT-XL/2 512", 524_538_298_368, 50),
    Shape("PixArt-XL/2 512", 608_349_339_648, 20),
    Shape("SD3-medium 1024", 4_444_757_308_416, 28),
)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the arithmetic of a GPU is assumed to reach.

    Args:
        peak_tflops: its stated peak.
        share: of the peak that is reached, above 0 and at most 1.

    Raises:
        TokenCacheError: if a field is not possible.
    """

    peak_tflops: float = H100_TFLOPS
    share: float = ASSUMED_SHARE

    def __post_init__(self) -> None:
        if not 0 < self.peak_tflops < math.inf:
            raise TokenCacheError(f"a peak of {self.peak_tflops} TFLOP/s cannot be: give a number above 0.")
        if not 0 < self.share <= 1:
            raise TokenCacheError(f"a share of {self.share} of the peak cannot be reached: give a number above 0 and at most 1.")


def images_an_hour(shape: Shape, gpu: Gpu, speedup: float = 1.0) -> float:
    """Images of a shape that a GPU makes in an hour.

    Args:
        shape: of the network.
        gpu: which makes them.
        speedup: MACs of full compute over those of the plan.

    Raises:
        TokenCacheError: if the speed-up is not possible.
    """
    if not 1 <= speedup < math.inf:
        raise TokenCacheError(f"a speed-up of {speedup} cannot be: full compute is 1, and a plan needs no more than that.")
    return HOUR_S * speedup * gpu.peak_tflops * 1e12 * gpu.share / shape.image_flop


def rounded(images: float) -> str:
    """To three digits: no more of them mean anything on paper."""
    return f"{float(f'{images:.3g}'):,.0f}" if images >= 100 else f"{images:.3g}"


def paper_table(shapes: Sequence[Shape], gpu: Gpu, speedups: Sequence[float]) -> str:
    """Images a GPU-hour of shapes at full compute and at speed-ups in MACs, in Markdown."""
    head = ("", "TMACs a step", "steps", "samples a step", "full compute", *(f"{speedup:g}x" for speedup in speedups))
    rows = [
        (
            shape.name,
            f"{shape.step_macs / 1e12:.3f}",
            str(shape.steps),
            "2" if shape.doubled else "1",
            *(rounded(images_an_hour(shape, gpu, speedup)) for speedup in (1.0, *speedups)),
        )
        for shape in shapes
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))
