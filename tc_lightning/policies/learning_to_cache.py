"""Learning-to-Cache (Ma et al., arXiv 2406.01733): every second step is full, and the step after it reuses what the router allows."""

from __future__ import annotations

import numpy as np

from tc_lightning.policies.routers import RouterPolicy


class LearningToCachePolicy(RouterPolicy):
    """Steps 0, 2, 4, ... are full; in the others a branch with w above the threshold (0.1) is computed, another reused.

    Half of the steps are full whatever the router says, in the paper and in its code: nearly 2x is the most that it can give.
    Larger targets are refused, with the largest one that is not.
    """

    name = "learning_to_cache"

    def may_reuse(self, num_steps: int) -> np.ndarray:
        """Odd steps."""
        return np.arange(num_steps) % 2 == 1
