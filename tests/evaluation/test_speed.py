"""What the benchmark of evaluation asks, and that both sides answer the same."""

from dataclasses import replace

import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import one_layer

from stellarbyte_jax.cli import evaluation_speed
from stellarbyte_jax.tokenizer.codec import load_tokenizer

SIZE = evaluation_speed._Size(3, 20, 4, 2, 2, 5, (3,))


def test_requests_are_of_four_kinds():
    asked = {name: (kind, arguments) for name, kind, arguments in evaluation_speed._requests(SIZE)}
    kind, choices = asked["choices"]
    assert kind == "loglikelihood" and len(choices) == 12 and len(set(choices)) == 12
    assert len({context for context, _ in choices}) == 3 and choices[0][0] == choices[3][0]
    assert all(len(context.split()) == 20 and len(ending.split()) == 4 for context, ending in choices)
    assert [ending for _, ending in asked["letters"][1]] == [" A", " B", " C", " D"] * 3
    kind, texts = asked["texts"]
    assert kind == "loglikelihood_rolling" and len(set(texts)) == 2
    kind, answers = asked["answers"]
    assert kind == "generate_until" and len(answers) == 2
    assert answers[0][1]["max_gen_toks"] == 5


@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
def test_both_sides_give_the_same_scores(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="the peer is lm-eval: pip install -e '.[eval]'")
    torch = pytest.importorskip("torch", reason="lm-eval's backend for transformers needs it")
    pytest.importorskip("accelerate", reason="lm-eval's backend for transformers needs it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(evaluation_speed, "_ON_CPU", SIZE)
    monkeypatch.setattr(evaluation_speed, "_REPEATS", 1)
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path / "tokenizer"))
    config = one_layer(tmp_path / "run", tokenizer, positions=256)
    config = replace(config, data=replace(config.data, tokenizer=str(tmp_path / "tokenizer")))
    ours, theirs = evaluation_speed.ours(config, 1), evaluation_speed.peer(config, 1)
    for name in ("choices", "letters", "texts"):
        assert ours[f"{name}_mean"] == pytest.approx(theirs[f"{name}_mean"], rel=1e-5)
    for name in ("choices", "letters", "texts", "answers"):
        assert ours[f"{name}_per_second"] > 0 and theirs[f"{name}_per_second"] > 0
        assert ours[f"{name}_batch"] == 3
    assert (ours["compute_dtype"], theirs["compute_dtype"]) == ("float32", "float32")
    assert "lm-eval" in theirs["on"] and "texts, 3 at once: " in capsys.readouterr().err
