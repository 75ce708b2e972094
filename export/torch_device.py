"""Where torch's half of a command runs."""

from __future__ import annotations

import torch


def torch_device(provider: str, index: int = 0) -> torch.device:
    """The GPU of this number for the provider `cuda`, where torch can use it; else the CPU, on which the same is computed, slower."""
    usable = provider == "cuda" and index < torch.cuda.device_count() and torch.cuda.is_available()
    return torch.device("cuda", index) if usable else torch.device("cpu")
