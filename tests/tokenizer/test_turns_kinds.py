"""Replies in the tokens of other kinds of tokenizers, and of templates that mark or begin them in unusual ways."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.template import ChatTemplate
from stellarbyte_jax.tokenizer.turns import TurnEncoder

SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>")
BEGIN, END = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = BEGIN + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>' }}{{ '\n' }}" + END
MARKED = (
    BEGIN + "{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}{{ m.content + '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ '<|user|>\n' + m.content + '<|end|>' }}{% endif %}{{ '\n' }}" + END
)
PREPENDED = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
KINDS = {
    "prepend": (normalizers.Sequence(PREPENDED), None),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "other lengths": (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *PREPENDED]), None),
}
SAID = ["Ha ﬁ ½", "ﷺ is ½ of it 🐳 ", "  鲸\n", "\ufdd0ab\ufdd1", "<|end|>", "<|assistant|>\nab"]
TALK = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(SAID)]


def written(path, normalizer=None, pre_tokenizer=None, **flags):
    """A tokenizer of the SentencePiece kind, whose other characters are bytes."""
    spaced = pre_tokenizers.Metaspace(prepend_scheme="never")
    library = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.pre_tokenizer = pre_tokenizer or spaced
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=pieces, show_progress=False)
    library.train_from_iterator(["ab user assistant half of it is fi \n"] * 3, trainer)
    described = json.loads(library.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 3]
    library = Tokenizer.from_str(json.dumps(described))
    if normalizer is not None:
        library.normalizer, library.pre_tokenizer = normalizer, None
    library.add_special_tokens([AddedToken(token, normalized=False, **flags) for token in SPECIAL])
    library.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return written(tmp_path_factory.mktemp("words"), normalizers.Replace(" ", "▁"))


def turns_of(words, source, messages=None):
    return TurnEncoder(words, ChatTemplate(source, words.special_tokens, "here")).encode(messages or TALK)


def learnt(words, turns, number=None):
    wanted = [i for i, r in zip(turns.ids, turns.replies, strict=True) if (r if number is None else r == number)]
    return "".join(words._plain.id_to_token(i) for i in wanted).replace("<0x0A>", "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_what_transformers_marks(kind, tmp_path):
    """Where a token stands for text of another length."""
    transformers = pytest.importorskip("transformers")
    words = written(tmp_path, *KINDS[kind])
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    safe = [m for m in TALK if "<|" not in m["content"]]
    expected = peer.apply_chat_template(safe, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
    for source in (PLAIN, MARKED):
        turns = turns_of(words, source, safe)
        assert turns.ids == expected["input_ids"]
        assert [int(reply > 0) for reply in turns.replies] == expected["assistant_masks"]
    turns = turns_of(words, PLAIN)
    ends = [r for i, r in zip(turns.ids, turns.replies, strict=True) if i == words._plain.token_to_id("<|end|>")]
    assert ends == [0, 1, 0, 2, 0, 3]


def test_text_that_the_model_makes_a_special_token_of_moves_nothing(tmp_path):
    """It becomes pieces, which have its place."""
    words = written(tmp_path, normalizers.Replace(" ", "▁"))
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("fi").tokens == ["fi"]
    library.add_special_tokens([AddedToken("fi", normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    words = load_tokenizer(tmp_path)
    talk = [{"role": "user", "content": "fi of fi"}, {"role": "assistant", "content": "it fi"}]
    for source in (PLAIN, MARKED):
        turns = turns_of(words, source, talk)
        assert words._plain.token_to_id("fi") not in turns.ids
        assert learnt(words, turns) == "it▁fi<|end|>"


def test_a_special_token_of_the_prompt_is_not_learnt(tmp_path):
    """Where it takes the spaces with which a reply begins, as that of Phi 3 does."""
    words = written(tmp_path, normalizers.Replace(" ", "▁"), rstrip=True)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "  b"}]
    for source in (PLAIN, MARKED):
        assert learnt(words, turns_of(words, source, talk)) == "b<|end|>"


def test_a_reply_begins_where_its_prompt_ends(words):
    """Also where the reply spells what the prompt ends with."""
    thinking = PLAIN.replace("<|assistant|>\n{% endif %}", "<|assistant|>\nit\n{% endif %}")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "it\nab"}]
    assert learnt(words, turns_of(words, thinking, talk)) == "ab<|end|>"
    talk[1]["content"] = "b"
    assert learnt(words, turns_of(words, thinking, talk)) == "b<|end|>"
    assert learnt(words, turns_of(words, PLAIN, [*talk[:1], {"role": "assistant", "content": "a"}])) == "a<|end|>"


def test_a_prompt_that_is_longer_than_the_reply_takes_nothing_of_its_end(words):
    thinking = PLAIN.replace("<|assistant|>\n{% endif %}", "<|assistant|>\nab<|end|>{% endif %}")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab"}]
    assert learnt(words, turns_of(words, thinking, talk)) == "ab<|end|>"


def test_marks_that_are_a_comment_are_none(words):
    assert turns_of(words, "{# {% generation %} #}" + PLAIN) == turns_of(words, PLAIN)


@pytest.mark.parametrize("form", ["{% macro one(m) %}", "{% set one %}"])
def test_marks_whose_place_is_not_known_are_refused(form, words):
    one = MARKED.removeprefix(BEGIN).split("{% endfor %}")[0]
    macro = form + one + ("{% endmacro %}" if "macro" in form else "{% endset %}")
    source = macro + BEGIN + "{{ one(m) }}" + END if "macro" in form else BEGIN + macro + "{{ one }}" + END
    with pytest.raises(ValueError, match=r"of here has {% generation %} in a macro, a set block or a filter"):
        turns_of(words, source)


def test_marks_belong_to_the_reply_that_says_them(words):
    """Also where one has two and the other none."""
    halves = (
        "{% generation %}{{ m.content[:1] }}{% endgeneration %}{% generation %}{{ m.content[1:] }}{% endgeneration %}"
    )
    for at in (1, 3):
        source = (
            BEGIN + "{% if loop.index0 == " + str(at) + " %}" + halves + "{% else %}{{ m.content }}{% endif %}|" + END
        )
        turns = turns_of(words, source, TALK[:2] * 2)
        assert set(turns.replies) == {0, (at + 1) // 2}


def test_marks_of_the_first_reply_are_its_own_where_the_second_is_not_written(words):
    halves = (
        "{% generation %}{{ m.content[:1] }}{% endgeneration %}{% generation %}{{ m.content[1:] }}{% endgeneration %}"
    )
    turns = turns_of(words, BEGIN + "{% if loop.index0 == 1 %}" + halves + "{% endif %}" + END, TALK[:2] * 2)
    assert set(turns.replies) == {1}
