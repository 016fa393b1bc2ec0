r"""What the project's tokenizer is: its pieces, its ids, its files.

Ids are laid out as special tokens, then the 256 bytes, then one id for each merge in the order in which it was learned,
so the id of a merge never changes when a later training stage appends more of them.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stellarbyte_jax.tokenizer.directory import write_tokenizer

PAD, BOS, EOS = "<|PAD|>", "<|SBOS|>", "<|SEOS|>"

SPECIAL_TOKENS = (
    PAD,
    BOS,
    EOS,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|think|>",
    "<|/think|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    *(f"<|reserved_{i}|>" for i in range(18)),
)

# Alternatives are tried in this order; a character that none of them takes is a piece of its own, so nothing is lost.
# A space joins the following word or punctuation only when it is alone: indentation stays whole, and a prompt that
# ends after it tokenises as it did in training. Line ends never join anything for the same reason.
PIECES = (
    r"(?i:'(?:s|t|d|m|re|ve|ll))(?!\p{L})",  # English contractions, but not the opening quote of 'start'
    r"\p{Han}{1,16}",  # no spaces between Chinese words: the limit bounds the cost of one piece
    r"[ ._/\\<$@#&-]?[\p{L}\p{M}&&[^\p{Han}]]+",  # a word with the sign that code, paths, markup or LaTeX put before it
    r"\p{N}",  # digits one by one: arithmetic sees place values
    r" ?[^\s\p{L}\p{N}]+",
    r"[\r\n]+",
    r"[^\S\r\n]+",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception(\"unknown role '\" ~ message['role'] ~ \"': use system, user or assistant\") -}}"
    "{%- endif -%}"
    "{{- '<|SBOS|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|SEOS|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|SBOS|>assistant\\n' -}}{%- endif -%}"
)


@functools.cache
def byte_characters() -> Mapping[str, int]:
    """The character that stands for a byte in a byte-level vocabulary -> that byte.

    Printable Latin-1 bytes stand for themselves, the 68 others for U+0100 to U+0143, in order
    (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def byte_alphabet() -> tuple[str, ...]:
    """The 256 characters of :func:`byte_characters`, sorted: the order of their ids."""
    return tuple(sorted(byte_characters()))


def pre_tokenizer(pattern: str | None = None) -> Any:
    """The step that cuts text into pieces and writes each as byte characters; ``pattern`` replaces :data:`PIECES`."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern or "|".join(PIECES)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def vocabulary(merges: Sequence[tuple[str, str]], special_tokens: Sequence[str] = SPECIAL_TOKENS) -> dict[str, int]:
    """Token -> id in the layout above.

    Raises:
        ValueError: Two merges spell the same token, or a merge spells a special token.
    """
    tokens = [*special_tokens, *byte_alphabet(), *(left + right for left, right in merges)]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError(f"{len(tokens) - len(ids)} tokens are spelled twice: two merges must not build the same token")
    return ids


def build(
    merges: Sequence[tuple[str, str]], special_tokens: Sequence[str] = SPECIAL_TOKENS, pattern: str | None = None
) -> Any:
    """A ``tokenizers.Tokenizer`` of these merges: byte-level BPE, no normaliser, lossless on every string.

    Where special tokens are asked for, a text begins with bos, as every document does in training.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(merges, special_tokens), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens])
    if BOS in special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer


def save(tokenizer: Any, directory: str | Path, model_max_length: int) -> None:
    """Writes ``build``'s tokenizer as a directory that ``transformers.AutoTokenizer`` reads."""
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    rest = [t for t in SPECIAL_TOKENS if t not in names.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "extra_special_tokens": {},
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    special_tokens_map = {**names, "additional_special_tokens": rest}
    write_tokenizer(Path(directory), tokenizer.to_str(pretty=True) + "\n", config, special_tokens_map)
