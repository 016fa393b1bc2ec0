"""Text in, text out: characters over token borders, stop texts, chat, and the script."""

import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.variants import init
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from stellarbyte_jax import ByteConfig, ByteTransformer, generate, save_pretrained
from stellarbyte_jax.checkpoint.weights import save_initial
from stellarbyte_jax.cli.generate import main
from stellarbyte_jax.inference.reconfigure import reconfigure
from stellarbyte_jax.inference.text import TextStream, continue_text, encode_prompt, generate_text
from stellarbyte_jax.tokenizer.chat import Conversation
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.special import adds_bos

ROOT = Path(__file__).parents[2]
TEXT = "A river 春风又绿江南岸, 𠮷 🙂🙂 end\n"


@pytest.fixture(scope="session")
def words():
    """The committed tokenizer."""
    return load_tokenizer(ROOT / "tokenizer")


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tokenizer without merges: its tokens are bytes."""
    return load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("letters")))


@pytest.fixture(scope="session")
def tiny(letters):
    model = ByteTransformer(
        ByteConfig(
            vocab_size=letters.vocab_size + 5,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            compute_dtype="float32",
            initializer_range=0.3,
        )
    )
    return model, init(model)


@pytest.mark.parametrize("name", ["words", "letters"])
def test_characters_appear_when_they_are_complete(name, request):
    tokenizer = request.getfixturevalue(name)
    stream = TextStream(tokenizer)
    parts = [stream.push([i]) for i in tokenizer.encode(TEXT)]
    assert "".join(parts) == TEXT and stream.finish() == ""
    assert "" in parts, "some character must be spread over tokens, or the test shows nothing"
    assert not any("\ufffd" in part for part in parts)


def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_shows_them(letters):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, letters.vocab_size, size=30).tolist()
        stream = TextStream(letters)
        assert "".join(stream.push([i]) for i in ids) + stream.finish() == letters.decode(ids)


def test_an_incomplete_end_is_given_out_at_the_end(letters):
    stream = TextStream(letters)
    ids = letters.encode("ab春")
    assert stream.push(ids[:-1]) == "ab"
    assert stream.finish() == "\ufffd"


def test_ids_beyond_the_tokenizer_are_visible(letters):
    stream = TextStream(letters, context=[letters.vocab_size + 1])
    a, b = letters.encode("ab")
    assert stream.push([a, letters.vocab_size, b]) == "a\ufffdb"


def test_the_space_after_the_prompt_is_kept(tmp_path):
    library = Library(models.WordLevel({"▁a": 0, "▁b": 1, "<s>": 2}, unk_token="<s>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert TextStream(tokenizer, context=[0]).push([1, 0]) == " b a"
    assert TextStream(tokenizer).push([1, 0]) == "b a"


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["abEN", "Dcd", "x"], ["ab", "", "", ""]),
        (["END"], ["abEN", "Tcd", "E"], ["ab", "ENTcd", "", "E"]),
        (["cd", "bc"], ["abcd"], ["a", ""]),
        (["aab"], ["aa", "aab"], ["", "aa", ""]),
        ([], ["END"], ["END", ""]),
    ],
)
def test_stop_texts_are_cut_and_their_beginnings_held_back(letters, stops, pieces, expected):
    stream = TextStream(letters, stop_texts=stops)
    parts = [*(stream.push(letters.encode(piece)) for piece in pieces), stream.finish()]
    assert parts == expected
    assert stream.stopped == any(stop in "".join(pieces) for stop in stops)


@pytest.mark.parametrize("stops", ["END", [""]])
def test_bad_stop_texts_are_refused(letters, stops):
    with pytest.raises(ValueError, match="stop_texts must be a list of texts that are not empty"):
        TextStream(letters, stop_texts=stops)


def test_text_is_that_of_the_new_tokens(tiny, letters):
    prompts = ["Hi", "春"]
    rows = [encode_prompt(letters, p, add_bos=True) for p in prompts]
    assert rows[0][0] == letters.bos_id and encode_prompt(letters, "Hi", add_bos=False) == rows[0][1:]
    settings = dict(temperature=1.0, seed=4)
    new = generate(*tiny, rows, max_new_tokens=20, stop_tokens=letters.eos_id, **settings).sequences
    expected = []
    for row in new:
        stream = TextStream(letters)
        expected.append(stream.push(row) + stream.finish())
    assert generate_text(*tiny, letters, prompts, max_new_tokens=20, **settings) == expected

    heard = ["", ""]

    def hear(row, text):
        heard[row] += text

    continued = continue_text(*tiny, letters, rows, max_new_tokens=20, on_text=hear, **settings)
    assert continued.texts == heard == expected

    stop = expected[0][4:6]
    stopped = continue_text(
        *tiny, letters, rows[:1] * 2, max_new_tokens=20, stop_texts=[stop], **settings | {"seed": [4, 4]}
    )
    assert stopped.texts[0] == stopped.texts[1]
    assert stop not in stopped.texts[0]


@pytest.fixture(scope="session")
def script():
    return main


@pytest.fixture(scope="session")
def directories(tmp_path_factory, tiny, letters):
    """The same weights as a Hugging Face directory and as a run."""
    base = tmp_path_factory.mktemp("models")
    save_pretrained(base / "hf", *tiny, tokenizer=letters.path)
    save_initial(base / "run", tiny[0].config, tiny[1])
    shutil.copytree(letters.path, base / "run" / "tokenizer")
    return base


COMMON = ["--max-new-tokens", "12", "--compute-dtype", "fp32"]


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_the_script_streams_one_prompt(kind, script, directories, tiny, letters, capsys):
    assert script(["--model", str(directories / kind), "--prompt", "Hi", "--bos", *COMMON]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Hi" + generate_text(*tiny, letters, ["Hi"], max_new_tokens=12)[0] + "\n"
    assert "prompts: 3 tokens" in shown.err and "tokens/s" in shown.err and "compiled before that in" in shown.err


def test_the_script_takes_bos_from_the_training(script, directories, tiny, letters, capsys):
    outputs = {}
    for kind in ("hf", "run"):
        assert script(["--model", str(directories / kind), "--prompt", "Hi", *COMMON]) == 0
        outputs[kind] = capsys.readouterr().out
    for kind, bos in (("run", True), ("hf", adds_bos(letters.path, letters.bos_id, letters.eos_id))):
        assert outputs[kind] == "Hi" + generate_text(*tiny, letters, ["Hi"], max_new_tokens=12, add_bos=bos)[0] + "\n"


def test_the_script_takes_several_prompts_and_files(script, directories, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("春天\n", encoding="utf-8")
    sampled = ["--temperature", "1", "--top-k", "9", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "3"]
    command = ["--model", str(directories / "run"), "--prompt", "Hi", "--prompt-file", str(file), *COMMON, *sampled]
    assert script(command) == 0
    first, second = capsys.readouterr().out.split("\n---\n")
    assert first.startswith("Hi") and second.startswith("春天")


def test_the_script_holds_a_conversation(script, directories, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n"))
    assert script(["--model", str(directories / "run"), "--chat", *COMMON]) == 0
    assert capsys.readouterr().out.count("> ") >= 2


def test_the_script_takes_special_tokens_in_messages_for_text_unless_asked(script, directories, letters, capsys):
    eos = letters.special_tokens["eos_token"]
    command = ["--model", str(directories / "run"), "--chat", "--prompt", f"a{eos}b", *COMMON]
    counts = []
    for parse in (False, True):
        assert script([*command, *(["--parse-contents"] if parse else [])]) == 0
        counts.append(int(re.search(r"prompts: (\d+) tokens", capsys.readouterr().err)[1]))
        expected = len(Conversation(letters, parse_contents=parse).ask(f"a{eos}b"))
        assert counts[-1] == expected
    assert counts[1] < counts[0]


LONG_WINDOW = ["--set", "sliding_window=24", "sink_tokens=2", "cache.dtype=int8"]


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_the_script_goes_on_past_the_trained_length(kind, script, directories, tiny, letters, capsys):
    model, params = tiny
    settings = {"sliding_window": 24, "sink_tokens": 2, "cache": {"dtype": "int8"}}
    model = ByteTransformer(ByteConfig.from_dict(model.config.to_dict() | settings))
    prompt = "春风又绿" * 7
    command = ["--model", str(directories / kind), "--prompt", prompt, "--bos", *COMMON, *LONG_WINDOW]
    expected = prompt + generate_text(model, params, letters, [prompt], max_new_tokens=12)[0] + "\n"
    for more in ([], ["--prefill-chunk", "16"]):
        assert script([*command, *more]) == 0
        shown = capsys.readouterr()
        assert shown.out == expected and "prompts: 85 tokens" in shown.err


@pytest.mark.parametrize(
    "overrides",
    [
        ["rope_scaling.name=llama3", "rope_scaling.factor=2", "max_position_embeddings=100"],
        ["cache.heavy_hitters=8", "cache.recent=8"],
        ["memory.length=8"],
    ],
)
def test_settings_that_make_room(overrides, script, directories, capsys):
    command = ["--model", str(directories / "run"), "--prompt", "x" * 70, *COMMON]
    assert script(command) in (1, 2) and "--set" in capsys.readouterr().err
    assert script([*command, "--set", *overrides]) == 0


def test_the_script_tells_log_probabilities_and_takes_lengths_seeds_and_stop_tokens(
    script, directories, tiny, letters, capsys
):
    command = ["--model", str(directories / "run"), "--prompt", "Hi", "--prompt", "Ho!", "--compute-dtype", "float32"]
    assert script([*command, "--max-length", "9", "--temperature", "1", "--seed", "5", "6", "--log-probs"]) == 0
    shown = capsys.readouterr()
    rows = [encode_prompt(letters, text, add_bos=True) for text in ("Hi", "Ho!")]
    settings = dict(max_length=9, temperature=1.0, seed=[5, 6], log_probs=True)
    expected = generate(*tiny, rows, stop_tokens=letters.eos_id, **settings)
    means = [scores[:n].mean() for scores, n in zip(expected.log_probs, expected.lengths, strict=True)]
    told = re.findall(r"output (\d): mean log-probability (\S+), perplexity (\S+), (\d+) tokens", shown.err)
    assert [(int(number), int(n)) for number, _, _, n in told] == [(1, expected.lengths[0]), (2, expected.lengths[1])]
    np.testing.assert_allclose([float(mean) for _, mean, _, _ in told], means, atol=1e-3)
    np.testing.assert_allclose([float(p) for _, _, p, _ in told], np.exp(-np.asarray(means)), rtol=1e-3)
    with pytest.raises(ValueError, match="generate with log_probs=True"):
        _ = generate(*tiny, rows, max_length=9).mean_log_probs

    free = generate(*tiny, rows[:1], max_new_tokens=12, stop_tokens=letters.eos_id).sequences[0]
    command = ["--model", str(directories / "run"), "--prompt", "Hi", "--stop-token", str(free[2]), *COMMON]
    assert script(command) == 0
    assert f"output: {free.index(free[2]) + 1} tokens" in capsys.readouterr().err


def test_the_script_remembers_a_text(script, directories, tiny, letters, tmp_path, capsys):
    (tmp_path / "before.txt").write_text("The river of the spring wind\n")
    command = ["--model", str(directories / "run"), "--prompt", "Hi", *COMMON, "--set", "memory.length=12"]
    model, params = reconfigure(tiny[0], ["memory.length=12"]), tiny[1]
    expected = "Hi" + generate_text(model, params, letters, ["The river of the spring windHi"], max_new_tokens=12)[0]
    for more in ([], ["--segment-length", "7"]):
        assert script([*command, "--remember", str(tmp_path / "before.txt"), *more]) == 0
        assert capsys.readouterr().out == expected + "\n"
    assert script(command) == 0
    assert capsys.readouterr().out != expected + "\n"


def test_the_script_reads_prompts_as_other_commands_read_texts(script, directories, tmp_path, capsys):
    """A byte order mark and carriage returns are no part of them; what is not UTF-8 is named with its place."""
    command = ["--model", str(directories / "run"), *COMMON, "--prompt-file", str(tmp_path / "a.txt")]
    outputs = []
    for content in (b"Hi\nHo\n", b"\xef\xbb\xbfHi\r\nHo\r\n"):
        (tmp_path / "a.txt").write_bytes(content)
        assert script(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("Hi\nHo") and outputs[0] == outputs[1]
    (tmp_path / "a.txt").write_bytes(b"Hi\nHo \xff")
    for wrong in (command, [*command[:2], "--prompt", "x", "--remember", str(tmp_path / "a.txt")]):
        assert script(wrong) == 1
        error = capsys.readouterr().err
        assert re.search(r"^error: .*a\.txt:2:4: not valid UTF-8 \(save the file as UTF-8\); mend the file$", error)
        assert error.count("\n") == 1


def test_a_conversation_outgrows_the_positions(script, directories, monkeypatch, capsys):
    """64 positions hold two turns at most; the conversation goes on all the same."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\nd\n\n"))
    command = ["--model", str(directories / "run"), "--chat", "--max-new-tokens", "4", "--compute-dtype", "float32"]
    assert script(command) == 0
    shown = capsys.readouterr()
    assert shown.out.count("> ") >= 5
    forgotten = re.findall(r"\(the (\d+) oldest messages no longer fit into 64 positions\)", shown.err)
    assert forgotten and set(forgotten) == {"2"}
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\nd\n\n"))
    assert script([*command, *LONG_WINDOW]) == 0
    assert "no longer fit" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["--model", "nowhere", "--prompt", "x"],
            "nowhere does not exist \\(looked from .*\\): give a local directory, or a name of",
        ),
        (["--model", "{run}"], "no prompt: give --prompt, --prompt-file or --chat"),
        (
            ["--model", "{run}", "--prompt", "x" * 70],
            "prompt of 71 tokens is longer than the cache.*with --set",
        ),
        (
            ["--model", "{run}", "--prompt", "x", "--top-p", "0.5", *COMMON],
            "^error: --top-p 0.5 has no effect at temperature 0",
        ),
        (
            ["--model", "{run}", "--prompt", "x", "--max-new-tokens", "500"],
            "give a --max-new-tokens of at most \\d+, or shorten the prompt",
        ),
        (
            ["--model", "{run}", "--prompt", "x", "--max-length", "500"],
            "give a --max-length of at most 64, or shorten the prompt",
        ),
        (["--model", "{run}", "--prompt-file", "missing.txt"], "missing.txt"),
        (["--model", "{run}", "--prompt", "x", "--step", "7"], "no checkpoint of step 7"),
        (["--model", "{hf}", "--prompt", "x", "--step", "7"], "a step belongs to a run directory"),
        (["--model", "{run}", "--prompt", "x", "--system", "y"], "--system belongs to --chat"),
        (["--model", "{run}", "--prompt", "x", "--parse-contents"], "--parse-contents belongs to --chat"),
        (["--model", "{run}", "--prompt", "x", "--segment-length", "7"], "--segment-length belongs to --remember"),
        (["--model", "{run}", "--prompt", "x", "--remember", "missing.txt"], "missing.txt"),
        (["--model", "{run}", "--prompt", "x", "--remember", str(ROOT / "LICENSE")], "this model has no memory"),
        (
            ["--model", "{run}", "--prompt", "x", "--remember", str(ROOT / "LICENSE"), "--segment-length", "0"],
            "^error: --segment-length must be an integer of at least 1, got 0$",
        ),
        (["--model", "{run}", "--chat", "--max-length", "9"], "--max-length cannot be used in a conversation"),
        (["--model", "{run}", "--prompt", "x", "--max-length", "9", "--max-new-tokens", "5"], "give either"),
        (["--model", "{hf}", "--prompt", "x", "--set", "windw=3"], "no setting 'windw'"),
        (["--model", "{hf}", "--prompt", "x", "--set", "sliding_window"], "expected section.name=value"),
        (["--model", "{run}", "--prompt", "x", "--set", "sink_tokens=4"], "give sliding_window"),
        (
            ["--model", "{hf}", "--prompt", "x", "--set", "cache.dtype=int8", "hidden_size=32"],
            r"hidden_size=32 asks for other weights than the model has \(embed/embedding: .*\): leave it out",
        ),
    ],
)
def test_the_script_has_one_line_for_each_mistake(command, message, script, directories, capsys):
    command = [word.format(run=directories / "run", hf=directories / "hf") for word in command]
    assert script(command) in (1, 2)
    shown = capsys.readouterr()
    assert len(shown.err.strip().splitlines()) == 1
    assert re.search(message, shown.err) and shown.err.startswith("error: ")
