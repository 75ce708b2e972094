"""A DiT that writes ONNX nodes: the methods of `tc_lightning.models.dit.DiT` and its blocks, on symbolic values.

Weights keep the layout of torch, [out, in]: the products take their transpose, which costs nothing, and is what lets all programs
read one copy (`export.runtime`). Shape suffixes as in `tc_lightning.models.dit`; M rows of the (doubled) batch.
"""

from __future__ import annotations

import math

import numpy as np

from export.symbolic import CONTRIB, External, Graph, Sym
from tc_lightning.models.dit import NORM_EPS, DiTConfig, FinalModulation, KeyValue, Modulation
from tc_lightning.predictor import LOGIT_BOUND

MODULATIONS = 6  # adaLN terms of a block
PATCHES = "x_embedder.proj"
SELECTOR = "selector"  # what the names of the content predictor's weights begin with
MODULATION_TABLE = f"{SELECTOR}.modulations"  # its adaLN terms [T, 6, D]: they depend on the step alone


def with_views(index: dict[str, External]) -> dict[str, External]:
    """The index of a weights file, with views: q, k and v of every attention layer, and the patch embedding as a matrix."""
    kernel = index[f"{PATCHES}.weight"]
    views = {f"{PATCHES}.matrix.weight": kernel._replace(shape=(kernel.shape[0], math.prod(kernel.shape[1:])))}
    for name, whole in index.items():
        stem, found, kind = name.partition(".attn.qkv.")
        for j, letter in enumerate("qkv" if found else ""):
            third, shape = whole.nbytes // 3, (whole.shape[0] // 3, *whole.shape[1:])
            views[f"{stem}.attn.{letter}.{kind}"] = External(whole.dtype, shape, whole.offset + j * third, third)
    return index | views


class OnnxBlock:
    """Branches of one block, whose weights' names begin with `stem`; see `DiTBlock`."""

    def __init__(self, graph: Graph, config: DiTConfig, stem: str) -> None:
        self._graph, self._config, self._stem = graph, config, stem

    def qkv(self, z_MnD: Sym, mod: Modulation) -> tuple[Sym, Sym, Sym]:
        """Queries, keys and values, each [M, n, D]: the Attention node splits the heads."""
        with self._graph.scope(self._stem):
            h = modulated_norm(self._graph, z_MnD, mod.shift_attn, mod.scale_attn, self._config.hidden_size)
            q, k, v = (linear(self._graph, h, f"{self._stem}.attn.{letter}") for letter in "qkv")
        return q, k, v

    def attention(self, q_MnD: Sym, k_MND: Sym, v_MND: Sym) -> Sym:
        """Attend from the tokens of q to those of k and v, before the gate."""
        heads = self._config.num_heads
        with self._graph.scope(self._stem):
            a = self._graph.op("Attention", q_MnD, k_MND, v_MND, q_num_heads=heads, kv_num_heads=heads, softmax_precision=1)
            return linear(self._graph, a, f"{self._stem}.attn.proj")

    def attn_branch(self, z_MND: Sym, mod: Modulation) -> tuple[Sym, KeyValue]:
        """Self-attention over all tokens, before the gate, and its keys and values."""
        q, k, v = self.qkv(z_MND, mod)
        return self.attention(q, k, v), KeyValue(k, v)

    def mlp_branch(self, z_MnD: Sym, mod: Modulation) -> Sym:
        """MLP of the given tokens, before the gate."""
        with self._graph.scope(self._stem):
            h = modulated_norm(self._graph, z_MnD, mod.shift_mlp, mod.scale_mlp, self._config.hidden_size, self._config.mlp_norm_eps)
            h = self._graph.op("Gelu", linear(self._graph, h, f"{self._stem}.mlp.fc1"), approximate="tanh")
            return linear(self._graph, h, f"{self._stem}.mlp.fc2")


class OnnxDiT:
    """Embedding, blocks and readout of a DiT; see `DiT`."""

    def __init__(self, graph: Graph, config: DiTConfig, dtype: str) -> None:
        self._graph, self.config, self._dtype = graph, config, dtype
        self.blocks = [OnnxBlock(graph, config, f"blocks.{b}") for b in range(config.depth)]

    def embed(self, x_MCHW: Sym) -> Sym:
        """Latents (fp32) -> tokens [M, N, D] in the working precision."""
        g, P, C = self._graph, self.config.patch_size, self.config.in_channels
        grid = self.config.input_size // P
        with g.scope("x_embedder"):  # a convolution whose stride is its kernel's size is a product, and needs no cuDNN
            patches = g.op("Transpose", g.reshape(x_MCHW.cast(self._dtype), 0, C, grid, P, grid, P), perm=[0, 2, 4, 1, 3, 5])
            z = product(g, g.reshape(patches, 0, grid * grid, C * P * P), f"{PATCHES}.matrix") + g.weight(f"{PATCHES}.bias")
            return z + g.weight("pos_embed")

    def readout(self, z_MND: Sym, mod: FinalModulation) -> Sym:
        """Tokens -> raw output [M, out_channels, H, W] in fp32."""
        g, P, C = self._graph, self.config.patch_size, self.config.out_channels
        grid = self.config.input_size // P
        with g.scope("final_layer"):
            h = linear(g, modulated_norm(g, z_MND, mod.shift, mod.scale, self.config.hidden_size), "final_layer.linear").cast("fp32")
            patches = g.op("Transpose", g.reshape(h, 0, grid, grid, P, P, C), perm=[0, 5, 1, 3, 2, 4])
            return g.reshape(patches, 0, C, grid * P, grid * P)

    def unpack(self, mods_MRD: Sym, used: list[int]) -> tuple[list[Modulation | None], FinalModulation]:
        """adaLN terms of the `used` blocks (None for the others) and of the final layer, each [M, 1, D].

        `mods_MRD` holds 6 rows a block and 2 for the final layer, as the condition graph writes them.
        """
        g, depth = self._graph, self.config.depth
        rows = [MODULATIONS * b + j for b in used for j in range(MODULATIONS)] + [MODULATIONS * depth, MODULATIONS * depth + 1]
        if len(used) < depth:
            mods_MRD = g.op("Gather", mods_MRD, g.constant(np.array(rows), "int64"), axis=1)
        pieces = g.multi("Split", len(rows), mods_MRD, axis=1, num_outputs=len(rows))
        mods: list[Modulation | None] = [None] * depth
        for place, b in enumerate(used):
            mods[b] = Modulation(*pieces[MODULATIONS * place : MODULATIONS * (place + 1)])
        return mods, FinalModulation(*pieces[-2:])

    def modulation_table(self, features_SF: Sym, labels_U: Sym) -> Sym:
        """adaLN terms of all blocks for S times and U labels, [S, U, 6 L + 2, D]; scales already hold 1 + scale."""
        g, c, D = self._graph, self.config, self.config.hidden_size
        t_SD = linear(g, silu(g, linear(g, features_SF, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        y_UD = g.op("Gather", g.weight("y_embedder.embedding_table.weight"), labels_U, axis=0)
        axes = g.constant(np.array([1]), "int64")
        c_SUD = silu(g, g.op("Unsqueeze", t_SD, axes) + y_UD)
        layers = [(f"blocks.{b}", MODULATIONS) for b in range(c.depth)] + [("final_layer", 2)]
        parts = []
        for stem, rows in layers:
            ones = g.constant(np.repeat([0.0, 1, 0, 0, 1, 0] if rows == MODULATIONS else [0.0, 1], D), self._dtype)
            bias = g.weight(f"{stem}.adaLN_modulation.1.bias") + ones
            parts.append(g.reshape(product(g, c_SUD, f"{stem}.adaLN_modulation.1") + bias, 0, 0, rows, D))
        return g.op("Concat", *parts, axis=2)


class OnnxSelector:
    """The content predictor at a step; see `tc_lightning.content_predictor`."""

    def __init__(self, graph: Graph, config: DiTConfig, step: Sym) -> None:
        self._graph, self._config, self._step = graph, config, step
        self._block = OnnxBlock(graph, config, f"{SELECTOR}.block")

    def scores(self, z_BND: Sym) -> Sym:
        """Scores [B, L, N] in fp32 of the teacher's tokens of x_t; the head is in fp32 in any precision, so that few of them tie."""
        g, D = self._graph, self._config.hidden_size
        terms_6D = g.op("Gather", g.weight(MODULATION_TABLE), self._step, axis=0)
        mod = Modulation(*g.multi("Split", MODULATIONS, terms_6D, axis=0, num_outputs=MODULATIONS))
        a_BND, _ = self._block.attn_branch(z_BND, mod)
        z_BND = z_BND + mod.gate_attn * a_BND
        z_BND = z_BND + mod.gate_mlp * self._block.mlp_branch(z_BND, mod)
        with g.scope(SELECTOR):
            ones = g.constant(np.ones(D), "fp32")
            h_BND = g.op("LayerNormalization", z_BND.cast("fp32"), ones, axis=-1, epsilon=NORM_EPS)
            weight_LD, bias_L = (g.weight(f"{SELECTOR}.head.{kind}").cast("fp32") for kind in ("weight", "bias"))
            logits_BLN = g.op("FusedMatMul", weight_LD, h_BND, transB=1, domain=CONTRIB) + g.reshape(bias_L, -1, 1)
            return g.op("Sigmoid", g.op("Tanh", logits_BLN * (1.0 / LOGIT_BOUND)) * LOGIT_BOUND)


def linear(g: Graph, x: Sym, stem: str) -> Sym:
    """x W^T + b, with W stored [out, in]."""
    return product(g, x, stem) + g.weight(f"{stem}.bias")


def product(g: Graph, x: Sym, stem: str) -> Sym:
    """x W^T. A Transpose node would be folded into a transposed copy of W by each session."""
    return g.op("FusedMatMul", x, g.weight(f"{stem}.weight"), transB=1, domain=CONTRIB)


def silu(g: Graph, x: Sym) -> Sym:
    """x sigmoid(x)."""
    return x * g.op("Sigmoid", x)


def modulated_norm(g: Graph, x_MnD: Sym, shift_M1D: Sym, scale_M1D: Sym, width: int, epsilon: float = NORM_EPS) -> Sym:
    """Layer norm (statistics in fp32), then adaLN.

    The node could take scale and shift of each row itself, but on the CPU that path of it takes longer than two more nodes.
    """
    ones = g.constant(np.ones(width), x_MnD.dtype)
    return g.op("LayerNormalization", x_MnD, ones, axis=-1, epsilon=epsilon, stash_type=1) * scale_M1D + shift_M1D
