"""The content predictor of TokenCache v2: which tokens to recompute, by what the image looks like at this step.

One DiT block that starts as a copy of the teacher's first, and a linear head. Its input is (x_t, t): tokens and time embedding are the
teacher's own, used as they are and stored with the teacher alone. It sees no label (in its place stands the null label, which
block 0 was trained with), so that both halves of guidance recompute the same tokens.

Shape suffixes: B images (one half of guidance), L blocks, N tokens, D width.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.errors import TeacherError
from tc_lightning.models.conditions import null_rows
from tc_lightning.models.dit import NORM_EPS, DiTBlock, DiTConfig, Modulation
from tc_lightning.models.frozen_files import load_frozen, save_frozen, state_digest
from tc_lightning.models.network import Network
from tc_lightning.models.predictor import INITIAL_IMPORTANCE, LOGIT_BOUND


class ContentPredictor(nn.Module):
    """a(x_t, t) in [0, 1]^(L x N); 1 recomputes a token in a block, 0 reuses it.

    Args:
        config: shape of the teacher.

    Raises:
        TeacherError: if the teacher has no null label, in whose place it would see one class of all images.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        if not config.null_label:
            raise TeacherError("a content predictor needs a null label, and the teacher has none: leave `content` out.")
        self.block = DiTBlock(config)
        self.head = nn.Linear(config.hidden_size, config.depth)
        nn.init.zeros_(self.head.weight)
        logit = math.log(INITIAL_IMPORTANCE / (1 - INITIAL_IMPORTANCE))
        nn.init.constant_(self.head.bias, LOGIT_BOUND * math.atanh(logit / LOGIT_BOUND))

    @classmethod
    def from_teacher(cls, model: Network) -> ContentPredictor:
        """A predictor whose block is a trainable copy of the teacher's first, and whose scores are `INITIAL_IMPORTANCE` everywhere.

        Raises:
            TeacherError: if that is no block of a DiT, or the teacher has no null label.
        """
        if type(model.blocks[0]) is not DiTBlock:
            raise TeacherError(f"a content predictor copies a block of a DiT, and a {model.family} has others: leave `content` out.")
        predictor = cls(model.config)
        predictor.block.load_state_dict(model.blocks[0].state_dict())
        return predictor

    def modulation(self, model: Network, t_B: Tensor) -> Modulation:
        """adaLN terms of the block at times [B] in the network's units."""
        return self.block.modulation(model.condition(t_B, **null_rows(model.conditions, t_B, model.nulls)))

    def forward(self, z_BND: Tensor, mod: Modulation) -> Tensor:
        """Scores [B, L, N], in fp32 also under autocast, from the teacher's tokens of x_t."""
        h_BND = F.layer_norm(self.block(z_BND, mod).float(), z_BND.shape[-1:], eps=NORM_EPS)
        with torch.autocast(z_BND.device.type, enabled=False):
            logits_BNL = self.head(h_BND)
        return torch.sigmoid(LOGIT_BOUND * torch.tanh(logits_BNL / LOGIT_BOUND)).transpose(1, 2)

    def scores(self, model: Network, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Scores [B, L, N] of latents at times [B]."""
        return self(model.embed(x_BCHW), self.modulation(model, t_B))


class RandomPredictor(ContentPredictor):
    """Scores that have nothing to do with the image: other tokens for each image, step and block. What a learned one has to beat.

    Args:
        config: shape of the teacher.
        seed: of the scores.
    """

    def __init__(self, config: DiTConfig, seed: Sequence[int]) -> None:
        super().__init__(config)
        self.rng = np.random.default_rng(seed)

    def forward(self, z_BND: Tensor, mod: Modulation) -> Tensor:
        """Uniform scores [B, L, N]."""
        scores = self.rng.random((len(z_BND), self.head.out_features, z_BND.shape[1]), dtype=np.float32)
        return torch.from_numpy(scores).to(z_BND.device)


@dataclasses.dataclass(frozen=True, eq=False)
class Selector:
    """A frozen content predictor, and the digest by which plans name it.

    The two are apart because an artefact may hold the predictor rounded to its own precision.
    """

    predictor: ContentPredictor
    digest: str

    @classmethod
    def of(cls, predictor: ContentPredictor) -> Selector:
        """A frozen copy of the predictor as it is."""
        return cls(copy.deepcopy(predictor).eval().requires_grad_(False), state_digest(predictor.state_dict()))

    def scorer(self, model: Network, t_B: Tensor) -> Callable[[Tensor], Tensor]:
        """From tokens of x_t [B, N, D] to scores [B, L, N], at times [B]."""
        return lambda z_BND: self.predictor(z_BND, self.predictor.modulation(model, t_B))

    def to(self, device: torch.device | str) -> Selector:
        """The same on a device."""
        return Selector(copy.deepcopy(self.predictor).to(device), self.digest)

    def save(self, path: Path) -> None:
        """Write `.safetensors` atomically; shape and digest are in its metadata."""
        save_frozen(self.predictor, self.digest, path)

    @classmethod
    def load(cls, path: Path, config: DiTConfig) -> Selector:
        """Read what `save` wrote.

        Args:
            path: the file.
            config: shape of the teacher.

        Raises:
            RunError: if the file is missing, damaged, or of a predictor for another teacher.
        """
        return cls.of(load_frozen(ContentPredictor(config), path, "content predictor"))
