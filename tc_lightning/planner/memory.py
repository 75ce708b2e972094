"""Memory that planning may take, and what a run without gradients takes of it."""

from __future__ import annotations

import os

import torch

from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import cache_bytes_per_image
from tc_lightning.rollout.evaluation import BATCH

CPU_BYTES = 4 << 30  # what one batch may take on a CPU
_WIDTHS = 8  # activations of a token that a block holds at once beside those of the MLP, in widths of the network


def free_bytes(device: torch.device) -> float:
    """Memory that a batch may take: on a GPU half of what is free, and of what torch holds without need."""
    return CPU_BYTES if device.type != "cuda" else _free_on_gpu(device) / 2


def spare_bytes(device: torch.device, world: int = 1) -> float:
    """Memory that one image may take, which cannot be divided: most of what is free on a GPU. On a CPU, shared by so many processes,
    half: what is freed between tensors that stay is not given back, and almost as much again was measured (export/BENCHMARKS.md)."""
    if device.type == "cuda":
        return 0.9 * _free_on_gpu(device)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # a system that does not tell
        free = 0
    return max(CPU_BYTES, free / world / 2)


def images_at_a_time(plan: CachePlan, device: torch.device) -> int:
    """Images that take a plan's steps together when no gradients are wanted: 1 to `tc_lightning.rollout.evaluation.BATCH`."""
    return max(1, min(BATCH, int(free_bytes(device) // forward_bytes(plan))))


def forward_bytes(plan: CachePlan) -> int:
    """What one image takes in a run without gradients: the activations of a block, and the cache that a step reads and the one it
    leaves."""
    model, rows = plan.model, 2 if plan.guidance.doubles_batch else 1
    widths = _WIDTHS + len({skip.source for skip in model.skips.pairs})  # streams that wait for the blocks that take them in
    return 4 * rows * model.tokens * (widths * model.width + 2 * model.mlp_width) + 2 * cache_bytes_per_image(plan)


def _free_on_gpu(device: torch.device) -> float:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
