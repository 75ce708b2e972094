"""A simulated server against closed forms: Pollaczek and Khinchine, batches worked by hand, and what holds of every run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.bench.fleet.figures import Figures, figures_of, queue_table, simulated
from export.bench.fleet.load import Kind, mean_work, poisson, require_mixture
from export.bench.fleet.server import Batch, Server, serve_rows
from tc_lightning.errors import TokenCacheError

ONE = (Kind("artefact"),)
BLOCKS = 40


def waits(server: Server, rate: float, kinds: tuple[Kind, ...], rows: int = 60_000) -> np.ndarray:
    """Seconds from arrival to start, in the order of service, without batching."""
    arrivals, numbers = poisson(rate, kinds, rows, seed=1)
    served = serve_rows(server, arrivals.tolist(), numbers.tolist(), [kind.work for kind in kinds])
    return np.array([batch.start_s - arrivals[batch.rows[0]] for batch in served.batches])


def require_mean(values: np.ndarray, expected: float) -> None:
    """Within three standard errors, which means of long blocks tell, and which are small enough to tell anything."""
    means = values[: len(values) // BLOCKS * BLOCKS].reshape(BLOCKS, -1).mean(1)
    error = means.std(ddof=1) / math.sqrt(BLOCKS)
    assert error < 0.1 * expected
    assert abs(means.mean() - expected) < 3 * error


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_rows_wait_as_pollaczek_and_khinchine_say(load):
    found = waits(Server(0.3, 0.2), load / 0.5, ONE)
    require_mean(found, load * 0.5 / (2 * (1 - load)))


def test_so_do_cached_and_full_rows_that_come_mixed():
    """M/G/1, first come first served: the mean wait is rate * E[S^2] / 2(1 - load)."""
    kinds, rate = (Kind("cached", 0.75), Kind("full", 0.25, 3.0)), 0.8
    load, second = rate * (0.75 * 0.5 + 0.25 * 1.5), 0.75 * 0.5**2 + 0.25 * 1.5**2
    assert load == pytest.approx(rate * 0.5 * mean_work(kinds))
    require_mean(waits(Server(0.0, 0.5), rate, kinds), rate * second / (2 * (1 - load)))


def test_batches_worked_by_hand():
    """Batches of two at most take 2 s and 1 s for each row; a row waits half a second for others; two kinds.

    At 0 a comes, at 0.5 it starts alone, and ends at 3.5; meanwhile a, b, a, a come. At 3.5 two of a are first, and end at 7.5. Then b,
    which came before the last a, starts alone, of twice the work: it ends at 13.5. The last a starts then, for it waited long enough.
    At 20 nothing runs, and two rows of b that come 0.4 s after each other start when the second is there.
    """
    arrivals, kinds = [0.0, 1.0, 1.5, 2.0, 3.0, 20.0, 20.4], [0, 0, 1, 0, 0, 1, 1]
    served = serve_rows(Server(2.0, 1.0, 2, 0.5), arrivals, kinds, [1.0, 2.0])
    assert served.batches == [
        Batch(0, 0.5, 3.5, (0,)),
        Batch(0, 3.5, 7.5, (1, 3)),
        Batch(1, 7.5, 13.5, (2,)),
        Batch(0, 13.5, 16.5, (4,)),
        Batch(1, 20.4, 28.4, (5, 6)),
    ]
    assert served.refused == []


def test_rows_that_find_the_queue_full_are_refused():
    """A row a second, two seconds each, two may wait: from the sixth on every second row finds them both."""
    served = serve_rows(Server(2.0, 0.0, queue=2), [float(i) + 0.5 * (i > 0) for i in range(12)], [0] * 12)
    assert [batch.start_s for batch in served.batches] == [0.0, *(2.0 * i for i in range(1, len(served.batches)))]
    assert served.refused == [5, 7, 9, 11]


def test_rows_of_one_moment_share_a_batch_even_if_none_waits():
    served = serve_rows(Server(1.0, 0.0, 4), [1.0] * 6, [0] * 6)
    assert [batch.rows for batch in served.batches] == [(0, 1, 2, 3), (4, 5)]


@settings(max_examples=80, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 2) | st.integers(0, 60), min_size=1, max_size=60),
    data=st.data(),
    most=st.integers(1, 4),
    timeout=st.integers(0, 30),
    room=st.none() | st.integers(4, 8),
)
def test_what_holds_of_every_run(gaps, data, most, timeout, room):
    """Nothing is lost or served twice, batches never overlap, and a free server lets no row wait longer than it may. Whole seconds."""
    server = Server(5.0, 2.0, most, float(timeout), room)
    arrivals = np.cumsum(gaps).astype(float).tolist()
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=len(gaps), max_size=len(gaps)))
    work = [1.0, 2.0, 3.0]
    served = serve_rows(server, arrivals, kinds, work)
    ran = [row for batch in served.batches for row in batch.rows]
    assert sorted(ran + served.refused) == list(range(len(gaps)))
    assert room is not None or served.refused == []
    for kind in range(3):
        assert (own := [row for row in ran if kinds[row] == kind]) == sorted(own)
    free, start_of = 0.0, {row: batch.start_s for batch in served.batches for row in batch.rows}
    for batch in served.batches:
        assert {kinds[row] for row in batch.rows} == {batch.kind}
        assert 1 <= len(batch.rows) <= most
        assert batch.end_s - batch.start_s == work[batch.kind] * (5.0 + 2.0 * len(batch.rows))
        assert batch.start_s >= max(free, arrivals[batch.rows[-1]])
        if batch.start_s > free:  # it was free before: for want of a full batch and of a row that had waited long enough
            late = [row for row, start in start_of.items() if arrivals[row] <= batch.start_s <= start]
            assert max(batch.start_s - arrivals[row] for row in late) <= timeout
            assert batch.start_s - arrivals[batch.rows[0]] == timeout or len(batch.rows) == most
        free = batch.end_s
    for row, at in enumerate(arrivals):
        before = sum(other < row and at <= start for other, start in start_of.items())  # those that row finds waiting
        assert room is None or (before == room if row in served.refused else before < room)


@pytest.mark.parametrize(("rate", "batch"), [(0.4, 1), (1.2, 1), (1e-4, 8)])
def test_a_server_that_keeps_up_is_busy_for_rate_times_service(rate, batch):
    """With batches it is so where they have one row: the last of these rates is so low that two never meet."""
    found = simulated(Server(0.3, 0.2, batch, 0.0), ONE, rate, 40_000, seed=2)
    assert found.utilisation == pytest.approx(rate * 0.5, rel=0.02)
    assert found.throughput == pytest.approx(rate, rel=0.02)
    assert found.refused == 0


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_server_that_cannot_keep_up_does_full_batches_one_after_the_other(batch):
    server = Server(0.6, 0.1, batch, 0.05, 64)
    found = simulated(server, ONE, 5 * server.capacity, 20_000, seed=3)
    assert server.capacity == batch / (0.6 + 0.1 * batch)
    assert (found.utilisation, found.batches_of(batch), found.rows_a_batch) == (pytest.approx(1), 1, batch)
    assert found.throughput == pytest.approx(server.capacity, rel=2 * batch / 4000)  # a batch more or less of the 4,000 rows and more
    assert found.refused == pytest.approx(1 - 1 / 5, abs=0.02)
    assert found.p50_s == pytest.approx((64 / batch + 1) / (server.capacity / batch), rel=0.1)  # all that wait, and its own batch


def test_figures_by_hand():
    """Ten rows, a second apart, of which the first second is left out; each takes half a second alone."""
    arrivals = np.arange(1.0, 11.0)
    found = figures_of(serve_rows(Server(0.5, 0.0), arrivals.tolist(), [0] * 10), arrivals)
    assert found == Figures(pytest.approx(9 * 0.5 / 9), pytest.approx(1.0), 0.5, 0.5, 0.0, {1: 10})


def test_a_seed_says_it_all_and_another_says_something_else():
    kinds = (Kind("cached", 9), Kind("full", 1, 2.5))
    first, again, other = (simulated(Server(0.3, 0.2, 8, 0.01, 64), kinds, 3.0, 2000, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_kinds_come_as_often_as_they_say():
    arrivals, numbers = poisson(4.0, (Kind("a", 3), Kind("b", 1)), 40_000, seed=0)
    assert (numbers == 1).mean() == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / 40_000))
    assert arrivals[-1] == pytest.approx(10_000, rel=3 / math.sqrt(40_000))
    np.testing.assert_allclose(poisson(8.0, ONE, 100, seed=0)[0], poisson(4.0, ONE, 100, seed=0)[0] / 2)


def test_batches_grow_until_the_server_keeps_up_and_kinds_wait_for_each_other():
    """A server that is always busy makes batches of b rows where rate = b / (fixed + each * b), however many kinds they are of."""
    server, four = Server(0.9, 0.1, 16, 0.0, 256), tuple(Kind(name) for name in "abcd")
    together, apart = (simulated(server, kinds, 3.0, 20_000, seed=0) for kinds in (ONE, four))
    for found in (together, apart):
        assert found.utilisation > 0.99
        assert found.rows_a_batch == pytest.approx(0.9 * 3.0 / (1 - 0.1 * 3.0), rel=0.05)
    assert apart.p50_s > 1.5 * together.p50_s


def test_a_table_has_a_line_for_each_server_at_each_rate():
    lines = queue_table([Server(0.3, 0.2), Server(0.3, 0.2, 4)], ONE, [1.0, 2.0, 3.0], 500, 0).splitlines()
    assert len(lines) == 2 + 6
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Server(-0.1, 0.2), "fixed_s is -0.1: give seconds, 0 or more"),
        (lambda: Server(0.1, math.nan), "each_s is nan"),
        (lambda: Server(0.0, 0.0), "takes no time at all"),
        (lambda: Server(0.1, 0.1, 0), "max_batch is 0"),
        (lambda: Server(0.1, 0.1, 4, -1.0), "timeout_s is -1.0"),
        (lambda: Server(0.1, 0.1, 16, 0.0, 8), "a queue of 8 rows never holds a batch of 16"),
        (lambda: Kind("a", 0.0), "the share of rows of the kind 'a' is 0.0"),
        (lambda: Kind("a", 1.0, math.inf), "the work of rows of the kind 'a' is inf"),
        (lambda: Kind.parse("a:b"), "write NAME:SHARE or NAME:SHARE:WORK"),
        (lambda: Kind.parse(":1"), "cannot be ':1'"),
        (lambda: Kind.parse("a:1:2:3"), "cannot be 'a:1:2:3'"),
        (lambda: require_mixture(()), "are none"),
        (lambda: require_mixture((Kind("a"), Kind("a", 2))), "each but once"),
        (lambda: simulated(Server(0.1, 0.1), ONE, 0.0, 500, 0), "a rate of 0.0 rows a second"),
        (lambda: simulated(Server(0.1, 0.1), ONE, 1.0, 5, 0), "5 rows are too few"),
        (lambda: simulated(Server(0.1, 0.1), ONE, 1.0, 500, -1), "seed -1"),
        (lambda: simulated(Server(1e9, 0.1), ONE, 1.0, 500, 0), "too few were served to tell"),
    ],
)
def test_what_cannot_be_is_refused_in_words(make, words):
    with pytest.raises(TokenCacheError, match=words):
        make()
