"""Charts are PNG images in which nothing is cut off, and labels have a font with all of their characters."""

import dataclasses
import io
import logging

import jax
import numpy as np
import pytest
from helpers.variants import BASE, make

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect import charts, fonts
from stellarbyte_jax.inspect.costs import parameter_counts
from stellarbyte_jax.inspect.labels import LANGUAGES, all_characters, label
from stellarbyte_jax.inspect.numbers import short
from stellarbyte_jax.inspect.sparsity import weight_statistics
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

matplotlib = pytest.importorskip("matplotlib")

SHAPES = {
    "small": BASE,
    "tied, windows, many runs": dataclasses.replace(
        BASE,
        num_hidden_layers=24,
        sliding_window=128,
        layer_types=("sliding_attention", "full_attention") * 12,
        tie_word_embeddings=True,
    ),
    "large": ByteConfig(
        vocab_size=151_936,
        hidden_size=16384,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        intermediate_size=53248,
        layer_scale_init=1e-5,
        max_position_embeddings=131072,
    ),
    "deepnorm, no last norm": dataclasses.replace(BASE, residual_scaling="deepnorm"),
    "memory": dataclasses.replace(BASE, memory={"length": (0, 1000, 1000, 1000)}),
    "experts": dataclasses.replace(
        BASE,
        moe={"num_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 2, "decoder_sparse_step": 2},
        hidden_size=4096,
        parallel_residual=True,
    ),
    "a pool of experts": dataclasses.replace(
        BASE, moe={"num_experts": 6, "shared_pool": True, "mlp_only_layers": (2,)}
    ),
}
RATIOS = {"parameters_short": 0.07, "flops_short": 900.0, "cache_short": 1.0, "depth": 0.3, "width": 0.2}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made."""
    figures = []
    png = charts.Canvas.png

    def keep(canvas):
        figures.append(canvas.figure)
        return png(canvas)

    monkeypatch.setattr(charts.Canvas, "png", keep)
    return figures


def pixels(png):
    from matplotlib.image import imread

    assert png.startswith(b"\x89PNG\r\n")
    return imread(io.BytesIO(png))


def check(png, drawn):
    """The margins are white, so nothing is cut off; and no two texts overlap."""
    image = pixels(png)[..., :3]
    assert max(image.shape) <= 40 * 144  # anything may show an image of this size
    for edge in (image[:4], image[-4:], image[:, :4], image[:, -4:]):
        assert (edge == 1).all()
    texts = [t for t in drawn.pop().findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
    boxes = [t.get_window_extent().padded(-1) for t in texts]
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            assert not box.overlaps(other), (texts[i].get_text(), texts[boxes.index(other)].get_text())


@pytest.mark.parametrize(
    ("language", "shape"),
    [*(("en", shape) for shape in SHAPES), *(("zh", shape) for shape in ("large", "memory", "experts"))],
)
def test_parameters_and_structure(language, shape, drawn):
    config = SHAPES[shape]
    counts = parameter_counts(ByteTransformer(config))
    check(charts.parameter_pie(counts, language), drawn)
    check(charts.structure_diagram(config, counts, language), drawn)


def test_of_many_runs_of_layers_the_first_and_the_last_are_shown(drawn):
    config = SHAPES["tied, windows, many runs"]
    charts.structure_diagram(config, parameter_counts(ByteTransformer(config)), "en")
    texts = [text.get_text() for text in drawn.pop().findobj(matplotlib.text.Text)]
    layers = [text for text in texts if text.startswith("layer ")]
    assert layers == ["layer 0", "layer 1", "layer 2", "layer 3", "layer 4", "layer 23"]
    assert label("shared", "en") in texts
    small = SHAPES["small"]
    charts.structure_diagram(small, parameter_counts(ByteTransformer(small)), "en")
    texts = [text.get_text() for text in drawn.pop().findobj(matplotlib.text.Text)]
    assert [text for text in texts if text.startswith("layer ")] == ["layer 0-3"] and label("shared", "en") not in texts


def test_experts_are_drawn_with_what_a_token_uses(drawn):
    moe = {"num_experts": 6, "intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 3}
    config = dataclasses.replace(BASE, moe=moe)
    counts = parameter_counts(ByteTransformer(config))
    charts.structure_diagram(config, counts, "en")
    texts = [text.get_text() for text in drawn.pop().findobj(matplotlib.text.Text)]
    layer = sum(counts.layers[3].values())
    assert f"{short(layer)}, {short(layer - 4 * 3 * 32 * 24)} active" in texts
    assert "experts: 2 of 6, 1 shared" in texts and f"32 × 24   {short(7 * 3 * 32 * 24)}   router 192" in texts
    charts.parameter_pie(counts, "en")
    texts = [text.get_text() for text in drawn.pop().findobj(matplotlib.text.Text)]
    assert f"{short(counts.total)}\nparameters\n{short(counts.active)} active" in texts
    pool = SHAPES["a pool of experts"]
    charts.structure_diagram(pool, parameter_counts(ByteTransformer(pool)), "en")
    texts = [text.get_text() for text in drawn.pop().findobj(matplotlib.text.Text)]
    assert label("pool", "en") in texts and short(6 * 3 * 32 * 48) in texts


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_radar(language, drawn):
    check(charts.comparison_radar(RATIOS, language), drawn)
    check(charts.comparison_radar(dict.fromkeys(RATIOS, 1.0), language), drawn)


@pytest.mark.parametrize(
    ("variant", "language"),
    [("parallel, branch scale, layer scale, biases, yarn", "en"), ("a pool of experts, parallel, xpos", "zh")],
)
def test_the_heat_map(variant, language, drawn):
    model, params = make(variant)
    check(charts.deviation_heatmap(weight_statistics(model.config, params), language), drawn)


@pytest.mark.parametrize("layers", [100, 4096])
def test_the_heat_map_of_many_layers(layers, drawn):
    tiny = {"hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 2}
    config = dataclasses.replace(BASE, num_hidden_layers=layers, **tiny)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f4"), param_shapes(ByteTransformer(config)))
    params["layers"]["0"]["mlp"]["down"][3] = np.nan
    check(charts.deviation_heatmap(weight_statistics(config, params), "en"), drawn)


def test_every_label_exists_in_both_languages():
    for key in ("report", "embedding", "note_flops"):
        assert label(key, "en", 1, 2, 3) and label(key, "zh", 1, 2, 3) != label(key, "en", 1, 2, 3)
    assert all(ord(character) < 128 for character in all_characters("en") - {"×"})


def test_chinese_labels_have_a_font():
    pytest.importorskip("pylopdf_fonts_zh_cn")
    path = fonts.find_font("zh")
    assert path is not None
    from matplotlib.ft2font import FT2Font

    assert {ord(character) for character in all_characters("zh")} <= set(FT2Font(str(path)).get_charmap())


@pytest.fixture
def no_chinese_font(monkeypatch):
    from matplotlib import font_manager

    dejavu = font_manager.findfont("DejaVu Sans")
    monkeypatch.setattr(fonts, "_candidates", lambda: iter([fonts.Path(dejavu)]))
    for cached in (fonts.find_font, fonts.usable_language):
        cached.cache_clear()
    yield
    for cached in (fonts.find_font, fonts.usable_language):
        cached.cache_clear()


def test_without_a_font_labels_are_english_and_one_line_says_so(no_chinese_font, caplog):
    counts = parameter_counts(ByteTransformer(BASE))
    with caplog.at_level(logging.WARNING, "stellarbyte_jax"):
        chinese = [charts.parameter_pie(counts, "zh"), charts.structure_diagram(BASE, counts, "zh")]
    assert chinese == [charts.parameter_pie(counts, "en"), charts.structure_diagram(BASE, counts, "en")]
    (record,) = caplog.records
    assert "labelled in English" in record.getMessage() and "stellarbyte_jax[report]" in record.getMessage()


def test_a_font_that_cannot_be_read_is_no_font(tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    assert fonts._characters(broken) == fonts._characters(tmp_path / "none.ttf") == set()


@pytest.mark.parametrize("parallel", [False, True])
def test_a_branch_stands_on_the_other_unless_they_are_parallel(parallel, drawn):
    config = dataclasses.replace(SHAPES["small"], parallel_residual=parallel)
    charts.structure_diagram(config, parameter_counts(ByteTransformer(config)), "en")
    places = {text.get_text(): text.get_position() for text in drawn.pop().findobj(matplotlib.text.Text)}
    (attention,) = (place for text, place in places.items() if text.startswith(label("attention", "en") + ":"))
    mlp = places[label("mlp", "en")]
    assert (attention[0] < mlp[0], attention[1] < mlp[1]) == (parallel, not parallel)
