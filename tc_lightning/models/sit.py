"""SiT (Ma et al., arXiv 2401.08740): DiT's network and names of weights, on straight paths from noise at t = 0 to data at 1.

The network sees t itself, in [0, 1], and gives the velocity x_0 - eps. As in the release, the output layer of a model with
`learn_sigma` is twice as wide as the velocity, and the second half is dropped.
"""

from __future__ import annotations

from torch import Tensor

from tc_lightning.diffusion.flow import Flow
from tc_lightning.models.dit import DiT, FinalModulation


class SiT(DiT):
    """Scalable interpolant transformer with class conditioning."""

    family = "sit"
    schedule = Flow(noise_at=0.0, data_at=1.0)

    def readout(self, z_BND: Tensor, mod: FinalModulation) -> Tensor:
        """Tokens -> velocity [B, C, H, W]."""
        return super().readout(z_BND, mod)[:, : self.config.in_channels]
