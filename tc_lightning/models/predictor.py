"""Predictors of what to recompute, by block and time: of tokens (the Cache Predictor of TokenCache v1, arXiv 2409.18523), and routers.

Their input is block and time only: they know nothing of the sample, so that what they choose can be baked into a static graph.

Shape suffixes: B batch, T sampling steps, L blocks, N tokens, 2 branches (0 attn, 1 mlp), H hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.models.dit import TimestepEmbedder

INITIAL_IMPORTANCE = 0.75  # nearer to computing than to reusing
LOGIT_BOUND = 5.0  # keeps w off 0 and 1, where gradients vanish and tokens could no longer be ranked


class CachePredictor(nn.Module):
    """w(l, t) in [0, 1]^N; 1 recomputes a token, 0 reuses it.

    A small MLP over the sum of a time and a block embedding, with a bias for each token of each block. At the start w is
    `INITIAL_IMPORTANCE` everywhere.

    Args:
        depth: blocks L.
        num_tokens: tokens N.
        hidden_size: width H.
    """

    def __init__(self, depth: int, num_tokens: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.time = TimestepEmbedder(hidden_size)
        self.block_LH = nn.Parameter(0.5 * torch.randn(depth, hidden_size))
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.logits = nn.Linear(hidden_size, num_tokens, bias=False)
        logit = math.log(INITIAL_IMPORTANCE / (1 - INITIAL_IMPORTANCE))
        self.bias_LN = nn.Parameter(torch.full((depth, num_tokens), LOGIT_BOUND * math.atanh(logit / LOGIT_BOUND)))
        nn.init.zeros_(self.logits.weight)

    def forward(self, t_B: Tensor) -> Tensor:
        """Importances [B, L, N], in fp32 also under autocast, of every block at times [B] in training steps."""
        return _bounded_sigmoid(self._logits(t_B))

    def _logits(self, t_B: Tensor) -> Tensor:
        h_BLH = F.silu(self.time(t_B)[:, None] + self.block_LH)
        h_BLH = F.silu(self.hidden(h_BLH))
        return self.logits(h_BLH).float() + self.bias_LN


class RouterTable(nn.Module):
    """w in [0, 1] of each (step, block, branch), each for itself, as Learning-to-Cache and HarmoniCa have it.

    It starts at random: where a step refreshes what the next one reuses, alike steps must become unlike.

    Args:
        num_steps: sampling steps T.
        depth: blocks L.
        start: w about which the table starts.
        branches: branches of a block.
    """

    def __init__(self, num_steps: int, depth: int, start: float = INITIAL_IMPORTANCE, branches: int = 2) -> None:
        super().__init__()
        self.table_TL2 = nn.Parameter(torch.randn(num_steps, depth, branches) + math.log(start / (1 - start)))

    def forward(self) -> Tensor:
        """Weights [T, L, 2] of all steps."""
        return _bounded_sigmoid(self.table_TL2)


class RouterPredictor(CachePredictor):
    """w in [0, 1] of each (step, block, branch): the Cache Predictor with one token for each branch, and a table over the steps.

    What steps have in common is learned by the network, in few optimiser steps, from batches that mix them; the table lets a step
    differ from its neighbours.

    Args:
        times_T: times of the sampling steps, in training steps.
        depth: blocks L.
        hidden_size: width H.
        branches: branches of a block.
    """

    def __init__(self, times_T: Tensor, depth: int, hidden_size: int = 64, branches: int = 2) -> None:
        super().__init__(depth, branches, hidden_size)
        self.table_TL2 = nn.Parameter(torch.zeros(len(times_T), depth, branches))
        self.times_T: Tensor
        self.register_buffer("times_T", times_T, persistent=False)

    def forward(self) -> Tensor:  # type: ignore[override]
        """Weights [T, L, 2] of all steps, in fp32 also under autocast."""
        return _bounded_sigmoid(self._logits(self.times_T) + self.table_TL2)


def _bounded_sigmoid(logits: Tensor) -> Tensor:
    return torch.sigmoid(LOGIT_BOUND * torch.tanh(logits / LOGIT_BOUND))
