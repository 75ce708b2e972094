"""Emission: the condition graph and one graph per step program, from the functions that define caching.

Inputs and outputs of the graphs (M rows that the step computes: B, or 2 B where it computes both halves of guidance; U distinct
labels, S steps of a chunk, R = 6 L + 2):

    condition   steps [S], offset, labels [U]                            -> mods [S, U, R, D], first_step
    step_*      x [B, C, H, W], (m_prev), (m_prev2), step, first_bad, first_step, mods, rows [M], (guidance), (numbers [M]), ENTRY.j ...
                                                                         -> x_next, step_next, first_bad_next, (m), ENTRY.new ...

`step` is counted, and latents that are not finite are noticed, in the graphs, so that nothing has to come from the host or go to it
between two steps: `first_bad` is the first step whose latents were not finite, and the number of steps while there is none. `offset`
is the place of the run's first step among the times that the condition graph knows.
`rows` are the label rows of `mods`; `numbers` count the rows of the batch (0, 1, 2, ...), for programs that scatter. An entry that
is read and written in one program is updated in place: bind both to one buffer. A graph that programs share reads and writes what any
of them does: what a step does not read, it replaces whole before it is used, and what it does not write may be left unbound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx

from export.onnx_dit import OnnxDiT, OnnxSelector
from export.programs import FULL, Program, kept_tokens
from export.schedule import PAST
from export.symbolic import External, Graph, OnnxOps, Sym
from tc_lightning.cache import Guided, Step, forecast, predict
from tc_lightning.costs import entry_dtype, entry_shape
from tc_lightning.dataflow import Entry, StepFlow, trace
from tc_lightning.diffusion.table import SamplerTable
from tc_lightning.diffusion.update import Coefficients, advance
from tc_lightning.models.dit import DiTConfig
from tc_lightning.plan import CachePlan


@dataclasses.dataclass(frozen=True)
class Emitter:
    """Writes the graphs of one plan.

    Args:
        plan: the plan.
        config: shape of the model.
        dtype: working precision, fp32, fp16 or bf16; latents, guidance and the sampler are always fp32.
        weights_file: name of the shared weights file.
        index: what is in it.
    """

    plan: CachePlan
    config: DiTConfig
    dtype: str
    weights_file: str
    index: dict[str, External]

    def condition(self, features_TF: np.ndarray) -> onnx.ModelProto:
        """The condition graph, from the timestep features of `condition_times`."""
        g = Graph("condition", self.weights_file, self.index)
        steps, offset = g.input("steps", "int64", ["steps"]), g.input("offset", "int64", [])
        labels = g.input("labels", "int64", ["labels"])
        features = g.op("Gather", g.constant(features_TF, "fp32"), steps + offset, axis=0, dtype="fp32")
        mods = OnnxDiT(g, self.config, self.dtype).modulation_table(features.cast(self.dtype), labels)
        g.output("mods", mods, ["steps", "labels", *self._table_shape])
        g.output("first_step", g.op("Gather", steps, g.constant(0, "int64"), axis=0), [])
        return g.model()

    def step(self, programs: Sequence[Program]) -> onnx.ModelProto:
        """The graph of one step program, or of several that share it: network, guidance and sampler update."""
        program = _union(programs)
        g = Graph(program.name, self.weights_file, self.index)
        ops, signature, guidance = OnnxOps(g), self.plan.model, self.plan.guidance
        latent: list[int | str] = ["batch", signature.in_channels, signature.input_size, signature.input_size]
        x = g.input("x", "fp32", latent)
        table = self.plan.reference if program.name == FULL else self.plan.scaled_sampler
        history = PAST[: table.history]
        past = [g.input(name, "fp32", latent) for name in history]
        step, first_bad = g.input("step", "int64", []), g.input("first_bad", "int64", [])
        mods = self._modulations(g, step)
        mode = program.guidance.mode
        scale = g.input("guidance", "fp32", []) if guidance.doubles_batch and mode != "cond" else None
        guided = Guided(mode, scale, guidance.channels) if guidance.doubles_batch else None

        model = OnnxDiT(g, self.config, self.dtype)
        block_mods, final = model.unpack(mods, [b for s in program.segments if s.mode != "skip" for b in s.blocks])
        scorer = OnnxSelector(g, self.config, step).scores
        todo = Step(program.segments, self._kept(g, ops, step, program), self._cached(g, step, program), program.writes, scorer)
        eps, writes = predict(todo, guided, x, model, block_mods, final, signature.in_channels, ops)
        x_next, m = advance(x, eps, past, self._coefficients(g, step, table))
        g.output("x_next", x_next, latent)
        g.output("step_next", step + g.constant(1, "int64"), [])
        g.output("first_bad_next", self._first_bad(g, x_next, step, first_bad, len(table)), [])
        if history:
            g.output("m", m, latent)
        for entry in program.writes:
            g.output(f"{entry.name}.new", writes[entry], self._entry_shape(entry))
        return g.model()

    @property
    def _table_shape(self) -> tuple[int, int]:
        return 6 * self.config.depth + 2, self.config.hidden_size

    def _modulations(self, g: Graph, step: Sym) -> Sym:
        """This step's adaLN terms for every row of the batch, [M, R, D]."""
        first = g.input("first_step", "int64", [])
        table = g.input("mods", self.dtype, ["steps", "labels", *self._table_shape])
        rows = g.input("rows", "int64", ["rows"])
        return g.op("Gather", g.op("Gather", table, step - first, axis=0), rows, axis=0)

    def _first_bad(self, g: Graph, x_BCHW: Sym, step: Sym, first_bad: Sym, steps: int) -> Sym:
        """This step, if a latent is not finite and none was before; 0 times such a value is NaN, and so is a sum with NaN."""
        spoilt = g.op("IsNaN", g.op("ReduceSum", x_BCHW * 0.0, keepdims=0), dtype="bool")
        return g.op("Min", first_bad, g.op("Where", spoilt, step, g.constant(steps, "int64"), dtype="int64"))

    def _cached(self, g: Graph, step: Sym, program: Program) -> dict[Entry, Sym]:
        """Declare the cache inputs and forecast every entry that is read."""
        flows, cached = trace(self.plan), {}
        for entry, count in program.reads:
            dtype = entry_dtype(entry, self.dtype)
            values = [g.input(f"{entry.name}.{j}", dtype, self._entry_shape(entry)) for j in range(count)]
            weights_TO = forecast_table(flows, program.steps, entry, count)
            columns = [self._lookup(g, step, column, dtype) for column in weights_TO.T] if count > 1 else []
            cached[entry] = forecast(values, columns)
        return cached

    def _entry_shape(self, entry: Entry) -> list[int | str]:
        """Shape of an entry in the graphs: a row for every image, or for every row of an undivided batch."""
        return ["batch" if entry.half or entry.kind == "guidance" else "rows", *entry_shape(self.plan, entry)]

    def _kept(self, g: Graph, ops: OnnxOps, step: Sym, program: Program) -> tuple[Sym | None, ...]:
        """Kept tokens [K] of static segments, looked up by step, and registered with their places in [M, N, D]."""
        if not any(s.mode == "partial" for s in program.segments):
            return (None,) * len(program.segments)
        row_pair = g.constant(np.array([1, 0]), "int64")
        row_M12 = g.reshape(g.input("numbers", "int64", ["rows"]), -1, 1, 1) * row_pair
        ops.number_rows(row_M12)
        token = g.constant(1, "int64")
        kept: list[Sym | None] = []
        for segment in program.segments:
            if segment.mode == "partial" and not segment.is_content:
                token_K2 = self._token_pairs(g, step, {i: kept_tokens(self.plan, i, segment) for i in program.steps})
                kept.append(ops.register(g.op("Gather", token_K2, token, axis=1), row_M12 + token_K2))
            else:
                kept.append(None)
        return tuple(kept)

    def _token_pairs(self, g: Graph, step: Sym, tokens: dict[int, tuple[int, ...]]) -> Sym:
        """Pairs (0, token) of this step's tokens, [K, 2]; a constant if all steps share them."""
        if len({*tokens.values()}) == 1:
            tokens_K = next(iter(tokens.values()))
            return g.constant(np.stack([np.zeros_like(tokens_K), tokens_K], axis=-1), "int64")
        counts_T = np.array([len(tokens.get(i, ())) for i in range(self.plan.num_steps)])
        pairs_TK2 = np.zeros((self.plan.num_steps, counts_T.max(), 2), dtype=np.int64)
        for i, kept in tokens.items():
            pairs_TK2[i, : len(kept), 1] = kept
        pairs_K2 = g.op("Gather", g.constant(pairs_TK2, "int64"), step, axis=0)
        if len({*map(len, tokens.values())}) == 1:
            return pairs_K2
        zero, count = g.constant(np.array([0]), "int64"), g.reshape(self._lookup(g, step, counts_T, "int64"), 1)
        return g.op("Slice", pairs_K2, zero, count)

    def _coefficients(self, g: Graph, step: Sym, table: SamplerTable) -> Coefficients:
        def column(name: str) -> Sym:
            return self._lookup(g, step, np.array([getattr(row, name) for row in table.steps]), "fp32")

        past = tuple(column(f"next_{name}") for name in PAST[: table.history])
        return Coefficients(column("m_x"), column("m_eps"), column("next_x"), column("next_m"), past)

    def _lookup(self, g: Graph, step: Sym, column_T: np.ndarray, dtype: str) -> Sym:
        return g.op("Gather", g.constant(column_T, dtype), step, axis=0)


def _union(programs: Sequence[Program]) -> Program:
    """What a graph shared by these programs does: the segments of one that is partial, all reads, all writes, all steps."""
    example = max(programs, key=lambda p: len(p.reads))
    writes = tuple(sorted({entry for p in programs for entry in p.writes}))
    return dataclasses.replace(example, name=example.graph, writes=writes, steps=tuple(sorted(i for p in programs for i in p.steps)))


def forecast_table(flows: list[StepFlow], steps: tuple[int, ...], entry: Entry, count: int) -> np.ndarray:
    """Forecast weights [T, count] of an entry at the given steps; 0 for past values that do not exist yet, or are not read."""
    table_TO = np.zeros((len(flows), count))
    for i in steps:
        weights = next((read.weights for read in flows[i].reads if read.entry == entry), ())
        table_TO[i, : len(weights)] = weights
    return table_TO
