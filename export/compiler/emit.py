"""Emission: the condition graph and one graph per step program, from the functions that define caching.

Inputs and outputs of the graphs (M rows that the step computes: B, or 2 B where it computes both halves of guidance; U distinct
rows of conditions, S steps of a chunk, R terms of the conditioning, which `export.compiler.traced` packs):

    condition   steps [S], offset, given.NAME [U, ...] of each condition  -> mods [S, U, R, D], first_step, constant.NAME [U, ...] ...
    step_*      x [B, C, H, W], (m_prev), (m_prev2), step, first_bad, first_step, mods, rows [M], constant.NAME ..., (guidance),
                (numbers [M]), ENTRY.j ...                               -> x_next, step_next, first_bad_next, (m), ENTRY.new ...

`step` is counted, and latents that are not finite are noticed, in the graphs, so that nothing has to come from the host or go to it
between two steps: `first_bad` is, of each image, the first step whose latents were not finite, and the number of steps while there is
none. `guidance` is the scale of each image. `offset` is the place of the run's first step among the times that the condition graph
knows.
`rows` are the rows of conditions of `mods` and of constants; `numbers` count the rows of the batch (0, 1, 2, ...), for programs that
scatter. An entry that is read and written in one program is updated in place: bind both to one buffer. A graph that programs share
reads and writes what any of them does: what a step does not read, it replaces whole before it is used, and what it does not write may
be left unbound.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch

from export.compiler.symbolic import Graph, Sym, Weights
from export.compiler.torch_functions import ANSWERS
from export.compiler.torch_shapes import at, gather, lookup
from export.compiler.traced import Hoisted, NetworkInGraph, conditioning, skeleton
from export.compiler.weights import MODULATION_TABLE, SELECTOR, TORCH_DTYPES, External
from export.runtime.layout import GIVEN, PAST
from export.runtime.programs import FULL, Program, condition_times, kept_tokens
from tc_lightning.cache.semantics import Guided, Step, forecast, predict
from tc_lightning.diffusion.update import Coefficients, advance
from tc_lightning.models.conditions import null_rows
from tc_lightning.models.content_predictor import ContentPredictor
from tc_lightning.models.network import Network, Terms
from tc_lightning.plan.cache_plan import CachePlan
from tc_lightning.plan.costs import entry_dtype, entry_shape
from tc_lightning.plan.dataflow import Entry, StepFlow
from tc_lightning.plan.sampler_table import SamplerTable


class Emitter:
    """Writes the graphs of one plan.

    Args:
        plan: the plan.
        network: the teacher.
        predictor: the content predictor that the plan names, if it does.
        dtype: working precision, fp32, fp16 or bf16; latents, guidance and the sampler are always fp32.
        weights_file: name of the shared weights file.
        index: what is in it; views of it that graphs take are added.
    """

    def __init__(
        self,
        plan: CachePlan,
        network: Network,
        predictor: ContentPredictor | None,
        dtype: str,
        weights_file: str,
        index: dict[str, External],
    ) -> None:
        self.plan, self.dtype = plan, dtype
        self._network, names = skeleton(network, dtype)
        like, working = null_rows(network.conditions, torch.zeros(1, device="meta")), TORCH_DTYPES[dtype]
        given = {name: value.to(working) if value.is_floating_point() else value for name, value in like.items()}
        self._hoisted = Hoisted(conditioning(self._network, torch.zeros(1, device="meta"), given))
        self._predictor = None
        if predictor is not None:
            self._predictor, more = skeleton(predictor, dtype, f"{SELECTOR}.")
            names |= more
        self._weights = Weights(weights_file, index, names)

    def condition(self) -> onnx.ModelProto:
        """The condition graph."""
        g = Graph("condition", self._weights, ANSWERS)
        steps, offset = g.input("steps", "int64", ["steps"]), g.input("offset", "int64", [])
        given = {c.name: g.input(GIVEN + c.name, c.dtype, ["given", *c.shape]) for c in self.plan.model.conditions}
        given = {c.name: given[c.name].cast(self.dtype) if c.dtype == "fp32" else given[c.name] for c in self.plan.model.conditions}
        t_S1 = lookup(g, np.array(condition_times(self.plan)[0]), (steps + offset)[:, None], "fp32")
        found = conditioning(self._network, t_S1, given)
        g.output("mods", self._for_all_rows(g, self._hoisted.pack(found)), ["steps", "given", *self._table_shape])
        g.output("first_step", at(steps, 0, 0), [])
        for name, value in self._hoisted.named(found.constants).items():
            g.output(name, value.cast(self.dtype), ["given", *self._hoisted.constants[name]])
        return g.model()

    def step(self, programs: Sequence[Program]) -> onnx.ModelProto:
        """The graph of one step program, or of several that share it: network, guidance and sampler update.

        Raises:
            ExportError: if the network does what has no ONNX form.
        """
        program = _union(programs)
        g = Graph(program.name, self._weights, ANSWERS)
        signature, guidance = self.plan.model, self.plan.guidance
        latent: list[int | str] = ["batch", signature.in_channels, signature.input_size, signature.input_size]
        x: Any = g.input("x", "fp32", latent)
        table = self.plan.reference if program.name == FULL else self.plan.scaled_sampler
        history = PAST[: table.history]
        past: list[Any] = [g.input(name, "fp32", latent) for name in history]
        step, first_bad = g.input("step", "int64", []), g.input("first_bad", "int64", ["batch"])
        terms = self._terms(g, step, [b for s in program.segments if s.mode != "skip" for b in s.blocks])
        mode = program.guidance.mode
        scale = g.input("guidance", "fp32", ["batch", 1, 1, 1]) if guidance.doubles_batch and mode != "cond" else None
        guided = Guided(mode, scale, guidance.channels) if guidance.doubles_batch else None

        model = NetworkInGraph(g, self._network, self.dtype)
        todo = Step(
            program.segments, self._kept(g, step, program), self._cached(g, step, program), program.writes, self._scorer(g, step)
        )
        predicted: tuple[Any, dict[Entry, Any]] = predict(todo, guided, x, model, terms, signature.in_channels)
        eps, found = predicted
        advanced: tuple[Any, Any] = advance(x, eps, past, self._coefficients(g, step, table))
        x_next, m = advanced
        g.output("x_next", x_next, latent)
        g.output("step_next", step + 1, [])
        g.output("first_bad_next", self._first_bad(g, x_next, step, first_bad, len(table)), ["batch"])
        if history:
            g.output("m", m, latent)
        for entry in program.writes:
            g.output(f"{entry.name}.new", found[entry], self._entry_shape(entry))
        return g.model()

    @property
    def _table_shape(self) -> tuple[int, int]:
        return self._hoisted.rows, self.plan.model.width

    def _for_all_rows(self, g: Graph, mods: Sym) -> Sym:
        """The table with a row for each row of conditions, also where the network's terms depend on time alone."""
        if mods.shape[1] is None:
            return mods
        condition = self.plan.model.conditions[0]
        images = g.op("Shape", Sym(g, GIVEN + condition.name, condition.dtype, (None,)), shape=(1,), kind="int64", start=0, end=1)
        one = g.constant(np.array([1]), "int64")
        sizes = g.op("Concat", one, images, one, one, shape=(4,), axis=0)
        return g.op("Expand", mods, sizes, shape=(mods.shape[0], None, *mods.shape[2:]))

    def _terms(self, g: Graph, step: Sym, used: Sequence[int]) -> Terms:
        """This step's terms for every row of the batch, and the constants that it needs."""
        first = g.input("first_step", "int64", [])
        table = g.input("mods", self.dtype, ["steps", "given", *self._table_shape])
        rows = g.input("rows", "int64", ["rows"])

        @functools.cache
        def constant(name: str) -> Sym:
            return gather(g.input(name, self.dtype, ["given", *self._hoisted.constants[name]]), rows, 0)

        return self._hoisted.unpack(g, gather(gather(table, step - first, 0), rows, 0), used, constant)

    def _scorer(self, g: Graph, step: Sym) -> Callable[[Any], Any]:
        """The content predictor at a step, from tokens to scores [B, L, N] in fp32."""

        def scores(z_BND: Sym) -> Sym:
            assert self._predictor is not None, "content segments need a content predictor"
            like = self._predictor.modulation(self._network, torch.zeros(1, device="meta"))
            terms_RD = gather(g.weight(MODULATION_TABLE), step, 0)
            return self._predictor(z_BND, type(like)(*terms_RD.chunk(len(like))))

        return scores

    def _first_bad(self, g: Graph, x_BCHW: Sym, step: Sym, first_bad: Sym, steps: int) -> Sym:
        """Of each image [B] this step, if a latent is not finite and none was before; 0 times such a value is NaN, and so is a sum with
        NaN."""
        images, chw = first_bad.shape, g.constant(np.array([1, 2, 3]), "int64")
        spoilt = g.op("IsNaN", g.op("ReduceSum", x_BCHW * 0.0, chw, shape=images, keepdims=0), shape=images, kind="bool")
        found = g.op("Where", spoilt, step, g.constant(steps, "int64"), shape=images, kind="int64")
        return g.op("Min", first_bad, found, shape=images)

    def _cached(self, g: Graph, step: Sym, program: Program) -> dict[Entry, Any]:
        """Declare the cache inputs and forecast every entry that is read."""
        flows, cached = self.plan.flows, dict[Entry, Any]()
        for entry, count in program.reads:
            dtype = entry_dtype(entry, self.dtype)
            values: list[Any] = [g.input(f"{entry.name}.{j}", dtype, self._entry_shape(entry)) for j in range(count)]
            weights_TO = forecast_table(flows, program.steps, entry, count)
            repeats = all(read.repeats for i in program.steps for read in flows[i].reads if read.entry == entry)
            columns = [] if count == 1 and repeats else [lookup(g, column, step, dtype) for column in weights_TO.T]
            cached[entry] = forecast(values, columns)
        return cached

    def _entry_shape(self, entry: Entry) -> list[int | str]:
        """Shape of an entry in the graphs: a row for every image, or for every row of an undivided batch."""
        return ["batch" if entry.half or entry.kind == "guidance" else "rows", *entry_shape(self.plan, entry)]

    def _kept(self, g: Graph, step: Sym, program: Program) -> tuple[Any, ...]:
        """Kept tokens [K] of static segments, looked up by step; where any are put into place, the rows of the batch are numbered."""
        if any(s.mode == "partial" for s in program.segments):
            g.row_pairs = g.input("numbers", "int64", ["rows"])[:, None, None] * g.constant(np.array([1, 0]), "int64")
        return tuple(
            self._tokens(g, step, {i: kept_tokens(self.plan, i, segment) for i in program.steps})
            if segment.mode == "partial" and not segment.is_content
            else None
            for segment in program.segments
        )

    def _tokens(self, g: Graph, step: Sym, tokens: dict[int, tuple[int, ...]]) -> Sym:
        """This step's tokens [K]; a constant if all steps share them."""
        if len({*tokens.values()}) == 1:
            return g.constant(np.array(next(iter(tokens.values()))), "int64")
        counts_T = np.array([len(tokens.get(i, ())) for i in range(self.plan.num_steps)])
        tokens_TK = np.zeros((self.plan.num_steps, counts_T.max()), dtype=np.int64)
        for i, kept in tokens.items():
            tokens_TK[i, : len(kept)] = kept
        tokens_K = lookup(g, tokens_TK, step, "int64")
        if len({*map(len, tokens.values())}) == 1:
            return tokens_K
        zero, count = g.constant(np.array([0]), "int64"), lookup(g, counts_T, step, "int64").reshape(1)
        return g.op("Slice", tokens_K, zero, count, shape=(None,))

    def _coefficients(self, g: Graph, step: Sym, table: SamplerTable) -> Coefficients:
        def column(name: str) -> Sym:
            return lookup(g, np.array([getattr(row, name) for row in table.steps]), step, "fp32")

        past = tuple(column(f"next_{name}") for name in PAST[: table.history])
        return Coefficients(column("m_x"), column("m_eps"), column("next_x"), column("next_m"), past)


def _union(programs: Sequence[Program]) -> Program:
    """What a graph shared by these programs does: the segments of one that is partial, all reads, all writes, all steps."""
    example = max(programs, key=lambda p: len(p.reads))
    writes = tuple(sorted({entry for p in programs for entry in p.writes}))
    return dataclasses.replace(example, name=example.graph, writes=writes, steps=tuple(sorted(i for p in programs for i in p.steps)))


def forecast_table(flows: Sequence[StepFlow], steps: tuple[int, ...], entry: Entry, count: int) -> np.ndarray:
    """Forecast weights [T, count] of an entry at the given steps; 0 for past values that do not exist yet, or are not read."""
    table_TO = np.zeros((len(flows), count))
    for i in steps:
        weights = next((read.weights for read in flows[i].reads if read.entry == entry), ())
        table_TO[i, : len(weights)] = weights
    return table_TO
