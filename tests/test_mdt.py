"""MDTv2: positions, long skips and the whole forward, each against the formulas of the release written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mdt_models import CONFIG, HEADS, batch, make_mdt, pairwise_rows, published, released

from tc_lightning.errors import TeacherError
from tc_lightning.models.families import family_of
from tc_lightning.models.mdt import MDT, MDTConfig, relative_positions
from tc_lightning.plan.skips import EMBEDDING

XL = MDTConfig()


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_the_index_of_positions_is_that_of_two_loops(grid: int) -> None:
    assert torch.equal(relative_positions(grid), pairwise_rows(grid))


def test_equal_offsets_have_one_row_and_others_another() -> None:
    rows = relative_positions(3)
    offsets: dict[int, set[tuple[int, int]]] = {}
    for i in range(9):
        for j in range(9):
            offsets.setdefault(int(rows[i, j]), set()).add((i // 3 - j // 3, i % 3 - j % 3))
    assert all(len(found) == 1 for found in offsets.values())
    assert sorted(offsets) == list(range(25))


def test_the_bias_of_a_pair_is_its_row_of_the_table() -> None:
    block, z = make_mdt().blocks[0], torch.zeros(2, 16, 32)
    bias, table, rows = block.position_bias(z), block.relative_position_bias_table, pairwise_rows(4)
    assert bias.shape == (1, HEADS, 16, 16)
    for head in range(HEADS):
        for i in range(16):
            for j in range(16):
                assert bias[0, head, i, j] == table[rows[i, j], head]


def test_kept_tokens_have_their_own_rows_of_the_bias() -> None:
    block, z = make_mdt().blocks[1], torch.zeros(2, 3, 32)
    whole = block.position_bias(z)
    same = torch.tensor([0, 7, 12])
    assert torch.equal(block.position_bias(z, same), whole[:, :, same])
    own = torch.tensor([[0, 7, 12], [15, 2, 3]])
    gathered = block.position_bias(z, own)
    assert gathered.shape == (2, HEADS, 3, 16)
    assert all(torch.equal(gathered[b], whole[0][:, own[b]]) for b in range(2))


def test_positions_of_the_decoder_are_added_before_its_first_skip_alone() -> None:
    mdt, z, skip = make_mdt(), torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    first, second = mdt.blocks[4], mdt.blocks[5]
    assert [block.pos_embed is None for block in mdt.blocks] == [True] * 4 + [False, True]
    at = torch.tensor([[1, 2, 8], [0, 4, 15]])
    moved = z + first.pos_embed[at]
    torch.testing.assert_close(first.merge(z, skip, at), first.skip_linear(torch.cat([moved, skip], -1)))
    torch.testing.assert_close(first.merge(z, skip, at[0]), first.skip_linear(torch.cat([z + first.pos_embed[at[0]], skip], -1)))
    torch.testing.assert_close(second.merge(z, skip, at), second.skip_linear(torch.cat([z, skip], -1)))


def test_skips_lead_where_the_release_leads_them() -> None:
    assert [XL.source(b) for b in (0, 11, 12, 13, 23, 24, 27)] == [None, None, 11, 10, 0, EMBEDDING, EMBEDDING]
    assert make_mdt().skips == ((1, 2), (0, 3), (EMBEDDING, 4), (EMBEDDING, 5))


def test_skips_by_hand() -> None:
    """Blocks that add a number and nothing else, and skips that weigh the two streams: tokens can be followed on paper."""
    mdt = MDT(dataclasses.replace(CONFIG, hidden_size=4, depth=5, decode_layers=1)).eval().requires_grad_(False)
    adds, weights = [1.0, 2.0, 4.0, 8.0, 16.0], {2: (0.5, 3.0), 3: (2.0, -1.0), 4: (-1.0, 0.25)}
    for b, block in enumerate(mdt.blocks):
        for parameter in block.parameters():
            parameter.zero_()
        block.adaLN_modulation[1].bias[-4:] = 1.0  # the MLP's gate; attention has none
        block.mlp.fc2.bias.fill_(adds[b])
        if b in weights:
            block.skip_linear.weight.copy_(torch.cat([w * torch.eye(4) for w in weights[b]], 1))
    mdt.blocks[4].pos_embed.fill_(32.0)
    z = torch.randn(2, 16, 4)
    first = z + 1
    second = first + 2
    third = 0.5 * second + 3.0 * second + 4
    fourth = 2.0 * third - 1.0 * first + 8
    fifth = -1.0 * (fourth + 32) + 0.25 * z + 16
    seen: list[torch.Tensor] = []
    mdt.embed = lambda x, *start: z  # type: ignore[method-assign]
    mdt.readout = lambda z, mod: seen.append(z) or torch.zeros(2, 8, 8, 8)  # type: ignore[method-assign]
    mdt(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(seen[0], fifth)


@pytest.mark.parametrize(
    "changes",
    [{}, {"decode_layers": 4}, {"learn_sigma": False}, {"depth": 5, "decode_layers": 1}, {"input_size": 6, "mlp_ratio": 2.0}],
)
def test_the_forward_is_that_of_the_release(changes: dict[str, int]) -> None:
    mdt = make_mdt(config=dataclasses.replace(CONFIG, **changes))
    x, t, y = batch(mdt.config)
    expected = published(released(mdt), x, t, y, HEADS)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(mdt(x, t, y), expected, atol=1e-5, rtol=1e-5)


def test_the_forward_at_the_real_widths() -> None:
    mdt = make_mdt(config=MDTConfig(depth=3, decode_layers=1, num_classes=10, input_size=16))
    for parameter in mdt.parameters():
        parameter.mul_(0.1)
    x, t, y = batch(mdt.config)
    expected = published(released(mdt), x, t, y, 16)
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(mdt(x, t, y), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"decode_layers": 0}, {"decode_layers": 6}, {"decode_layers": 3}])
def test_blocks_that_no_encoder_and_decoder_share(wrong: dict[str, int]) -> None:
    with pytest.raises(TeacherError, match=r"MDT decode_layers is \d of 6 blocks; there must be at least 1"):
        dataclasses.replace(CONFIG, **wrong)


def test_messages_of_its_shape_name_it() -> None:
    with pytest.raises(TeacherError, match="MDT hidden_size 30 must be"):
        dataclasses.replace(CONFIG, hidden_size=30)


def test_it_is_listed() -> None:
    assert family_of("mdt") == (MDT, MDTConfig)
