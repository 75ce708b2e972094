"""ECAD's search: ranking, crossover and budget, by hand and on a model whose errors are known."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SIGNATURE
from recipes import XL

from tc_lightning.plan.costs import block_macs, full_step_macs
from tc_lightning.policies.ecad import GeneticSearch, Judged, ranking, survivors
from tc_lightning.policies.routers import macs_of_branches

T, L = 6, SIGNATURE.depth
FULL = T * full_step_macs(SIGNATURE)


def searching(share: float, seed: int = 0, mutation: float = 0.05) -> GeneticSearch:
    return GeneticSearch(SIGNATURE, T, share * FULL, np.random.default_rng(seed), mutation)


def test_fronts_come_one_after_the_other_and_their_ends_first() -> None:
    """(1, 5), (2, 3), (3, 2), (5, 1) are the first front, and (3, 2.5) is the second."""
    points = [(3.0, 2.5), (2.0, 3.0), (5.0, 1.0), (6.0, 6.0), (1.0, 5.0), (3.0, 2.0)]
    assert sorted(ranking(points)[:2]) == [2, 4]
    assert sorted(ranking(points)[2:4]) == [1, 5]
    assert ranking(points)[4:] == [0, 3]
    lonely = [(0.0, 10.0), (1.0, 9.0), (2.0, 8.0), (9.0, 1.0), (10.0, 0.0)]
    assert sorted(ranking(lonely)[:2]) == [0, 4]
    assert sorted(ranking(lonely)[2:4]) == [2, 3]  # 1 has two near neighbours
    assert sorted(ranking([(1.0, np.inf), (2.0, np.inf), (1.0, 1.0)])[:1]) == [2]


def test_the_first_of_the_ranking_survive() -> None:
    genomes = [Judged(np.ones((1, 1, 1), dtype=bool), *point) for point in ((2.0, 2.0), (1.0, 1.0), (3.0, 3.0))]
    assert [one.macs for one in survivors(genomes, 2)] == [1.0, 2.0]


def test_genomes_keep_to_the_budget_and_use_it() -> None:
    dearest = max(block_macs(SIGNATURE, SIGNATURE.tokens, (branch,)) for branch in ("attn", "mlp"))
    for share in (0.3, 0.6, 0.95):
        search = searching(share)
        genome = search.affordable(np.ones((T, L, 2), dtype=bool))
        assert genome[0].all()
        assert search.budget - dearest <= macs_of_branches(SIGNATURE, genome) <= search.budget * (1 + 1e-9)
    nothing = np.zeros((T, L, 2), dtype=bool)
    assert searching(0.5).affordable(nothing)[0].all()
    assert not searching(0.5).affordable(nothing)[1:].any()


def test_the_first_generation_holds_fora() -> None:
    first = searching(0.6).first(4, 3)
    assert np.flatnonzero(first[0].all((1, 2))).tolist() == [0, 2, 4]
    assert not first[0][[1, 3, 5]].any()
    assert np.flatnonzero(first[2].all((1, 2))).tolist() == [0, 3]
    assert 0 < first[1][1:].mean() < 1
    assert all(macs_of_branches(SIGNATURE, genome) <= 0.6 * FULL * (1 + 1e-9) for genome in first)


@pytest.mark.parametrize("seed", range(3))
def test_generations_find_what_matters(seed: int) -> None:
    """Only the last steps' MLPs matter: the search gets below the first generation, and never above the budget."""
    search, tried = searching(0.6, seed), []

    def error(computed: np.ndarray) -> float:
        tried.append(computed)
        return float((~computed[3:, :, 1]).sum())

    first = search.first(8, 3)
    found = search.run(error, first, 12)
    assert error(found) < min(float((~g[3:, :, 1]).sum()) for g in first)
    assert all(macs_of_branches(SIGNATURE, g) <= search.budget * (1 + 1e-9) and g[0].all() for g in tried)
    assert len(tried) <= 8 * 13 + 1  # and the one of the line before
    again = searching(0.6, seed)
    assert np.array_equal(found, again.run(error, again.first(8, 3), 12))


def test_other_shapes() -> None:
    search = GeneticSearch(XL, 4, 2.5 * full_step_macs(XL), np.random.default_rng(0), 0.01)
    assert search.first(2, 2)[1].shape == (4, 28, 2)
