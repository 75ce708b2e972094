"""Where torch's half of a command runs."""

from __future__ import annotations

import torch


def torch_device(provider: str) -> torch.device:
    """The GPU for the provider `cuda`, where torch can use one; else the CPU, on which the same is computed, slower."""
    return torch.device("cuda" if provider == "cuda" and torch.cuda.is_available() else "cpu")
