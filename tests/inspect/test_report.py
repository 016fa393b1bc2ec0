"""What a report says, against the numbers that it is made of; and how Markdown and HTML show it."""

import base64
import dataclasses
import html.parser
import re

import pytest
from helpers.variants import BASE, make

from stellarbyte_jax.inspect.costs import count_parameters, flops_per_token
from stellarbyte_jax.inspect.labels import LANGUAGES, label
from stellarbyte_jax.inspect.memory import cache_bytes, training_bytes
from stellarbyte_jax.inspect.numbers import of_bytes, percent, short
from stellarbyte_jax.inspect.render import to_html, to_markdown
from stellarbyte_jax.inspect.report import Measured, Report, ReportWriter, Section, Setup, Table
from stellarbyte_jax.inspect.sparsity import weight_statistics
from stellarbyte_jax.inspect.speed import Speed
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

SETUP = Setup(optimizer="muon", rows=2, length=16, average=True, cache_batch=3, cache_length=40)
NASTY = 'a|b <script>alert(1)</script> `c` [d](e)\n# f & "g"'


def writer(language="en", **changes):
    return ReportWriter(ByteTransformer(dataclasses.replace(BASE, **changes)), SETUP, language)


def rows(section, table=0):
    return {row[0]: row[1:] for row in section.tables[table].rows}


def test_structure():
    found = rows(writer(vocab_size_multiple=16, sliding_window=5, parallel_residual=True).structure())
    assert found["vocabulary"] == ("61 (64 rows)",) and found["layers with a window"] == ("4 of 5 tokens",)
    assert (found["residual style"], found["head tied to the embedding"]) == (("parallel",), ("no",))
    found = rows(writer(memory={"length": (0, 4, 4, 8)}, residual_scaling="deepnorm").structure())
    assert found["layers with memory"] == ("2 of 4 tokens, 1 of 8 tokens",) and found["residual style"] == ("deepnorm",)
    assert rows(writer().structure())["layers with a window"] == ("none",)


def test_parameters():
    w = writer()
    total, found = count_parameters(param_shapes(w.model)), rows(w.parameters())
    mlp = 3 * 32 * 48
    assert found["MLP"] == (f"{mlp:,}", f"{4 * mlp:,}", percent(4 * mlp / total))
    assert found["embedding"] == ("", f"{61 * 32:,}", percent(61 * 32 / total))
    assert found["in all"][1:] == (f"{total:,}", "100.00 %")
    trained = ReportWriter(w.model, SETUP, "en", lambda path: path[-1] == "q").parameters()
    assert rows(trained)["trainable"] == ("", "4,096", percent(4096 / total))


def test_memory():
    w = writer()
    training, weights, cache = w.memory()
    expected = training_bytes(w.model, optimizer="muon", rows=2, length=16, average=True)
    assert rows(training) == {
        "weights": (of_bytes(expected.weights),),
        "gradients": (of_bytes(expected.gradients),),
        "optimizer (muon)": (of_bytes(expected.optimizer),),
        "average of the weights": (of_bytes(expected.average),),
        "activations (estimate)": (of_bytes(expected.activations),),
        "in all": (of_bytes(expected.total),),
    }
    assert rows(training, 1)["adamw"] == (of_bytes(2 * expected.weights),)
    assert rows(weights)["float16"] == (of_bytes(expected.weights / 2),)
    assert cache.tables[0].columns[3] == "3 x 40 tokens"
    assert rows(cache)["int8"] == ("192 B", "192 B", of_bytes(cache_bytes(BASE, 3, 40, "int8")))


def test_layers_that_differ_have_a_range_and_what_is_frozen_no_state():
    w = writer()
    w.counts = dataclasses.replace(w.counts, layers=({"mlp": 10}, {"mlp": 2000}))
    found = rows(w.parameters())
    assert found["MLP"][0] == "10 - 2,000" and found["in all"][0] == "10 - 2,000"
    frozen = ReportWriter(w.model, SETUP, "en", lambda path: path[-1] == "q").memory()[0]
    assert rows(frozen, 1)["lion"] == (of_bytes(4 * 4096),) and rows(frozen, 1)["adamw"] == (of_bytes(8 * 4096),)


def test_operations_and_comparison():
    w = writer()
    flops = flops_per_token(BASE, w.counts.total, 16)
    found = rows(w.flops())
    assert found["forward"] == (short(flops.causal / 3), short(flops.full / 3))
    assert found["training step"] == (short(flops.causal), short(flops.full))
    half = dataclasses.replace(BASE, num_hidden_layers=2)
    section, ratios = w.comparison(half, "half")
    assert (ratios["depth"], ratios["width"], ratios["cache_short"]) == (2, 1, 2)
    assert ratios["parameters_short"] == w.counts.total / count_parameters(param_shapes(ByteTransformer(half)))
    assert rows(section)["depth"] == ("4", "2", "2×") and section.notes == ("The reference is half.",)


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24}


def test_experts():
    w = writer(moe={**EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1})
    found, expert = rows(w.structure()), 3 * 32 * 24
    assert (found["layers with experts"], found["experts of a layer"]) == (("3",), ("6 (2 of a token)",))
    assert (found["expert size"], found["shared experts"], found["MLP size"]) == (("24",), ("1",), ("48",))
    section, total = w.parameters(), w.counts.total
    found = rows(section)
    assert found["experts"] == (f"{6 * expert:,}", f"{18 * expert:,}", percent(18 * expert / total))
    assert found["shared experts"][0] == f"{expert:,}" and found["router"][0] == f"{32 * 6}"
    assert found["MLP"][0] == f"{3 * 32 * 48:,}", "of the layer that has one"
    active = total - 3 * 4 * expert
    assert found["active (of a token)"] == ("", f"{active:,}", percent(active / total))
    assert label("note_active", "en") in section.notes
    section = w.flops()
    assert rows(section)["training step"][0] == short(flops_per_token(w.config, active, 16).causal)
    assert label("note_flops_experts", "en") in section.notes
    _, ratios = w.comparison(BASE, "dense")
    dense = writer()
    assert ratios["active_short"] == active / dense.counts.total != ratios["parameters_short"]
    assert (
        ratios["flops_short"]
        == flops_per_token(w.config, active, 16).causal / flops_per_token(BASE, dense.counts.total, 16).causal
    )
    assert dense.comparison(w.config, "experts")[1]["active_short"] == 1 / ratios["active_short"]
    assert "active_short" not in dense.comparison(BASE, "dense")[1]


def test_a_pool_of_experts():
    w = writer(moe={**EXPERTS, "shared_pool": True})
    found = rows(w.structure())
    assert found["experts of a layer"] == ("6 (2 of a token), the same in all",) and "MLP size" not in found
    assert "shared experts" not in found
    assert rows(w.parameters())["experts"][:2] == ("", f"{6 * 3 * 32 * 24:,}")


def test_speed():
    measured = Measured([Speed(8, 1234.5, 99.4)], 5, 6, 7, "a CPU", fresh_weights=True)
    section = writer().speed(measured)
    assert section.tables[0].rows == (("8", "1,234", "99"),)
    assert "5 tokens of prompt and 6 of output" in section.notes[0] and "7 runs" in section.notes[0]
    assert "a CPU" in section.notes[0] and "fresh" in section.notes[1]
    assert len(writer().speed(dataclasses.replace(measured, fresh_weights=False)).notes) == 1


def test_statistics():
    model, params = make("llama")
    found = weight_statistics(model.config, params, (0.05,))
    by_part, by_layer = ReportWriter(model, SETUP, "en").statistics(found)
    mlp = found.parts["mlp"]
    shares = (percent(mlp.share(0)), percent(mlp.share(0.05)))
    assert rows(by_part)["MLP"] == (f"{mlp.mean:.3g}", f"{mlp.std:.3g}", f"{mlp.largest:.3g}", *shares)
    assert by_part.tables[0].columns[-1] == "below 0.05"
    assert by_layer.tables[0].columns == ("layer", "attention", "MLP", "norms")
    assert rows(by_layer)["2"][1] == f"{found.layers[2]['mlp'].std:.3g}"


def nasty():
    table = Table((NASTY, "x"), ((NASTY, "1"), ("y", NASTY)))
    return Report(NASTY, "en", (Section(NASTY, (table,), (NASTY,), ("pie", "absent")),))


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def test_html_holds_everything_and_runs_nothing():
    png = b"\x89PNG some bytes"
    page = Page(to_html(nasty(), {"pie": png}))
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "href"]
    assert [value for name, value in page.attributes if name == "src"] == [
        f"data:image/png;base64,{base64.b64encode(png).decode()}"
    ]
    assert page.texts.count(NASTY) == 7  # title, two headings, a column, a row, a cell, a note
    assert page.tags.count("table") == 1 and page.tags.count("tr") == 3 and page.tags.count("td") == 4
    assert ("lang", "en") in page.attributes


def test_numbers_stay_on_one_line_and_long_cells_may_break():
    cells = ("-3.75e-05", "0.00 %", "a window of 4096, in each layer but the last")
    page = to_html(Report("t", "en", (Section("s", (Table(("a", "b", "c"), (cells,)),)),)), {})
    assert "td.short { white-space: nowrap; }" in page
    assert '<td class="short">-3.75e-05</td><td class="short">0.00 %</td><td>a window' in page


def test_markdown_is_text_and_tables():
    text = to_markdown(nasty(), {"pie": "pie.png"})
    lines = text.splitlines()
    assert lines.count("| :-- | --: |") == 1 and text.count("](pie.png)") == 1 and "absent" not in text
    for line in (line for line in lines if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert not [line for line in lines if "<script" in line.replace("\\<", "")]
    assert len([line for line in lines if line.startswith("#")]) == 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_reports_are_in_one_language(language):
    w = writer(language)
    sections = (w.structure(), w.parameters(), w.flops(), *w.memory(), w.comparison(BASE, "x")[0])
    text = to_html(Report(w.title("m"), language, sections), {})
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    for key in ("structure", "parameters", "training_memory", "embedding", "reference"):
        assert label(key, language) in text and f">{label(key, other)}<" not in text
    assert ('lang="zh-Hans"' in text) == (language == "zh")
