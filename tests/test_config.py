"""Settings check themselves, and every mistake has one clear message."""

import copy
import dataclasses
import json

import pytest

from stellarbyte_jax.config import (
    ByteConfig,
    ConfigError,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    load,
    override,
)


@pytest.fixture
def run() -> TrainConfig:
    return TrainConfig(output_dir="runs/test", steps=1000)


def write(path, body: str):
    path.write_text("from stellarbyte_jax.config import *\n\n\ndef config():\n    " + body + "\n")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=20000", 20000),
        ("steps=1_000", 1000),
        ("seed=1234567890123456789", 1234567890123456789),
        ("output_dir=runs/a=b", "runs/a=b"),
        ("output_dir=7", "7"),
        ("model.hidden_size=1536", 1536),
        ("model.num_key_value_heads=none", None),
        ("model.num_key_value_heads=4", 4),
        ("model.tie_word_embeddings=True", True),
        ("model.tie_word_embeddings=false", False),
        ("model.rope_theta=500000", 500000.0),
        ("model.rms_norm_eps=1e-6", 1e-6),
        ("model.hidden_act=gelu", "gelu"),
        ("model.attention_logit_softcap=null", None),
        ("optimizer.learning_rate = 3e-4", 3e-4),
        ("data.train=a.jsonl", ("a.jsonl",)),
        ("data.train=a.jsonl, b/*.parquet", ("a.jsonl", "b/*.parquet")),
        ('data.train=["a, b.jsonl"]', ("a, b.jsonl",)),
        ("data.train=", ()),
        ("data.template=Q: {q}", "Q: {q}"),
        ("data.template=none", None),
    ],
)
def test_override_reads_the_fields_type(run, text, expected):
    name = text.partition("=")[0].strip()
    value = override(run, [text])
    for part in name.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_apply_together_and_the_last_one_wins(run):
    changed = override(run, ["model.hidden_size=100", "model.num_attention_heads=10", "steps=5", "steps=200"])
    assert (changed.model.hidden_size, changed.model.num_attention_heads, changed.steps) == (100, 10, 200)
    assert run.steps == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", r"--set 'steps': expected section\.name=value"),
        ("stps=3", r"no setting 'stps'; did you mean steps"),
        ("model.hiden_size=3", r"no setting 'model\.hiden_size'; did you mean model\.hidden_size"),
        ("hidden_size=3", r"no setting 'hidden_size'; did you mean model\.hidden_size"),
        ("modle.hidden_size=3", r"did you mean model\.hidden_size"),
        ("schedule=cosine", r"no setting 'schedule'; did you mean schedule\.name or schedule\.warmup_steps"),
        ("steps.more=3", r"no setting 'steps\.more'"),
        ("=3", r"no setting ''"),
        ("steps=many", r"--set steps=many: steps must be int \(positive\)"),
        ("steps=1.5", r"steps must be int"),
        ("steps=none", r"steps must be int"),
        ("steps=true", r"steps must be int"),
        ("steps=0", r"steps must be int \(positive\)"),
        ("model.tie_word_embeddings=1", r"tie_word_embeddings must be bool"),
        ("model.hidden_act=relu", r"hidden_act must be one of 'silu', 'gelu'"),
        ("model.rope_theta=nan", r"rope_theta must be float \(positive\)"),
        ("model.rope_theta=inf", r"rope_theta must be float \(positive\)"),
        ("model.head_dim=wide", r"head_dim must be int \(positive\) or none"),
        ("data.train=[1, 2", None),  # not JSON: two words
        ("model.attention_dropout=1", r"attention_dropout must be float \(in \[0, 1\)\)"),
    ],
)
def test_a_wrong_override_says_what_and_why(run, text, message):
    if message is None:
        assert override(run, [text]).data.train == ("[1", "2")
        return
    with pytest.raises(ConfigError, match=message):
        override(run, [text])


def test_load_runs_the_file_and_applies_overrides(tmp_path):
    path = write(tmp_path / "a.py", "return TrainConfig(output_dir='runs/a', steps=300)")
    assert load(path).steps == 300
    assert load(str(path), ["steps=400", "model.vocab_size=512"]).model.vocab_size == 512


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "pretrain.py", "return None")
    with pytest.raises(ConfigError, match=r"pretrian\.py does not exist; did you mean .*pretrain\.py\?"):
        load(tmp_path / "pretrian.py")
    with pytest.raises(ConfigError, match=r"nowhere/a\.py does not exist$"):
        load(tmp_path / "nowhere" / "a.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"config\(\) must return a TrainConfig, got NoneType"),
        ("return TrainConfig(output_dir='a', stepz=3)", r"line 5: .*no setting 'stepz'; did you mean steps"),
        ("return TrainConfig(output_dir='a', steps='3')", r"line 5: TrainConfig\.steps must be int .*got '3'"),
        ("return TrainConfig(output_dir='a')", r"line 5: TypeError: .*missing .*'steps'"),
        ("return TrainConfg()", r"line 5: NameError: .*TrainConfg"),
        ("return TrainConfig(", r"line 5: SyntaxError"),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path, body, message):
    path = write(tmp_path / "run.py", body)
    with pytest.raises(ConfigError, match=rf"run\.py.*{message}"):
        load(path)


def test_a_file_without_config_or_of_another_kind(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.py: must define `def config\(\) -> TrainConfig`"):
        load(tmp_path / "empty.py")
    (tmp_path / "run.yaml").write_text("steps: 3")
    with pytest.raises(ConfigError, match=r"run\.yaml must be a Python file"):
        load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (ByteConfig, {"hidden_size": 100, "num_attention_heads": 12}, "hidden_size 100 is not divisible by .* 12"),
        (ByteConfig, {"num_attention_heads": 12, "num_key_value_heads": 5}, "12 is not divisible by .* 5"),
        (ByteConfig, {"num_attention_heads": 12, "num_key_value_heads": 24}, "12 is not divisible by .* 24"),
        (ByteConfig, {"hidden_size": 36, "num_attention_heads": 12}, "head size must be even .* got 3"),
        (ByteConfig, {"hidden_size": 0}, r"ByteConfig\.hidden_size must be int \(positive\), got 0"),
        (ByteConfig, {"hidden_size": 768.0}, r"ByteConfig\.hidden_size must be int"),
        (ByteConfig, {"hidden_size": True}, r"ByteConfig\.hidden_size must be int"),
        (ByteConfig, {"hidden_sizes": 3}, "no setting 'hidden_sizes'; did you mean hidden_size"),
        (ByteConfig, {"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers is 12"),
        (ByteConfig, {"num_hidden_layers": 1, "layer_types": ["windowed"]}, "layer_types may hold .* got .'windowed'"),
        (ByteConfig, {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "give sliding_window"),
        (DataConfig, {"sequence_length": 1}, "sequence_length must be at least 2"),
        (DataConfig, {"fields": []}, "fields must name at least one field"),
        (DataConfig, {"workers": -1}, r"workers must be int \(not negative\), got -1"),
        (DataConfig, {"train": "a.jsonl"}, "train must be a list of str, got 'a.jsonl'"),
        (OptimizerConfig, {"b1": 1.0}, r"b1 must be float \(in \[0, 1\)\)"),
        (OptimizerConfig, {"learning_rate": float("nan")}, r"learning_rate must be float \(positive\), got nan"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"weight_decay must be float \(not negative\)"),
        (ScheduleConfig, {"cycles": 2}, "belong to cosine_restarts, the schedule is cosine"),
        (ScheduleConfig, {"decay_steps": 2}, "belongs to wsd, the schedule is cosine"),
        (ScheduleConfig, {"final_ratio": 1.5}, r"final_ratio must be float \(in \[0, 1\]\)"),
        (LoggingConfig, {"trackers": ["mlflow"]}, "trackers may hold .* got .'mlflow'"),
        (TrainConfig, {"steps": 10}, "warmup_steps 100 and decay_steps None do not fit into 10 steps"),
        (TrainConfig, {"global_batch_size": 32, "gradient_accumulation_steps": 5}, "32 is not divisible by .* 5"),
        (TrainConfig, {"model": ByteConfig(max_position_embeddings=512)}, "1024 is longer than .* 512"),
        (TrainConfig, {"ema_decay": 1.0}, "ema_decay must be"),
    ],
)
def test_contradictions_are_refused(section, settings, message):
    required = {"output_dir": "runs/a", "steps": 1000} if section is TrainConfig else {}
    with pytest.raises(ConfigError, match=message):
        section(**(required | settings))


def test_json_round_trip_is_exact():
    config = TrainConfig(
        output_dir="运行/一",
        steps=200,
        sample_prompts=("学而时习之", "Call me"),
        model=ByteConfig(num_hidden_layers=2, sliding_window=8, layer_types=("full_attention", "sliding_attention")),
        data=DataConfig(train=("a.jsonl",)),
        schedule=ScheduleConfig(name="wsd", warmup_steps=3, decay_steps=10),
    )
    text = config.to_json()
    again = TrainConfig.from_dict(json.loads(text))
    assert again == config
    assert again.to_json() == text
    assert "运行" in text


def test_an_int_given_for_a_float_is_stored_as_one():
    assert ByteConfig(rope_theta=10000).to_dict() == ByteConfig().to_dict()
    assert type(ByteConfig(rope_theta=10000).rope_theta) is float


def test_from_dict_wants_objects_and_known_names(run):
    with pytest.raises(ConfigError, match="ByteConfig must be an object with named settings, got 3"):
        TrainConfig.from_dict(run.to_dict() | {"model": 3})
    with pytest.raises(ConfigError, match="DataConfig: there is no setting 'trains'; did you mean train"):
        TrainConfig.from_dict(run.to_dict() | {"data": {"trains": ["a"]}})


def test_the_originals_names_are_aliases():
    original = {"model_dim": 96, "num_layers": 3, "n_heads": 6, "num_kv_heads": 2, "hidden_dim": 100, "max_seq_len": 64}
    config = ByteConfig.from_dict(original)
    assert config == ByteConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=100,
        max_position_embeddings=64,
    )
    with pytest.raises(ConfigError, match=r"ByteConfig\.hidden_size is given twice: once as 'dim'"):
        ByteConfig.from_dict({"hidden_size": 96, "dim": 96})


def test_derived_sizes():
    config = ByteConfig(hidden_size=96, num_attention_heads=6, num_hidden_layers=2)
    assert (config.kv_heads, config.head_size, config.mlp_size, config.windows) == (6, 16, 384, (None, None))
    config = dataclasses.replace(config, num_key_value_heads=2, head_dim=32, intermediate_size=100, sliding_window=7)
    assert (config.kv_heads, config.head_size, config.mlp_size, config.windows) == (2, 32, 100, (7, 7))
    config = dataclasses.replace(config, layer_types=("full_attention", "sliding_attention"))
    assert config.windows == (None, 7)


def test_frozen_hashable_and_copied_whole(run):
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.steps = 3  # type: ignore[misc]
    assert copy.deepcopy(run) == run and hash(copy.deepcopy(run)) == hash(run)
    with pytest.raises(ConfigError, match="no setting 'stepz'"):
        dataclasses.replace(run, stepz=3)


def test_patience_needs_validation_data(run):
    with pytest.raises(ConfigError, match=r"evaluation\.patience .* give data\.validation"):
        override(run, ["evaluation.patience=3"])
    assert override(run, ["evaluation.patience=3", "data.validation=v.jsonl"]).evaluation.patience == 3
