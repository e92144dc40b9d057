"""Masks: counts, shapes of the hidden region, and that a mask is a function of its generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_convmae import masking

grids = st.tuples(st.integers(1, 8), st.integers(1, 14), st.integers(1, 14))
ratios = st.floats(0, 0.99)
seeds = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", masking.MASKS)
@given(grid=grids, ratio=ratios, seed=seeds)
def test_count_depends_on_grid_and_ratio_alone(kind: str, grid: masking.Grid, ratio: float, seed: int) -> None:
    t, h, w = grid
    visible = masking.MASKS[kind](grid, ratio, generator(seed))
    hidden = t * int(ratio * (h * w)) if kind == "tube" else int(ratio * (t * h * w))
    assert visible.shape == grid
    assert visible.dtype == torch.bool
    assert int((~visible).sum()) == hidden
    assert torch.equal(visible, masking.MASKS[kind](grid, ratio, generator(seed)))


@given(grid=grids, ratio=ratios, seed=seeds)
def test_tube_is_constant_in_time(grid: masking.Grid, ratio: float, seed: int) -> None:
    visible = masking.tube(grid, ratio, generator(seed))
    assert (visible == visible[:1]).all()


@given(grid=grids, ratio=ratios, seed=seeds)
def test_frame_cuts_at_most_one_frame(grid: masking.Grid, ratio: float, seed: int) -> None:
    per_frame = masking.frame(grid, ratio, generator(seed)).flatten(1).sum(1)
    assert int(((per_frame > 0) & (per_frame < grid[1] * grid[2])).sum()) <= 1


@pytest.mark.parametrize("kind", ["random", "tube", "frame"])
@given(grid=grids, ratio=st.floats(0.01, 0.99), count=st.integers(1, 8), seed=seeds)
def test_complementary_masks_are_disjoint(grid: masking.Grid, ratio: float, count: int, seed: int, kind: str) -> None:
    t, h, w = grid
    places = h * w if kind == "tube" else t * h * w
    n = places - int(ratio * places)
    if count * n > places:
        with pytest.raises(ValueError, match="do not fit"):
            masking.complementary(grid, ratio, count, generator(seed), kind)
        return
    visible = masking.complementary(grid, ratio, count, generator(seed), kind)
    assert visible.shape == (count, *grid)
    assert (visible.flatten(1).sum(1) == n * (t if kind == "tube" else 1)).all()
    assert int(visible.sum(0).max()) == 1
    if kind == "tube":
        assert (visible == visible[:, :1]).all()


def test_four_complementary_masks_cover_the_image() -> None:
    assert masking.complementary((1, 14, 14), 0.75, 4).any(0).all()


def test_nine_disjoint_masks_of_tubes_at_nine_tenths() -> None:
    visible = masking.complementary((8, 14, 14), 0.9, 9, kind="tube")
    assert (visible.flatten(2).sum(2) == 20).all()
    assert int(visible.any(0)[0].sum()) == 180
    with pytest.raises(ValueError, match="there can be 1 to 9"):
        masking.complementary((8, 14, 14), 0.9, 10, kind="tube")


def test_blocks_have_no_complementary_masks() -> None:
    with pytest.raises(ValueError, match="expected random, tube or frame"):
        masking.draw("block", (8, 14, 14), 0.9, count=2)


def test_twenty_of_196_are_visible_at_nine_tenths() -> None:
    assert (masking.tube((8, 14, 14), 0.9).flatten(1).sum(1) == 20).all()


def test_block_hides_neighbours() -> None:
    """A hidden token's right neighbour is hidden more often than in a random mask of the same ratio."""

    def share(mask: masking.Mask) -> float:
        hidden = torch.stack([~mask((8, 14, 14), 0.5, generator(seed)) for seed in range(20)])
        return float((hidden[..., 1:] & hidden[..., :-1]).sum() / hidden[..., :-1].sum())

    assert share(masking.block) > 0.75 > 0.6 > share(masking.random)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2])
def test_impossible_ratio_is_an_error(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask ratio"):
        masking.tube((8, 14, 14), ratio)


def test_impossible_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="token grid"):
        masking.random((8, 0, 14), 0.5)


@given(grid=grids, ratio=ratios, share=st.floats(0.05, 1), seed=seeds, kind=st.sampled_from(sorted(masking.MASKS)))
def test_predicted_tokens_are_hidden_and_counted(
    grid: masking.Grid, ratio: float, share: float, seed: int, kind: str
) -> None:
    visible = masking.MASKS[kind](grid, ratio, generator(seed))
    hidden = int((~visible).sum())
    if int(share * hidden) == 0:
        with pytest.raises(ValueError, match="predicts none"):
            masking.running_cell(visible, share)
        return
    predicted = masking.running_cell(visible, share)
    assert int(predicted.sum()) == int(share * hidden)
    assert not (predicted & visible).any()
    assert torch.equal(predicted, masking.running_cell(visible, share))


def test_running_cells_turn_from_frame_to_frame() -> None:
    predicted = masking.running_cell(torch.zeros(5, 4, 6, dtype=torch.bool), 0.5)
    cells = predicted.view(5, 2, 2, 3, 2).sum((2, 4))
    assert (cells == 2).all()  # two of each cell's four in every frame
    assert torch.equal(predicted[0], predicted[4])
    assert torch.equal(predicted[0], ~predicted[2])
    assert not torch.equal(predicted[0], predicted[1])


@pytest.mark.parametrize("kind", masking.MASKS)
def test_every_token_is_predicted_under_some_mask(kind: str) -> None:
    shares = torch.zeros(4, 6, 6)
    for seed in range(300):
        shares += masking.running_cell(masking.MASKS[kind]((4, 6, 6), 0.75, generator(seed)), 0.5)
    assert shares.min() > 0


@pytest.mark.parametrize("share", [0, -1, 1.01])
def test_impossible_shares_are_errors(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        masking.running_cell(torch.zeros(1, 2, 2, dtype=torch.bool), share)


@pytest.mark.parametrize("kind", masking.MASKS)
def test_a_draw_is_the_mask_and_its_running_cells(kind: str) -> None:
    grid = (4, 6, 6)
    expected = masking.MASKS[kind](grid, 0.75, generator(0))
    visible, predicted = masking.draw(kind, grid, 0.75, generator=generator(0))
    assert torch.equal(visible, expected)
    assert predicted is None
    visible, predicted = masking.draw(kind, grid, 0.75, 0.5, generator(0))
    assert torch.equal(visible, expected)
    assert torch.equal(predicted, masking.running_cell(expected, 0.5))


@pytest.mark.parametrize("decoder_ratio", [0, 1.5])
def test_impossible_draws_are_errors(decoder_ratio: float) -> None:
    with pytest.raises(ValueError, match="decoder_ratio"):
        masking.draw("tube", (1, 4, 4), 0.5, decoder_ratio)
    with pytest.raises(ValueError, match="expected one of tube"):
        masking.draw("stripes", (1, 4, 4), 0.5)
