"""A run is a Python file, and every mistake in it or in an override has one clear message."""

import dataclasses
import sys
from pathlib import Path

import pytest

from stellarbyte_jax.config import ByteConfig, ConfigError, DataConfig, TrainConfig, compose, load, override


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
        ("steps", r"setting 'steps': expected section\.name=value"),
        ("stps=3", r"no setting 'stps'; did you mean steps"),
        ("model.hiden_size=3", r"no setting 'model\.hiden_size'; did you mean model\.hidden_size"),
        ("hidden_size=3", r"no setting 'hidden_size'; did you mean model\.hidden_size"),
        ("modle.hidden_size=3", r"did you mean model\.hidden_size"),
        ("schedule=cosine", r"no setting 'schedule'; did you mean schedule\.name or schedule\.warmup_steps"),
        ("steps.more=3", r"no setting 'steps\.more'"),
        ("=3", r"no setting ''"),
        ("steps=many", r"setting steps=many: steps must be int \(positive, below 2.(31|63)\)"),
        ("steps=1.5", r"steps must be int"),
        ("steps=" + "[" * 20_000, r"setting steps=\[+ \.\.\. \[+: steps must be int"),
        (f"steps={2**63}", r"steps must be int \(positive, below 2\^63\)"),
        ("steps=none", r"steps must be int"),
        ("steps=true", r"steps must be int"),
        ("steps=0", r"steps must be int \(positive, below 2.(31|63)\)"),
        ("model.tie_word_embeddings=1", r"tie_word_embeddings must be bool"),
        ("model.hidden_act=relu", r"hidden_act must be one of silu, gelu, gelu_pytorch_tanh$"),
        ("model.rope_theta=nan", r"rope_theta must be float \(positive, finite\)"),
        ("model.rope_theta=inf", r"rope_theta must be float \(positive, finite\)"),
        ("model.head_dim=wide", r"head_dim must be int \(positive, below 2.(31|63)\) or none"),
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
    (tmp_path / "train_config.json").touch()
    with pytest.raises(ConfigError, match=r"did you mean .*/train_config\.json\?$"):
        load(tmp_path / "train_conf.json")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"config\(\) must return a TrainConfig, got NoneType"),
        ("return TrainConfig(output_dir='a', stepz=3)", r"line 5: .*no setting 'stepz'; did you mean steps"),
        ("return TrainConfig(output_dir='a', steps='3')", r"line 5: TrainConfig\.steps must be int .*got '3'"),
        ("return TrainConfig(output_dir='a')", r"line 5: TypeError: .*missing .*'steps'"),
        ("return TrainConfg()", r"line 5: NameError: .*TrainConfg"),
        ("return TrainConfig(", r"line 5: SyntaxError: '\(' was never closed$"),
        ("return {}['a']", r"line 5: KeyError: 'a'$"),
        ("raise SystemExit(3)", r"line 5: it ends the program \(SystemExit: 3\); leave that out$"),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path, body, message, monkeypatch):
    path = write(tmp_path / "run.py", body)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.py").symlink_to(path)
    for given in (str(path), "run.py", "folder/../run.py", "link.py"):
        with pytest.raises(ConfigError, match=message) as caught:
            load(given)
        start = f"{given}, " if message.startswith("line") else f"{given}: "
        assert str(caught.value).startswith(start)


def test_a_faulty_neighbour_is_named_with_its_line_too(tmp_path):
    write(tmp_path / "base.py", "return TrainConfig(")
    (tmp_path / "run.py").write_text("\nfrom .base import config\n")
    with pytest.raises(ConfigError, match=r"run\.py, line 2: SyntaxError: .*\(base\.py, line 5\)$"):
        load(tmp_path / "run.py")


def test_a_file_without_config_or_of_another_kind(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.py: must define `def config\(\) -> TrainConfig`"):
        load(tmp_path / "empty.py")
    (tmp_path / "run.yaml").write_text("steps: 3")
    with pytest.raises(ConfigError, match=r"run\.yaml must be a Python file"):
        load(tmp_path / "run.yaml")


BASE = """
from stellarbyte_jax.config import TrainConfig, beside
def config():
    return TrainConfig(output_dir="a", steps={steps}, seed=7, sample_prompts=(beside(__file__, "../x.txt"),))
"""
OTHER = """
import dataclasses
from .base import config as base
def config():
    return dataclasses.replace(base(), output_dir="b")
"""


def test_a_config_imports_its_neighbour_which_is_read_anew(tmp_path):
    (tmp_path / "other.v2.py").write_text(OTHER)
    for steps in (3000, 400):
        (tmp_path / "base.py").write_text(BASE.format(steps=steps))
        loaded = load(tmp_path / "other.v2.py")
        assert (loaded.output_dir, loaded.steps, loaded.seed) == ("b", steps, 7)
    assert not [name for name in sys.modules if name.startswith("_config_files")]


def test_paths_beside_a_config_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "x.txt").write_text("here")
    (tmp_path / "configs" / "base.py").write_text(BASE.format(steps=200))
    for folder, expected in ((tmp_path, "x.txt"), (tmp_path / "configs", "../x.txt")):
        monkeypatch.chdir(folder)
        (found,) = load(tmp_path / "configs" / "base.py").sample_prompts
        assert found == expected and Path(found).read_text() == "here"


def test_a_config_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("quickstart").output_dir == "runs/quickstart"
    with pytest.raises(
        ConfigError, match=rf"file quikstart does not exist \(looked from {tmp_path}\); did you mean quick"
    ):
        load("quikstart")
    with pytest.raises(ConfigError, match=rf"quickstart\.py does not .*{tmp_path}\); did you mean quickstart\?"):
        load("quickstart.py")
    with pytest.raises(ConfigError, match=r"configs/quickstart does not exist \(looked from"):
        load("configs/quickstart")
    (tmp_path / "quickstart").write_text("")  # a file that is there is what is meant
    with pytest.raises(ConfigError, match="must be a Python file"):
        load("quickstart")


@pytest.mark.parametrize("name", ["quickstart", "pretrain", "stellarbyte"])
def test_the_configs_of_the_repository_work_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load(Path(__file__).parents[2] / "configs" / f"{name}.py").data
    assert all(Path(p).is_file() for p in (*data.train, *data.validation)) and Path(data.tokenizer).is_dir()


def test_the_settings_of_a_run_are_a_config_file(tmp_path, run):
    path = tmp_path / "train_config.json"
    path.write_text(run.to_json())
    assert load(path) == run
    assert load(path, ["steps=3000"]).steps == 3000
    message = rf"^config file {tmp_path} is a directory; the settings of this run are in {path}$"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"^config file {tmp_path} is a directory; name a Python file, or the "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not valid JSON: "),
        ("[]", r"config\.json must hold a JSON object, got list"),
        (
            '{"model_type": "llama"}',
            r"config\.json holds no settings of a run, as train_config\.json does: TrainConfig",
        ),
        ('{"output_dir": "a", "steps": 0}', r"train_config\.json does: TrainConfig\.steps must be int"),
        ('{"output_dir": "a", "steps": 200, "steps": 300}', r"config\.json gives two values for the key 'steps'"),
    ],
)
def test_a_json_file_without_settings_of_a_run(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "config.json")


INHERITED = ByteConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)


@pytest.fixture
def inherit():
    """What lies in a directory, and a note of each question."""

    def inherit(init_from: str, output_dir: str) -> dict[str, object]:
        inherit.asked.append((init_from, output_dir))
        return {"model": INHERITED.to_dict(), "data.tokenizer": "theirs", "data.add_bos": False}

    inherit.asked = []
    return inherit


def made(**settings) -> TrainConfig:
    return TrainConfig(**({"output_dir": "runs/b", "steps": 1000} | settings))


def test_an_override_of_init_from_replaces_model_and_tokenizer(inherit):
    written = made(model=ByteConfig(qk_norm=True), data=DataConfig(tokenizer="ours", sequence_length=256))
    overrides = ["init_from=runs/a", "model.hidden_dropout=0.1", "output_dir=runs/c"]
    composed = compose(written, overrides, inherit)
    assert composed.model == dataclasses.replace(INHERITED, hidden_dropout=0.1)
    assert (composed.data.tokenizer, composed.data.add_bos) == ("theirs", False)
    assert (composed.init_from, composed.data.sequence_length) == ("runs/a", 256)
    assert inherit.asked == [("runs/a", "runs/c")]
    explicit = compose(written, [*overrides, "data.tokenizer=mine", "data.add_bos=true"], inherit)
    assert (explicit.data.tokenizer, explicit.data.add_bos) == ("mine", True)


def test_an_init_from_of_the_config_gives_what_it_leaves_out(inherit):
    bare = compose(made(init_from="runs/a", data=DataConfig(sequence_length=512)), [], inherit)
    assert (bare.model, bare.data.tokenizer) == (INHERITED, "theirs")
    whole = made(init_from="runs/a", model=ByteConfig(qk_norm=True), data=DataConfig(tokenizer="ours"))
    assert compose(whole, [], inherit) == whole
    assert compose(whole, ["init_from=none"], inherit) == dataclasses.replace(whole, init_from=None)
    own = made(init_from="runs/a", model=ByteConfig(qk_norm=True))
    assert compose(own, [], inherit).model == own.model and compose(own, [], inherit).data.tokenizer == "theirs"


def test_without_init_from_nothing_is_inherited(inherit):
    assert compose(made(), ["steps=300"], inherit).steps == 300 and inherit.asked == []


def test_what_is_inherited_must_fit_the_rest(inherit):
    """Also a model of which the config could not know, being left out."""
    long = DataConfig(sequence_length=4096)
    with pytest.raises(ConfigError, match=r"sequence_length 4096 is longer than model.max_position_embeddings 512"):
        compose(made(init_from="runs/a", data=long), [], inherit)
    with pytest.raises(ConfigError, match=r"sequence_length 4096 is longer than model.max_position_embeddings 2048"):
        compose(made(init_from="x", data=long), [], lambda *_: {"model": ByteConfig().to_dict()})


ANNOTATED = """
from __future__ import annotations
import dataclasses
from stellarbyte_jax.config import TrainConfig
@dataclasses.dataclass
class Mine:
    a: int = 3
def config() -> TrainConfig:
    return TrainConfig(output_dir="x", steps=100 + Mine().a)
"""


def test_a_config_may_define_dataclasses(tmp_path):
    (tmp_path / "a.py").write_text(ANNOTATED)
    assert load(tmp_path / "a.py").steps == 103


def test_lists_of_overrides_are_json_or_words(tmp_path):
    path = write(tmp_path / "a.py", "return TrainConfig(output_dir='runs/a', steps=300, sample_prompts=('x',))")
    for text, expected in (("none", ()), ("a,b", ("a", "b")), ('["a,b"]', ("a,b",)), ("[]", ()), ("[ab]*", ("[ab]*",))):
        assert load(path, [f"sample_prompts={text}"]).sample_prompts == expected
    for text in ("['a', 'b']", '["a",]'):
        with pytest.raises(ConfigError, match="sample_prompts must be a list of str"):
            load(path, [f"sample_prompts={text}"])
    advice = (
        r"must be a list of str: write sample_prompts=a,b without brackets, or JSON, whose texts stand in double quo"
    )
    with pytest.raises(ConfigError, match=advice):
        load(path, ["sample_prompts=[a.jsonl, b.jsonl]"])  # as a shell leaves of ["a.jsonl", "b.jsonl"]


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(
        tmp_path / "a.py",
        "return TrainConfig(output_dir='~/b', steps=300, data=DataConfig(train=('~/a.jsonl', 'c/~'), cache_dir='~'))",
    )
    config = load("~/a.py")
    assert (config.output_dir, config.data.train) == (f"{tmp_path}/b", (f"{tmp_path}/a.jsonl", "c/~"))
    assert (config.data.cache_dir, config.init_from) == (str(tmp_path), None)
    asked: list[tuple[str, ...]] = []

    def inherit(*names: str) -> dict[str, object]:
        asked.append(names)
        return {"model": {}, "data.tokenizer": "theirs"}

    typed = ["output_dir=~/x", "data.validation=~/v*.jsonl,./~/w", "data.tokenizer=~/tok", "init_from=~/old"]
    config = load("~/a.py", typed, inherit)
    assert asked == [(f"{tmp_path}/old", f"{tmp_path}/x")]
    assert (config.output_dir, config.data.validation) == (f"{tmp_path}/x", (f"{tmp_path}/v*.jsonl", "./~/w"))
    assert (config.data.tokenizer, config.init_from) == (f"{tmp_path}/tok", f"{tmp_path}/old")
    assert "~" not in config.to_json().replace("./~/w", "").replace("c/~", "")  # a record holds for other users too


def test_the_home_directory_of_nobody(tmp_path):
    path = write(tmp_path / "a.py", "return TrainConfig(output_dir='runs/a', steps=300)")
    advice = r"there is no home directory of ~no\.body: write the whole path, or \./~no\.body/x for a folder there"
    with pytest.raises(ConfigError, match=rf"^DataConfig\.tokenizer ~no\.body/x: {advice}"):
        load(path, ["data.tokenizer=~no.body/x"])
    with pytest.raises(ConfigError, match=rf"^~no\.body/x: {advice}"):
        load("~no.body/x")
