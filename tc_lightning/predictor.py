"""The Cache Predictor of TokenCache v1 (Lou et al., arXiv 2409.18523): which tokens to recompute, by block and time.

Its input is block and time only: it knows nothing of the sample, so that what it chooses can be baked into a static graph.

Shape suffixes: B batch, L blocks, N tokens, H hidden width.
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
        h_BLH = F.silu(self.time(t_B)[:, None] + self.block_LH)
        h_BLH = F.silu(self.hidden(h_BLH))
        logits_BLN = self.logits(h_BLH).float() + self.bias_LN
        return torch.sigmoid(LOGIT_BOUND * torch.tanh(logits_BLN / LOGIT_BOUND))
