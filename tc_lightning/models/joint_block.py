"""A block of two streams, text and image, which attend to each other in one sequence (Esser et al., arXiv 2403.03206).

The text's tokens come first. Each stream has weights and adaLN terms of its own. A network's last block gives the text nothing, since
nothing reads it: its update there is zeros. Some blocks hold a second attention, among the image's tokens alone, which starts from what
the first starts from. So both are one branch: what it gives is their sum behind the gates. Its keys and values are those of the two,
side by side along the width, with zeros where the second has none of the text's.

Shape suffixes: B batch (both halves of guidance counted), S the text's tokens, n any subset of all tokens that begins with those S,
D width, M heads, E head dimension (D = M E).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tc_lightning.models.dit import Mlp, modulate
from tc_lightning.models.lean import attend
from tc_lightning.models.network import Block, KeyValue, See, side_by_side

NORM_EPS = 1e-6


class JointShape(NamedTuple):
    """Shape of a block.

    Args:
        width: width D of both streams.
        num_heads: attention heads.
        mlp_width: hidden width of the MLPs.
        text_tokens: S.
        qk_norm: queries and keys are normalised within each head.
    """

    width: int
    num_heads: int
    mlp_width: int
    text_tokens: int
    qk_norm: bool


class TextTerms(NamedTuple):
    """adaLN terms of a block's text, each [B, 1, D]; a `scale` already holds 1 + scale."""

    text_shift_attn: Tensor
    text_scale_attn: Tensor
    text_gate_attn: Tensor
    text_shift_mlp: Tensor
    text_scale_mlp: Tensor
    text_gate_mlp: Tensor


class SeenTerms(NamedTuple):
    """Those of a text that is only attended to."""

    text_scale_attn: Tensor
    text_shift_attn: Tensor


class ImageTerms(NamedTuple):
    """Those of a block's image."""

    shift_attn: Tensor
    scale_attn: Tensor
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class DualTerms(NamedTuple):
    """Those of an image with two attentions."""

    shift_attn: Tensor
    scale_attn: Tensor
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor
    shift_dual: Tensor
    scale_dual: Tensor
    gate_dual: Tensor


class FinalTerms(NamedTuple):
    """Those of a readout."""

    scale: Tensor
    shift: Tensor


class HeadNorm(nn.Module):
    """RMS norm within each head."""

    def __init__(self, shape: JointShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width // shape.num_heads))

    def forward(self, x_BnD: Tensor) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        x_BnME = x_BnD.unflatten(2, (-1, len(self.weight)))
        return F.rms_norm(x_BnME, self.weight.shape, self.weight, NORM_EPS).flatten(2)


def head_norm(shape: JointShape) -> nn.Module:
    """Of queries or keys, where the shape has one."""
    return HeadNorm(shape) if shape.qk_norm else nn.Identity()


class Attention(nn.Module):
    """A stream's part in attention: queries, keys and values of its tokens, and a linear map of what these find."""

    def __init__(self, shape: JointShape) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
        self.norm_q, self.norm_k = head_norm(shape), head_norm(shape)

    def forward(self, h_BnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, n, D]."""
        q, k, v = self.qkv(h_BnD).chunk(3, dim=-1)
        return self.norm_q(q), self.norm_k(k), v


class AttendedTo(nn.Module):
    """The text's part in attention in the last block: keys and values alone."""

    def __init__(self, shape: JointShape) -> None:
        super().__init__()
        self.kv, self.norm_k = nn.Linear(shape.width, 2 * shape.width), head_norm(shape)

    def forward(self, h_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, S, D]."""
        k, v = self.kv(h_BSD).chunk(2, dim=-1)
        return self.norm_k(k), v


class StreamModulation(nn.Module):
    """The linear map from the conditioning vector to a stream's adaLN terms, which come in the order of their names."""

    def __init__(self, width: int, terms: type[TextTerms | SeenTerms | ImageTerms | DualTerms | FinalTerms]) -> None:
        super().__init__()
        self.terms, self.linear = terms, nn.Linear(width, len(terms._fields) * width)

    def forward(self, c_BD: Tensor) -> Any:
        """[B, D] -> the terms."""
        parts = self.linear(F.silu(c_BD)).unsqueeze(-2).chunk(len(self.terms._fields), dim=-1)
        return self.terms(*(1 + part if "scale" in name else part for name, part in zip(self.terms._fields, parts, strict=True)))


class JointBlock(Block):
    """A block of two streams; the last one of a network has one, and a text that is attended to."""

    branches, attends = ("attn", "mlp"), ("attn",)
    image_terms: type[ImageTerms | DualTerms] = ImageTerms

    def __init__(self, shape: JointShape, last: bool) -> None:
        super().__init__()
        D = shape.width
        self.text_tokens, self.num_heads, self.last = shape.text_tokens, shape.num_heads, last
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=NORM_EPS)
        self.adaLN, self.text_adaLN = StreamModulation(D, self.image_terms), StreamModulation(D, SeenTerms if last else TextTerms)
        self.attn, self.mlp = Attention(shape), Mlp(D, shape.mlp_width)
        self.text_attn = AttendedTo(shape) if last else Attention(shape)
        self.text_mlp = None if last else Mlp(D, shape.mlp_width)

    def modulation(self, c_BD: Tensor) -> Any:
        """adaLN terms from the conditioning vector: those of the text, then those of the image."""
        return side_by_side(self.text_adaLN(c_BD), self.adaLN(c_BD))

    def streams(self, z_BnD: Tensor) -> tuple[Tensor, Tensor]:
        """Text [B, S, D] and image [B, n - S, D]."""
        return z_BnD[:, : self.text_tokens], z_BnD[:, self.text_tokens :]

    def project(self, text_BSD: Tensor, image_BnD: Tensor, mod: Any) -> tuple[Tensor, KeyValue]:
        """Queries (those of the text first, if it has any), and keys and values of normalised tokens."""
        *q_text, k_text, v_text = self.text_attn(modulate(text_BSD, mod.text_shift_attn, mod.text_scale_attn))
        q, k, v = self.attn(modulate(image_BnD, mod.shift_attn, mod.scale_attn))
        queries = torch.cat([*q_text, q], 1) if q_text else q
        return queries, KeyValue(torch.cat([k_text, k], 1), torch.cat([v_text, v], 1))

    def attend(self, q_BnD: Tensor, kv: KeyValue, text_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """What text and image find, before the gates."""
        found = attend(q_BnD, kv.k, kv.v, self.num_heads)
        if self.last:
            return text_BSD * 0, self.attn.proj(found)
        text, image = self.streams(found)
        return self.text_attn.proj(text), self.attn.proj(image)  # type: ignore[operator]  # a linear map, but in a last block

    def attn_branch(self, z_BnD: Tensor, mod: Any, see: See | None = None) -> tuple[Tensor, KeyValue]:
        """Attention of the given tokens, before the gates, and the keys and values that they attended to."""
        text, image = self.streams(self.norm1(z_BnD))
        q, own = self.project(text, image, mod)
        kv = see(own) if see else own
        return torch.cat(self.attend(q, kv, text), 1), kv

    def mlp_branch(self, z_BnD: Tensor, mod: Any) -> Tensor:
        """MLPs of the given tokens, before the gates."""
        text, image = self.streams(self.norm2(z_BnD))
        update = self.mlp(modulate(image, mod.shift_mlp, mod.scale_mlp))
        if self.text_mlp is None:
            return torch.cat([text * 0, update], 1)
        return torch.cat([self.text_mlp(modulate(text, mod.text_shift_mlp, mod.text_scale_mlp)), update], 1)

    def branch(
        self, name: str, z_BnD: Tensor, mod: Any, at: Tensor | None = None, see: See | None = None
    ) -> tuple[Tensor, KeyValue | None]:
        """See `Block`."""
        return self.attn_branch(z_BnD, mod, see) if name == "attn" else (self.mlp_branch(z_BnD, mod), None)

    def gated(self, name: str, update_BnD: Tensor, mod: Any, at: Tensor | None = None) -> Tensor:
        """See `Block`. In a last block the text's update is zeros, which any gate may multiply."""
        gate = getattr(mod, f"gate_{name}")
        if self.last:
            return gate * update_BnD
        text, image = self.streams(update_BnD)
        return torch.cat([getattr(mod, f"text_gate_{name}") * text, gate * image], 1)


class DualBlock(JointBlock):
    """A block whose image tokens also attend to each other alone."""

    image_terms = DualTerms

    def __init__(self, shape: JointShape, last: bool) -> None:
        super().__init__(shape, last)
        self.attn2 = Attention(shape)

    def attn_branch(self, z_BnD: Tensor, mod: Any, see: See | None = None) -> tuple[Tensor, KeyValue]:
        """Both attentions of the given tokens, gated and added, and the keys and values that they attended to, [B, n, 2 D]."""
        text, image = self.streams(self.norm1(z_BnD))
        q, first = self.project(text, image, mod)
        q_dual, k_dual, v_dual = self.attn2(modulate(image, mod.shift_dual, mod.scale_dual))
        kv = KeyValue(*(torch.cat([a, torch.cat([text * 0, b], 1)], 2) for a, b in zip(first, (k_dual, v_dual), strict=True)))
        if see:
            kv = see(kv)
            (k, k_dual), (v, v_dual) = (x.chunk(2, dim=-1) for x in kv)
            first, k_dual, v_dual = KeyValue(k, v), self.streams(k_dual)[1], self.streams(v_dual)[1]
        text_update, update = self.attend(q, first, text)
        update = mod.gate_attn * update + mod.gate_dual * self.attn2.proj(attend(q_dual, k_dual, v_dual, self.num_heads))
        return torch.cat([text_update if self.last else mod.text_gate_attn * text_update, update], 1), kv

    def gated(self, name: str, update_BnD: Tensor, mod: Any, at: Tensor | None = None) -> Tensor:
        """See `Block`: attention has been through its gates."""
        return update_BnD if name == "attn" else super().gated(name, update_BnD, mod, at)
