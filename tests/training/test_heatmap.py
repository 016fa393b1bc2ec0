"""The picture of loads: its pixels show what was given."""

import io

import numpy as np
import pytest

from stellarbyte_jax.training import heatmap
from stellarbyte_jax.training.heatmap import thinned
from stellarbyte_jax.training.loads import Loads


@pytest.fixture
def image_of():
    """Draws loads; gives the pixels [rows, columns, 3], from 0 to 1."""
    pytest.importorskip("matplotlib", reason="pip install -e '.[report]'")
    import matplotlib.image

    def draw(shares_SLE, layers=None, steps=None):
        shares_SLE = np.asarray(shares_SLE, np.float32)
        S, L, _ = shares_SLE.shape
        steps = np.arange(1.0, S + 1) if steps is None else np.asarray(steps, float)
        made = heatmap.draw(Loads(steps, layers or tuple(range(L)), shares_SLE))
        return matplotlib.image.imread(io.BytesIO(made))[..., :3]

    return draw


def share_of(pixels, color, tolerance=0.02):
    """Share of the pixels that have a color."""
    return np.mean(np.all(np.abs(pixels - np.array(color)) < tolerance, axis=-1))


DEAD = tuple(int(heatmap._DEAD_COLOR[i : i + 2], 16) / 255 for i in (1, 3, 5))
RED, BLUE = (0.40, 0.0, 0.12), (0.02, 0.19, 0.38)  # the ends of the scale


def panel_of(pixels):
    """The part within the frame of the first panel, whose lines are black over their whole length."""
    black = np.all(pixels < 0.1, axis=-1)
    rows = np.flatnonzero(black.sum(axis=1) > 0.4 * pixels.shape[1])
    columns = np.flatnonzero(black.sum(axis=0) > 0.4 * pixels.shape[0])
    return pixels[rows[0] + 2 : rows[-1] - 1, columns[0] + 2 : columns[-1] - 1]


def test_experts_lie_in_rows_and_steps_in_columns(image_of):
    """Expert 0 gets all in the first half, expert 3 in the second, 1 and 2 nothing."""
    shares = np.zeros((8, 1, 4))
    shares[:4, 0, 0] = shares[4:, 0, 3] = 1
    panel = panel_of(image_of(shares))
    rows, columns = panel.shape[:2]
    for expert in range(4):
        for half in range(2):
            top, left = rows * expert // 4 + 4, columns * half // 2 + 4
            part = panel[top : top + rows // 4 - 8, left : left + columns // 2 - 8]
            assert share_of(part, RED if (expert, half) in ((0, 0), (3, 1)) else DEAD) > 0.9, (expert, half)


def test_colors_are_of_the_load_over_the_fair_share(image_of):
    """Even is white; twice the share is as far from it as half of it; below 1 % has a color of its own."""
    panel = panel_of(image_of(np.tile([0.25, 0.25, 0.5, 0.125, 0.0625, 0.0024, 0.0026, 0.0], (2, 1, 1)) / 2))
    rows = panel[np.arange(8) * panel.shape[0] // 8 + panel.shape[0] // 16, panel.shape[1] // 2]
    assert np.all(rows[0] > 0.95) and np.all(rows[1] > 0.95)
    assert rows[2][0] > rows[2][2] + 0.2 and rows[3][2] > rows[3][0] + 0.2, "red, blue"
    assert np.allclose(rows[4], BLUE, atol=0.03) and np.allclose(rows[6], BLUE, atol=0.03)
    assert np.allclose(rows[5], DEAD, atol=0.03) and np.allclose(rows[7], DEAD, atol=0.03)


def test_means_over_stretches_keep_the_whole_and_the_steps():
    shares = np.random.default_rng(0).dirichlet(np.ones(5), (1003, 2))
    steps = np.arange(10.0, 10040, 10)
    edges, means = thinned(steps, shares)
    assert means.shape == (heatmap._MOST_COLUMNS, 2, 5) and len(edges) == len(means) + 1
    assert (edges[0], edges[-1]) == (0, steps[-1]) and np.all(np.diff(edges) > 0)
    lines = np.diff(edges) / 10
    np.testing.assert_allclose(np.average(means, axis=0, weights=lines), shares.mean(axis=0))
    first = int(lines[0])
    np.testing.assert_allclose(means[0], shares[:first].mean(axis=0))


@pytest.mark.parametrize(("steps", "edges"), [([7], [0, 7]), ([10, 20, 30], [0, 10, 20, 30]), ([4, 5], [3, 4, 5])])
def test_few_lines_are_columns_of_their_own(steps, edges):
    shares = np.random.default_rng(0).dirichlet(np.ones(3), (len(steps), 1))
    found, kept = thinned(np.array(steps, float), shares)
    assert found.tolist() == edges
    np.testing.assert_allclose(kept, shares)


@pytest.mark.parametrize(("layers", "experts", "lines"), [(12, 64, 300), (2, 8, 5), (1, 1, 1), (5, 3, 2)])
def test_pictures_of_all_sizes_have_a_panel_for_each_layer(image_of, layers, experts, lines, monkeypatch):
    titles, panel = [], heatmap._panel
    monkeypatch.setattr(heatmap, "_panel", lambda *args: titles.append(args[3]) or panel(*args))
    numbers = tuple(range(3, 3 + layers))
    pixels = image_of(np.random.default_rng(0).dirichlet(np.ones(experts), (lines, layers)), numbers)
    assert titles == [f"layer {number}" for number in numbers]
    assert max(pixels.shape) < 1500


def test_there_is_an_end_to_the_panels(image_of, monkeypatch):
    monkeypatch.setattr(heatmap, "_MOST_LAYERS", 2)
    drawn, panel = [], heatmap._panel
    monkeypatch.setattr(heatmap, "_panel", lambda *args: drawn.append(args) or panel(*args))
    assert max(image_of(np.full((2, 4, 2000), 1 / 2000), steps=[50, 80]).shape) < 1500
    assert [title for *_, title in drawn] == ["layer 0", "layer 1"]
    assert [edges.tolist() for _, edges, *_ in drawn] == [[20, 50, 80]] * 2, "the axis counts steps"
