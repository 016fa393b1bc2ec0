"""Curves: averages and thinned points against numpy, and images whose pixels show what was given."""

import io
import sys

import numpy as np
import pytest

from stellarbyte_jax.training import plots
from stellarbyte_jax.training.plots import Curve, decimated, smoothed


def test_an_average_is_the_weighted_mean_of_both_sides():
    values = np.random.default_rng(0).normal(size=400)
    distance = np.abs(np.arange(400)[:, None] - np.arange(400)[None, :])
    weights = 0.5 ** (distance / 2.0)  # half after 0.5 % of 400
    weights[np.diag_indices(400)] = 2  # the value itself belongs to both sides
    np.testing.assert_allclose(smoothed(values), (weights @ values) / weights.sum(axis=1), rtol=1e-9)


def test_short_series_have_no_average():
    assert smoothed(np.zeros(plots.LEAST_SMOOTHED - 1)) is None
    assert smoothed(np.ones(plots.LEAST_SMOOTHED)).tolist() == [1.0] * plots.LEAST_SMOOTHED


def test_thinning_keeps_spikes_and_order():
    y = np.random.default_rng(0).normal(size=100_003)
    y[[17, 50_000]] = 1e6, -1e6
    x = np.arange(len(y)) * 0.5
    some_x, some_y = decimated(x, y, 200)
    assert 150 < len(some_x) <= 200 and np.all(np.diff(some_x) > 0)
    assert {1e6, -1e6} <= set(some_y) and np.all(y[(some_x * 2).astype(int)] == some_y)
    assert decimated(x[:200], y[:200], 200)[1] is not None and len(decimated(x[:200], y[:200], 200)[0]) == 200


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0006, "0.0006"), (6e-5, "6e-05"), (950, "950"), (1500, "1.5k"), (2.1e11, "210B")]
)
def test_numbers_are_short(value, text):
    assert plots.short(value) == text


def test_the_extra_is_named_where_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    message = r"^report_at_end=true needs matplotlib, and matplotlib\S* is not installed: pip install matplotlib$"
    with pytest.raises(ModuleNotFoundError, match=message):
        plots.check("report_at_end=true")


@pytest.fixture
def pixels():
    """Draws; gives the columns and the rows, from 0 to 1 and upwards, of the pixels that have a color."""
    pytest.importorskip("matplotlib", reason="pip install -e '.[report]'")
    import matplotlib.image

    def draw(curves, color, *args):
        image = matplotlib.image.imread(io.BytesIO(plots.draw(curves, *args)))
        assert image.shape == (400, 800, 4)
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        rows, columns = np.nonzero(np.abs(image[..., :3] - wanted).max(axis=-1) < 0.02)
        return columns / 800, 1 - rows / 400

    return draw


def test_each_run_has_its_color_and_a_spike_reaches_up(pixels):
    x = np.arange(100.0)
    low, high = Curve(x, np.full(100, 1.0)), Curve(x, np.where(x == 50, 9.0, 2.0), number=1)
    columns, rows = pixels([low, high], plots.COLORS[0], "step", 99.0)
    assert rows.max() - rows.min() < 0.02 and np.ptp(columns) > 0.8
    columns, rows = pixels([low, high], plots.COLORS[1], "step", 99.0)
    assert abs(columns[rows.argmax()] - 0.52) < 0.05 and rows.max() > 0.9


def test_values_that_differ_much_have_a_logarithmic_axis(pixels):
    """On it, 1, 10 and 100 are equally far apart: three flat curves."""
    heights = []
    x = np.arange(30.0)
    curves = [Curve(x, np.full(30, value), number=number) for number, value in enumerate((1.0, 10.0, 100.0))]
    for number in range(3):
        _, rows = pixels(curves, plots.COLORS[number], "step", 29.0, "free")
        heights.append(np.median(rows))
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.01)
    heights = [np.median(pixels(curves, plots.COLORS[n], "step", 29.0, "zero")[1]) for n in range(3)]
    assert heights[1] - heights[0] < 0.2 * (heights[2] - heights[1])


@pytest.mark.parametrize(
    "values", [[0.0], [3.0], [0.0, 0.0], [-5.0, 5.0], [1e99, -1e99], [61.2, 61.2 + 1e-13], [0.0, 1e-300]]
)
@pytest.mark.parametrize("scale", ["free", "zero", "share"])
def test_odd_values_are_drawn_without_a_warning(pixels, values, scale):
    x = np.arange(float(len(values)))
    pixels([Curve(x, np.array(values), "rare"), Curve(x[:0], x[:0])], plots.COLORS[0], "step", x[-1], scale)


def test_zero_is_on_an_axis_that_is_not_logarithmic(pixels):
    x = np.arange(30.0)
    curves = [Curve(x, np.full(30, value), number=number) for number, value in enumerate((0.0, 50.0, 100.0))]
    heights = [np.median(pixels(curves, plots.COLORS[number], "step", 29.0)[1]) for number in range(3)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.01)


def test_the_rounding_of_a_constant_is_not_to_be_seen(pixels):
    x = np.arange(30.0)
    _, rows = pixels([Curve(x, 61.2 + 1e-8 * (x % 2))], plots.COLORS[0], "step", 29.0)
    assert np.ptp(rows) < 0.02


def test_a_single_point_is_seen(pixels):
    columns, _ = pixels([Curve(np.array([1.0]), np.array([3.0]))], plots.COLORS[0], "step", 1.0)
    assert len(columns) and np.ptp(columns) < 0.02


def test_past_the_last_color_runs_are_dashed(pixels):
    x = np.arange(30.0)
    drawn = [
        len(pixels([Curve(x, np.full(30, 1.0), number=number)], plots.COLORS[1], "step", 29.0)[0])
        for number in (1, 1 + len(plots.COLORS), 1 + 2 * len(plots.COLORS))
    ]
    assert drawn[0] > 1.2 * drawn[1] and drawn[0] > 1.2 * drawn[2] and drawn[1] != drawn[2]


@pytest.mark.parametrize(("scale", "percent"), [("share", True), ("zero", False)])
def test_a_share_has_an_axis_in_percent(pixels, monkeypatch, scale, percent):
    told = []
    monkeypatch.setattr(plots, "short", lambda value: told.append(value) or f"{value:g}")
    pixels([Curve(np.arange(30.0), np.full(30, 0.9))], plots.COLORS[0], "step", 29.0, scale)
    assert (max(told) > 60) == percent
