"""HarmoniCa (Huang et al., arXiv 2410.01723): after the first step, every step may reuse any branch."""

from __future__ import annotations

import numpy as np

from tc_lightning.policies.routers import RouterPolicy


class HarmoniCaPolicy(RouterPolicy):
    """Step 0 is full; after it a branch with w above the threshold (0.1) is computed, another keeps its last computed value."""

    name = "harmonica"

    def may_reuse(self, num_steps: int) -> np.ndarray:
        """All steps but the first."""
        return np.arange(num_steps) > 0
