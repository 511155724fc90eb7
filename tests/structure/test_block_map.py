"""The picture of a weight's blocks: by hand, against brute force, and in pieces."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_muws.structure.block_map import COLOURS, BlockMap, Sketch
from lightning_muws.structure.kinds import Kind


def kinds_of(seed: int, down: int, across: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (down, across)).astype(np.uint8)


def test_a_cell_of_several_blocks_has_the_mean_of_their_colours():
    kinds = np.array([[0, 0, 2], [1, 2, 2]], np.uint8)
    found = BlockMap.of(kinds, most=2)
    assert (found.cell, found.n_blocks, found.counts.shape) == ((1, 2), (2, 3), (2, 2, 3))
    assert found.counts[0].tolist() == [[2, 0, 0], [0, 0, 1]]
    middle = (np.array(COLOURS[Kind.UNIFIED]) + COLOURS[Kind.PRUNED]) / 2
    assert found.pixels()[1, 0].tolist() == np.rint(middle).tolist()
    assert str(found) == "2 x 3 blocks, a pixel is 1 x 2 blocks"


def test_small_weights_have_a_pixel_a_block():
    kinds = kinds_of(0, 7, 5)
    found = BlockMap.of(kinds)
    assert found.is_exact
    assert found.pixels().tolist() == [[list(COLOURS[Kind(kind)]) for kind in row] for row in kinds.tolist()]


@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_cells_count_their_blocks_and_no_block_is_lost(seed, down, across, most):
    kinds = kinds_of(seed, down, across)
    found = BlockMap.of(kinds, most)
    assert max(found.counts.shape[:2]) <= most
    assert found.totals == tuple(np.bincount(kinds.reshape(-1), minlength=3).tolist())
    rows, cols = found.cell
    for i, j in np.ndindex(found.counts.shape[:2]):
        cell = kinds[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        assert found.counts[i, j].tolist() == np.bincount(cell.reshape(-1), minlength=3).tolist()


@given(st.integers(0, 99), st.integers(1, 40), st.lists(st.integers(1, 40), max_size=5), st.integers(1, 12))
def test_rows_a_few_at_a_time_make_the_same_map(seed, across, cuts, most):
    kinds = kinds_of(seed, 40, across)
    sketch = Sketch((40, across), most)
    for rows in np.split(kinds, sorted(cuts)):
        sketch.add(rows)
    assert np.array_equal(sketch.map().counts, BlockMap.of(kinds, most).counts)
