"""Which settings a run may change when it goes on: each one that must not is named, all others pass."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_models import save_words

from stellarbyte_jax.checkpoint.compatibility import check_resumable
from stellarbyte_jax.checkpoint.store import CheckpointError
from stellarbyte_jax.config import TrainConfig

PATH = Path("run/checkpoints/7")
BASE: dict[str, Any] = {
    "output_dir": "run",
    "steps": 20,
    "global_batch_size": 4,
    "model": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"train": ["a.jsonl"], "sequence_length": 32},
    "schedule": {"warmup_steps": 2},
}


def settings(**changes: Any) -> TrainConfig:
    """The base with changes of whole settings, or of a section's."""
    values = dict(BASE)
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return TrainConfig.from_dict(values)


def check(before: TrainConfig | dict[str, Any], now: TrainConfig, initial: bool = False) -> list[str]:
    """Compares with what the JSON item of a checkpoint holds; returns what was said."""
    stored = before if isinstance(before, dict) else json.loads(before.to_json())
    said: list[str] = []
    check_resumable(stored, now, PATH, initial, said.append)
    return said


def refusal(before: TrainConfig, now: TrainConfig, initial: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(before, now, initial)
    return str(caught.value)


@pytest.mark.parametrize("initial", [False, True])
def test_the_same_settings_go_on(initial: bool) -> None:
    assert check(settings(), settings(), initial) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 40, "output_dir": "elsewhere", "sample_prompts": ["x"], "gradient_accumulation_steps": 2},
        {"schedule": {"name": "linear"}, "optimizer": {"learning_rate": 1e-5, "gradient_clip_norm": 2.0}},
        {"data": {"workers": 3, "prefetch": 5, "cache_dir": "x", "validation": ["b.jsonl"], "epochs": 3}},
        {"logging": {"interval": 7}, "checkpoint": {"interval": 7}, "loss": {"z_loss": 1e-4}},
        {"model": {"compute_dtype": "float32", "attention_implementation": "xla", "remat": "full", "scan_unroll": 2}},
        {"model": {"hidden_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.1}},
        {"model": {"initialization": "normal", "initializer_range": 0.1, "cache": {"dtype": "int8"}}},
    ],
    ids=str,
)
@pytest.mark.parametrize("initial", [False, True])
def test_what_neither_weights_nor_order_depend_on_may_change(changes: dict[str, Any], initial: bool) -> None:
    before, now = settings(), settings(**changes)
    there, here = flat(json.loads(before.to_json())), flat(json.loads(now.to_json()))
    changed = [name for name in there if there[name] != here[name]]
    told = [f"setting changed: {name} {there[name]!r} -> {here[name]!r}" for name in changed if not initial]
    assert check(before, now, initial) == told and len(changed) >= 3
    assert len(check(now, before, initial)) == len(told)


EXPERTS: dict[str, Any] = {"num_experts": 4, "intermediate_size": 16}


def with_experts(**moe: Any) -> TrainConfig:
    return settings(model={"moe": {**EXPERTS, **moe}})


@pytest.mark.parametrize(
    "moe",
    [
        {"dispatch": "capacity", "capacity_factor": 2.0, "min_capacity": 2, "max_capacity": 9, "overflow": ["cold"]},
        {"dispatch": "capacity", "dynamic_capacity": True},
        {"noise": "gumbel", "noise_scale": 2.0, "router_warmup_steps": 9},
        {"implementation": "pallas"},
        {"bias_update_rate": 0.1, "state_decay": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("initial", [False, True])
def test_how_experts_are_trained_may_change(moe: dict[str, Any], initial: bool) -> None:
    before, now = with_experts(), with_experts(**moe)
    told = check(before, now, initial)
    assert check(now, before, initial) is not None
    if initial:
        assert told == []
    else:
        assert [line.partition(" ")[2].split(" ")[1] for line in told] == [
            f"model.moe.{name}" for name in now.model.moe.to_dict() if name in moe
        ]
    both = [with_experts(cooling_steps=steps, temperature=1.0) for steps in (10, 20)]
    assert check(*both, initial) == ([] if initial else ["setting changed: model.moe.cooling_steps 10 -> 20"])
    learned = [with_experts(adaptive_temperature=True, temperature=x) for x in (1.0, 2.0)]
    assert check(*learned, initial) == []


@pytest.mark.parametrize(
    ("moe", "name"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 2 there and 1 here"),
        ({"dynamic_k": 0.5}, "dynamic_k is None there and 0.5 here"),
        ({"n_group": 4, "topk_group": 2}, "n_group is 1 there and 4 here"),
        ({"temperature": 2.0}, "temperature is 1.0 there and 2.0 here"),
        ({"expert_priority": True}, "expert_priority is False there and True here"),
        ({"cooling_steps": 5}, "cooling_steps is 0 there and 5 here"),
    ],
    ids=str,
)
def test_tokens_go_to_other_experts_in_a_run_that_begins_with_the_weights_alone(moe: dict[str, Any], name: str) -> None:
    said = check(with_experts(), with_experts(**moe), initial=True)
    assert said[0].startswith(f"the weights in {PATH} get other routing of tokens to experts: model.moe.{name}")
    assert len(said) == len(moe)
    assert f"holds another model: model.moe.{name}" in refusal(with_experts(), with_experts(**moe))


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(
    ("moe", "name"),
    [
        ({"num_experts": 5}, "num_experts is 4 there and 5 here"),
        ({"intermediate_size": 8}, "intermediate_size is 16 there and 8 here"),
        ({"n_shared_experts": 1}, "n_shared_experts is 0 there and 1 here"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace is 0 there and 1 here"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers is () there and (1,) here"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 1 there and 2 here"),
        ({"shared_pool": True}, "shared_pool is False there and True here"),
        ({"gate": "context"}, "gate is 'linear' there and 'context' here"),
        ({"noise": "noisy_topk"}, "noise is 'none' there and 'noisy_topk' here"),
        ({"adaptive_temperature": True}, "adaptive_temperature is False there and True here"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'softmax' there and 'sigmoid' here"),
        ({"norm_topk_prob": False}, "norm_topk_prob is True there and False here"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor is 1.0 there and 2.0 here"),
    ],
    ids=str,
)
def test_other_experts_are_another_model(moe: dict[str, Any], name: str, initial: bool) -> None:
    for message in (
        refusal(with_experts(), with_experts(**moe), initial),
        refusal(with_experts(**moe), with_experts(), initial),
    ):
        assert message.count("model.") == 1 and "\n" not in message
    assert f"model.moe.{name}" in refusal(with_experts(), with_experts(**moe), initial)


def test_a_model_without_experts_is_another_one() -> None:
    assert "holds a dense model, and model.moe.num_experts is 4 here" in refusal(settings(), with_experts())
    message = refusal(with_experts(), settings(), initial=True)
    assert "holds a model with 4 experts, and model.moe.num_experts is 0 here" in message


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_only_what_means_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    spelt = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    now = settings(model=spelt, data={"train": ["./*.jsonl"]}, output_dir=str(tmp_path / "run"), steps=30)
    assert check(settings(), now) == ["setting changed: steps 20 -> 30"]


def test_the_copy_that_a_run_keeps_of_its_tokenizer_stands_for_the_original() -> None:
    assert check(settings(), settings(data={"tokenizer": "run/tokenizer"})) == []
    assert "data.tokenizer was" in refusal(settings(), settings(data={"tokenizer": "else/tokenizer"}))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the copy of its tokenizer that the run keeps; the original ``tokenizer`` is gone."""
    monkeypatch.chdir(tmp_path)
    return save_words(Path("run/tokenizer"), ["x", "<b>", "<e>"], bos_token="<b>", eos_token="<e>")


def test_a_tokenizer_of_the_same_content_is_the_same_one(kept: Path) -> None:
    shutil.copytree(kept, "moved")
    assert check(settings(), settings(data={"tokenizer": "moved"})) == []
    now = settings(data={"tokenizer": "org/name"})  # of which this is the directory
    assert check_resumable(json.loads(settings().to_json()), now, PATH, False, print, "moved").data == now.data


@pytest.mark.parametrize(
    ("words", "begins", "ends"),
    [(["x", "<b>", "<e>", "y"], "<b>", "<e>"), (["x", "<b>", "<e>"], "x", "<e>"), (["x", "<b>", "<e>"], "<b>", "x")],
    ids=["other", "other_bos", "other_eos"],
)
def test_a_tokenizer_of_other_content_is_another_one(words: list[str], begins: str, ends: str, kept: Path) -> None:
    save_words(Path("moved"), words, bos_token=begins, eos_token=ends)
    assert "data.tokenizer was 'tokenizer' and is 'moved'" in refusal(settings(), settings(data={"tokenizer": "moved"}))


def test_a_copy_that_cannot_be_read_is_compared_by_its_name(kept: Path) -> None:
    """Any other error would be taken for one of the checkpoint, which would be put aside."""
    shutil.copytree(kept, "moved")
    (kept / "tokenizer.json").write_text("{")
    assert "data.tokenizer was" in refusal(settings(), settings(data={"tokenizer": "moved"}))


def recorded(before: TrainConfig, now: TrainConfig, initial: bool = False) -> TrainConfig:
    return check_resumable(json.loads(before.to_json()), now, PATH, initial, lambda _: None)


def test_what_a_run_began_with_stays_on_record(kept: Path) -> None:
    began, more = settings(init_from="old", data={"tokenizer": "old/words"}), {"tokenizer": "run/tokenizer"}
    for initial in (False, True):
        assert recorded(began, settings(steps=40, data=more), initial) == settings(
            init_from="old", steps=40, data={"tokenizer": "old/words"}
        )
        assert recorded(settings(), settings(init_from="new"), initial).init_from is None
    shutil.copytree(kept, "moved")
    assert recorded(began, settings(data={"tokenizer": "moved"})).data.tokenizer == "moved"  # which is there


@pytest.mark.parametrize("initial", [False, True])
def test_other_weights_to_begin_with_are_told_to_be_without_effect(initial: bool) -> None:
    remark = " (without effect: the run goes on with its own weights)"
    now = settings(init_from="elsewhere")
    assert check(settings(), now, initial) == [f"setting changed: init_from None -> 'elsewhere'{remark}"]
    began = settings(init_from="first")
    assert check(began, now, initial) == [f"setting changed: init_from 'first' -> 'elsewhere'{remark}"]
    for same in (None, "first", os.path.abspath("first")):
        assert check(began, settings(init_from=same), initial) == []


def test_settings_that_lack_the_weights_to_begin_with_are_told_to_name_them() -> None:
    began = settings(init_from="old", model={"qk_norm": True})
    assert refusal(began, settings()).endswith(
        "there and False here. Use the same settings (the run began with the model of init_from=old: name that again), "
        "or another output_dir"
    )
    assert "name that again" not in refusal(began, settings(init_from="old"))


def test_sizes_may_be_spelt_out_or_derived() -> None:
    spelt = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "layer_types": ["full_attention"] * 2,
    }
    assert check(settings(), settings(model=spelt)) == []
    assert check(settings(model=spelt), settings()) == []


ALIKE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"memory": {"length": 4}}, {"memory": {"length": [4, 4]}}),
    ({"memory": {"length": 4, "recent_share": 0.5}}, {"memory": {"length": [4, 4], "recent_share": 0.6}}),
    ({}, {"memory": {"length": [0, 0]}}),
    ({"sliding_window": 8}, {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
    ({}, {"sliding_window": 2048}),  # the longest text: nothing is hidden
    ({"sliding_window": 4096}, {"sliding_window": 2048, "sink_tokens": 2}),
    ({}, {"sliding_window": 9999, "layer_types": ["sliding_attention", "full_attention"]}),
    ({"vocab_size_multiple": 1}, {"vocab_size_multiple": 8}),
    ({"layer_scale_init": 0.1}, {"layer_scale_init": 0.2}),
    ({"moe": {"num_experts": 2, "first_k_dense_replace": 1}}, {"moe": {"num_experts": 2, "mlp_only_layers": [0]}}),
    ({"moe": {"num_experts": 2, "decoder_sparse_step": 2}}, {"moe": {"num_experts": 2, "mlp_only_layers": [0]}}),
    ({"moe": {"num_experts": 2}}, {"moe": {"num_experts": 2, "intermediate_size": 64}}),
    (
        {"moe": {"num_experts": 4, "gate": "context"}},
        {"moe": {"num_experts": 4, "gate": "context", "gate_intermediate_size": 64}},
    ),
    ({"moe": {"num_experts": 4}}, {"moe": {"num_experts": 4, "n_group": 2, "topk_group": 2}}),
    (
        {"rope_scaling": {"name": "llama3", "factor": 2.0}},
        {"rope_scaling": {"name": "llama3", "factor": 2.0, "original_max_position_embeddings": 2048}},
    ),
    (
        {"rope_scaling": {"name": "yarn", "factor": 2.0}},
        {
            "rope_scaling": {
                "name": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 2048,
                "attention_factor": 0.1 * math.log(2.0) + 1.0,
            }
        },
    ),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=str)
@pytest.mark.parametrize("initial", [False, True])
def test_settings_of_the_same_network_are_the_same(one: dict[str, Any], other: dict[str, Any], initial: bool) -> None:
    data = {"arrangement": "contiguous"}
    before, now = settings(model=one, data=data), settings(model=other, data=data)
    assert check(before, now, initial) == check(now, before, initial) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"memory": {"length": [4, 4]}}, {"memory": {"length": [4, 6]}}),
        ({"memory": {"length": 4}}, {"sliding_window": 5}),
        ({}, {"sliding_window": 2047}),
        ({"memory": {"length": 2047}}, {}),
        ({"sliding_window": 8}, {"sliding_window": 8, "sink_tokens": 1}),
        (
            {"memory": {"length": 4, "recent_share": 0.5}},
            {"memory": {"length": 4, "recent_share": 0.5, "compression_weight": 0.5}},
        ),
        ({"sliding_window": 8}, {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        ({"layer_scale_init": 0.1}, {}),
        ({"vocab_size": 40}, {"vocab_size": 39, "vocab_size_multiple": 8}),
        ({"rope_scaling": {"name": "yarn", "factor": 2.0}}, {"rope_scaling": {"name": "yarn", "factor": 3.0}}),
    ],
    ids=str,
)
def test_settings_of_another_network_are_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    data = {"arrangement": "contiguous"}
    before, now = settings(model=one, data=data), settings(model=other, data=data)
    for message in (refusal(before, now), refusal(now, before)):
        assert "holds another model: model." in message
        for difference in message.split("holds another model: ")[1].split(". Use")[0].split("; "):
            there, _, here = difference.partition(" there and ")
            assert there.split(" is ", 1)[1] != here.removesuffix(" here"), difference


def test_files_are_the_same_however_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl", "tokenizer"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    before = settings(data={"train": ["*.jsonl"]})
    for train in (["a.jsonl", "b.jsonl"], [str(tmp_path / "*.jsonl")], ["./a.jsonl", "b.jsonl"]):
        assert check(before, settings(data={"train": train, "tokenizer": str(tmp_path / "tokenizer")})) == []
    for train in (["b.jsonl", "a.jsonl"], ["a.jsonl"]):
        assert "data.train was ['*.jsonl'] and is [" in refusal(before, settings(data={"train": train}))
    os.rename("b.jsonl", "c.jsonl")  # what the pattern names now, no checkpoint knows: the loader compares
    assert check(before, settings(data={"train": ["a.jsonl", "c.jsonl"]})) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"template": "{text}"}),
        ({"fields": ["title", "text"]}, {"template": "{title}\n{text!s}"}),
        ({"template": "{text:s}"}, {"template": "{text}"}),
    ],
    ids=str,
)
def test_texts_are_the_same_however_their_format_is_spelled(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert check(settings(data=one), settings(data=other)) == check(settings(data=other), settings(data=one)) == []


def test_of_the_format_of_texts_what_changed_is_named() -> None:
    message = refusal(settings(data={"template": "{text}"}), settings(data={"fields": ["a"]}))
    assert "data.fields was ['text'] and is ['a']; data.template was '{text}' and is None" in message
    assert "data.fields" not in refusal(settings(), settings(data={"template": "{text"}))  # which the loader refuses


def test_more_documents_than_a_row_has_tokens_are_as_many() -> None:
    before = settings(data={"max_documents_per_sequence": 32})
    assert check(before, settings(data={"max_documents_per_sequence": 99})) == []
    assert "max_documents" in refusal(before, settings(data={"max_documents_per_sequence": 31}))


def test_files_of_a_folder_that_was_moved_are_left_to_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old/a.jsonl", "old/b.jsonl", "other/b.jsonl", "other/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    explicit = settings(data={"train": ["old/a.jsonl", "old/b.jsonl"]})
    pattern = settings(data={"train": ["old/*.jsonl"]})
    assert "data.train was" in refusal(pattern, settings(data={"train": ["other/*.jsonl"]}))
    os.rename("old", "new")
    for before in (explicit, pattern):
        for train in (["new/*.jsonl"], ["new/a.jsonl", str(tmp_path / "new" / "b.jsonl")]):
            (said,) = check(before, settings(data={"train": train}))
            assert said.startswith("setting changed: data.train ['old/") and "the same names and contents" in said
            assert f"-> {train}: the run goes on" in said
    for train in (["new/b.jsonl"], ["new/b.jsonl", "new/a.jsonl"], ["other/*.jsonl"]):
        assert "data.train was" in refusal(explicit, settings(data={"train": train}))
    os.rename("new", "[x]")  # which exists: no pattern that could have named anything else
    before = settings(data={"train": ["[x]/a.jsonl"]})
    assert "data.train was" in refusal(before, settings(data={"train": ["other/b.jsonl"]}))
    os.rename("[x]", "new")
    assert "seed was 0 and is 4" in refusal(explicit, settings(seed=4, data={"train": ["new/*.jsonl"]}))


def test_what_a_document_of_a_text_file_is_may_change_where_there_is_none() -> None:
    paragraphs = {"text_documents": "paragraph"}
    assert check(settings(), settings(data=paragraphs)) == []
    before, now = (settings(data={"train": ["a.jsonl", "b.txt"], **more}) for more in ({}, paragraphs))
    assert "data.text_documents was 'file' and is 'paragraph'" in refusal(before, now)


def test_a_run_that_met_a_bad_line_may_begin_to_skip_them() -> None:
    before, now = settings(), settings(data={"on_error": "skip"})
    assert check(before, now) == ["setting changed: data.on_error 'raise' -> 'skip'"]
    assert "data.on_error was 'skip' and is 'raise'" in refusal(now, before)


def test_settings_that_are_newer_than_the_checkpoint_have_their_defaults() -> None:
    stored = json.loads(settings().to_json())
    for name in ("qk_norm", "memory", "rope_scaling"):
        del stored["model"][name]
    for name in ("arrangement", "on_error"):
        del stored["data"][name]
    del stored["ema_decay"], stored["optimizer"]["gradient_clip_norm"]
    assert check(stored, settings()) == []
    with pytest.raises(CheckpointError, match=r"model\.qk_norm is False there and True here"):
        check(stored, settings(model={"qk_norm": True}))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"vocab_size": 41}, "model.vocab_size is 40 there and 41 here"),
        ({"vocab_size_multiple": 64}, "model.vocab_size_multiple is 1 there and 64 here"),
        ({"num_key_value_heads": 1}, "model.num_key_value_heads is 2 there and 1 here"),
        ({"head_dim": 4}, "model.head_dim is 8 there and 4 here"),
        ({"intermediate_size": 65}, "model.intermediate_size is 64 there and 65 here"),
        ({"tie_word_embeddings": True}, "model.tie_word_embeddings is False there and True here"),
        ({"rms_norm_eps": 1e-6}, "model.rms_norm_eps is 1e-05 there and 1e-06 here"),
        ({"hidden_act": "gelu"}, "model.hidden_act is 'silu' there and 'gelu' here"),
    ],
    ids=str,
)
@pytest.mark.parametrize("initial", [False, True])
def test_another_network_is_refused(changes: dict[str, Any], difference: str, initial: bool) -> None:
    assert refusal(settings(), settings(model=changes), initial) == (
        f"{PATH} holds another model: {difference}. Use the same settings, or another output_dir"
    )


def test_all_that_differs_is_named() -> None:
    message = refusal(settings(model={"qk_norm": True}), settings(model={"vocab_size": 41}))
    assert "model.vocab_size is 40 there and 41 here" in message
    assert "model.qk_norm is True there and False here" in message


def test_memory_is_part_of_the_network_but_its_policy_is_not() -> None:
    def remembering(**memory: Any) -> TrainConfig:
        return settings(model={"memory": {"length": 4, **memory}}, data={"arrangement": "contiguous"})

    assert check(remembering(), remembering(batch_policy="repeat")) == []
    assert "model.memory is {'length': 4, " in refusal(remembering(), remembering(length=6))
    assert "recent_share" in refusal(remembering(), remembering(recent_share=0.5))


POSITIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_position_embeddings": 4096}, "model.max_position_embeddings is 2048 there and 4096 here"),
    ({"rope_theta": 500.0}, "model.rope_theta is 10000.0 there and 500.0 here"),
    ({"rope_scaling": {"name": "linear", "factor": 2.0}}, "model.rope_scaling is "),
    ({"sliding_window": 8}, "model.sliding_window is None there and 8 here"),
    ({"sliding_window": 8}, "model.layer_types is (None, None) there and (8, 8) here"),
    ({"sliding_window": 8, "sink_tokens": 1}, "model.sink_tokens is 0 there and 1 here"),
]


@pytest.mark.parametrize(("changes", "difference"), POSITIONS, ids=str)
def test_positions_may_change_before_any_training_alone(changes: dict[str, Any], difference: str) -> None:
    now = settings(model=changes)
    assert difference in refusal(settings(), now)
    said = check(settings(), now, initial=True)
    assert all(text.startswith(f"the weights in {PATH} get other positions: model.") for text in said)
    assert any(difference in text for text in said)


def test_other_positions_do_not_hide_another_network() -> None:
    message = refusal(settings(), settings(model={"rope_theta": 5.0, "qk_norm": True}), initial=True)
    assert "qk_norm" in message and "rope_theta" not in message


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"data": {"train": ["b.jsonl"]}}, "data.train was ['a.jsonl'] and is ['b.jsonl']"),
        ({"data": {"tokenizer": "other"}}, "data.tokenizer was 'tokenizer' and is 'other'"),
        ({"data": {"fields": ["title", "text"]}}, "data.fields was ['text'] and is ['title', 'text']"),
        ({"data": {"template": "{text}!"}}, "data.template was None and is '{text}!'"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length was 32 and is 16"),
        ({"data": {"arrangement": "contiguous"}}, "data.arrangement was 'packed' and is 'contiguous'"),
        ({"data": {"add_bos": False}}, "data.add_bos was True and is False"),
        ({"data": {"add_eos": False}}, "data.add_eos was True and is False"),
        ({"data": {"max_documents_per_sequence": 3}}, "data.max_documents_per_sequence was 16 and is 3"),
        ({"data": {"shuffle": False}}, "data.shuffle was True and is False"),
        ({"seed": 4}, "seed was 0 and is 4"),
        ({"global_batch_size": 8}, "global_batch_size was 4 and is 8"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name was 'adamw' and is 'lion'"),
        ({"optimizer": {"gradient_clip_norm": None}}, "optimizer.gradient_clip_norm was 1.0 and is None"),
        ({"ema_decay": 0.9}, "ema_decay was None and is 0.9"),
        ({"seed": 4, "data": {"shuffle": False}}, "data.shuffle was True and is False; seed was 0 and is 4"),
    ],
    ids=str,
)
def test_another_order_or_optimizer_is_refused_after_training(changes: dict[str, Any], difference: str) -> None:
    now = settings(**changes)
    assert refusal(settings(), now) == (
        f"{PATH} cannot be continued with these settings: {difference}. Use the same ones, or another output_dir"
    )
    assert check(settings(), now, initial=True) == []


def test_the_rate_of_an_average_and_of_clipping_may_change() -> None:
    before = settings(ema_decay=0.9, optimizer={"gradient_clip_norm": 0.5})
    assert check(before, settings(ema_decay=0.99, optimizer={"gradient_clip_norm": 2.0})) == [
        "setting changed: ema_decay 0.9 -> 0.99",
        "setting changed: optimizer.gradient_clip_norm 0.5 -> 2.0",
    ]
    message = refusal(before, settings(optimizer={"gradient_clip_norm": None}))
    assert "gradient_clip_norm was 0.5 and is None" in message and "ema_decay was 0.9 and is None" in message
