"""What the project's tokenizer is: its pieces, its files, its chat template."""

import json
from pathlib import Path

import pytest

from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.training.format import CHAT_TEMPLATE, build, pre_tokenizer, save

COMMITTED = Path(__file__).resolve().parents[3] / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(COMMITTED)


@pytest.fixture(scope="module")
def peer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(COMMITTED)


def test_pieces():
    def cut(text):
        return [text[a:b] for _, (a, b) in pre_tokenizer().pre_tokenize_str(text)]

    assert cut("The cat's 'start' isn't") == ["The", " cat", "'s", " '", "start", "'", " isn", "'t"]
    assert cut("    return foo_bar.x\n\n") == ["    ", "return", " foo", "_bar", ".x", "\n\n"]
    assert cut("你好，世界！ok12") == ["你好", "，", "世界", "！", "ok", "1", "2"]
    assert max(map(len, cut("天" * 50))) == 16


def test_chat_template(tokenizer, peer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 你好 \n"},
        {"role": "assistant", "content": "Hi."},
    ]
    expected = "<|SBOS|>system\nBe brief.<|SEOS|>\n<|SBOS|>user\n 你好 \n<|SEOS|>\n<|SBOS|>assistant\nHi.<|SEOS|>\n"
    assert tokenizer.chat_template == peer.chat_template == CHAT_TEMPLATE
    assert peer.apply_chat_template(messages, tokenize=False) == expected
    prompt = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|SBOS|>assistant\n"
    ids = peer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(expected, parse_special=True)
    with pytest.raises(Exception, match="unknown role 'tool'"):
        peer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_tokenizer_files_are_written_whole(tmp_path):
    save(build([("a", "b")]), tmp_path, 128)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 128
    assert not list(tmp_path.glob("*.partial"))
