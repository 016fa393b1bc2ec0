"""The tokenizer as training and generation use it: any Hugging Face directory, read without transformers."""

import bisect
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from stellarbyte_jax.tokenizer.directory import CONFIG, LIBRARY, TokenizerDirectory, vocabulary_size
from stellarbyte_jax.tokenizer.special import named_ids

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # Unicode keeps them free for such uses


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; made by :func:`load_tokenizer`, and pickled as its path."""

    path: str
    vocab_size: int  # see directory.vocabulary_size
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None
    special_tokens: Mapping[str, str]  # spellings by name, such as bos_token
    fingerprint: str  # sha256 of tokenizer.json, and of the tokens that other files add to it
    _plain: Any = field(repr=False, compare=False)  # takes a spelled special token for ordinary text

    @cached_property
    def _parsing(self) -> Any:
        library = type(self._plain).from_str(self._plain.to_str())
        library.encode_special_tokens = False
        return library

    @cached_property
    def _added(self) -> dict[str, Any]:
        """Descriptions of added tokens, special ones and others, by their spellings, the longest first."""
        added = self._plain.get_added_tokens_decoder().values()
        described = {token.content: token for token in added if token.content}
        return dict(sorted(described.items(), key=lambda item: len(item[0]), reverse=True))

    @property
    def special_spellings(self) -> list[str]:
        """Texts of special tokens, the longest first."""
        return [spelling for spelling, token in self._added.items() if token.special]

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return self._control

    @cached_property
    def _control(self) -> frozenset[int]:
        """Ids of special tokens, but for the one that stands for unknown text."""
        try:
            unknown = {token.id for token in self._plain.model.tokenize(_NONCHARACTERS[0])}
        except Exception:  # the library's way to say that there is none
            unknown = set()
        ids = {self._plain.token_to_id(s) for s, token in self._added.items() if token.special}
        return frozenset(ids - unknown)

    @cached_property
    def _stand_ins(self) -> dict[tuple[str, frozenset[str]], tuple[Any, dict[int, int]]]:
        return {}

    def _with_stand_ins(self, mark: str, markers: frozenset[str]) -> tuple[Any, dict[int, int]]:
        """The library, which takes ``mark number mark`` for the added token of this number, and the ids of these.

        A stand-in strips what its token strips and is found when its token would be, before or after text is
        normalized. Special tokens and ``markers`` are not found otherwise.
        """
        from tokenizers import AddedToken

        if (mark, markers) in self._stand_ins:
            return self._stand_ins[mark, markers]
        library = type(self._plain).from_str(self._plain.to_str())
        library.encode_special_tokens = True
        for spelling in markers:
            token = self._added[spelling]
            flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            library.add_special_tokens([AddedToken(spelling, special=True, **flags)])
        # New tokens are numbered from the count of tokens on, which others have where ids are left out.
        free = self.vocab_size - library.get_vocab_size()
        library.add_tokens([AddedToken(f"{mark}{mark}{number}", normalized=False) for number in range(free)])
        ids: dict[int, int] = {}
        for number, (spelling, token) in enumerate(self._added.items()):
            name = f"{mark}{number}{mark}"
            stays = library.normalizer is None or library.normalizer.normalize_str(name) == name
            stripped = {"lstrip": token.lstrip, "rstrip": token.rstrip}
            library.add_tokens([AddedToken(name, normalized=token.normalized and stays, **stripped)])
            ids[library.token_to_id(name)] = library.token_to_id(spelling)
        self._stand_ins[mark, markers] = library, ids
        return library, ids

    def _text_only(
        self, ids: list[int], places: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids with smaller pieces for special tokens, which some models make of their spelling by themselves.

        ``places`` are repeated for the pieces of a token.
        """
        if self._control.isdisjoint(ids):
            return ids, list(places)
        model = self._plain.model

        def smaller(piece: str) -> list[int]:
            if len(piece) < 2:
                return []
            made = [(token.id, token.value) for half in (piece[:1], piece[1:]) for token in tokenized(half)]
            return [n for number, value in made for n in (smaller(value) if number in self._control else [number])]

        def tokenized(part: str) -> list[Any]:
            try:
                return model.tokenize(part)
            except Exception:  # unknown, and no token stands for that: as nothing stands for it elsewhere
                return []

        parts = [smaller(model.id_to_token(i)) if i in self._control else [i] for i in ids]
        repeated = [place for place, part in zip(places, parts, strict=False) for _ in part]
        return [n for part in parts for n in part], repeated

    def __repr__(self) -> str:
        """Without the template and the fingerprint, which would fill a screen."""
        special = f"bos_id={self.bos_id}, eos_id={self.eos_id}, pad_id={self.pad_id}"
        chat = "yes" if self.chat_template is not None else "no"
        return f"Tokenizer({self.path!r}, vocab_size={self.vocab_size}, {special}, chat_template={chat})"

    def is_same(self, other: "Tokenizer") -> bool:
        """Whether both make the same ids of every text, with the same bos and eos, however their files are written.

        Programs that load and save a tokenizer write it in the form of their version of the tokenizers library, with
        other ends of lines, merges as lists and settings that have their defaults.
        """
        ends = (self.bos_id, self.eos_id) == (other.bos_id, other.eos_id)
        return ends and (self.fingerprint == other.fingerprint or self._plain.to_str() == other._plain.to_str())

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_unchanged, (self.path, self.fingerprint)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of one text; no special token is added.

        A special token that is spelled out in ``text`` stays ordinary text, so that a document cannot end itself or
        speak as another role. ``parse_special=True`` gives its control id: only for text that the program wrote itself.

        Raises:
            ValueError: It is no string, or holds a lone surrogate, which UTF-8 cannot express.
        """
        library = self._parsing if parse_special else self._plain
        try:
            ids = library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise _unencodable([text]) from None
        return ids if parse_special else self._text_only(ids)[0]

    def encode_around(self, text: str, said: Sequence[tuple[int, int]], template: str = "") -> list[int]:
        """Ids of a text that the program wrote, but for the pieces from ``begin`` to ``end`` that others said.

        Special tokens that it spells are control tokens; those that touch such a piece stay ordinary text, and so do
        other added tokens that it or its template spells, since they are markers of the template. No special token is
        added. All is tokenized at once, so that nothing else changes.

        Raises:
            ValueError: It holds a lone surrogate, or all of the characters that stand for special tokens meanwhile.
        """
        return self.encode_with_places(text, said, template)[0]

    def encode_with_places(
        self, text: str, said: Sequence[tuple[int, int]], template: str = ""
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as :meth:`encode_around` makes them, and the characters of ``text`` from ``begin`` to ``end`` of each.

        Tokens that are pieces of one character have its place.

        Raises:
            ValueError: As there.
        """
        mark = next((mark for mark in _NONCHARACTERS if mark not in text), None)
        if mark is None:
            raise ValueError(
                "the messages hold every noncharacter from U+FDD0 to U+FDEF, which no text has: leave them out"
            )
        pieces: list[tuple[str, int, int]] = []  # what stands for a piece of the text, and its place there
        at, used = 0, set()
        for begin, end in (*said, (len(text), len(text))):
            pieces += [*self._marked(text, at, begin, mark, used), (text[begin:end], begin, end)]
            at = end
        used.update(spelling for spelling in self._added if spelling in template)
        library, ids = self._with_stand_ins(mark, frozenset(s for s in used if not self._added[s].special))
        try:
            encoded = library.encode("".join(piece for piece, _, _ in pieces), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise _unencodable([text]) from None
        found, places = self._text_only(encoded.ids, _places(pieces, encoded.offsets))
        return [ids.get(i, i) for i in found], places

    def _marked(self, text: str, begin: int, end: int, mark: str, used: set[str]) -> Iterator[tuple[str, int, int]]:
        """A piece of a text with stand-ins for its added tokens, which are noted in ``used``, each with its place."""
        numbers = {spelling: number for number, spelling in enumerate(self._added)}
        at = begin
        for found in re.finditer("|".join(map(re.escape, numbers)), text[begin:end]) if numbers else ():
            first, last = begin + found.start(), begin + found.end()
            around = text[max(0, first - 1) : last + 1].replace(found[0], "", 1)
            if self._added[found[0]].single_word and re.search(r"\w", around):
                continue
            used.add(found[0])
            yield text[at:first], at, first
            yield f"{mark}{numbers[found[0]]}{mark}", first, last
            at = last
        yield text[at:end], at, end

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Ids of many texts at once, on all cores, each as :meth:`encode` makes them.

        Raises:
            ValueError: A text is no string, or holds a lone surrogate, which UTF-8 cannot express.
        """
        library = self._parsing if parse_special else self._plain
        try:
            rows = library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise _unencodable(texts) from None
        return [row.ids if parse_special else self._text_only(row.ids)[0] for row in rows]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        numbers = [int(i) for i in ids]
        wrong = [i for i in numbers if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"id {wrong[0]} is not in the vocabulary of {self.vocab_size} tokens of {self.path}")
        return self._plain.decode(numbers, skip_special_tokens=skip_special_tokens)

    def require(self, name: Literal["bos", "eos", "pad"]) -> int:
        """Id of a special token that the caller cannot do without.

        Raises:
            ValueError: The tokenizer has none.
        """
        token_id = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}[name]
        if token_id is None:
            raise ValueError(
                f"the tokenizer in {self.path} has no {name}_token, which is needed here: "
                f'add "{name}_token" to its {CONFIG}'
            )
        return token_id


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face directory.

    ``tokenizer.json`` and ``tokenizer_config.json`` must be there. The other files that some versions of transformers
    write are read too, and count as they do there (``named.find_special_tokens`` for special tokens); the separate chat
    template goes before the configuration's.

    Raises:
        ValueError: The directory or a file is missing or broken, or a named special token is not in the vocabulary.
    """
    directory = TokenizerDirectory(path)
    content, library = directory.read_library()
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    vocabulary = library.get_vocab(with_added_tokens=True)
    ids = named_ids(directory, vocabulary)
    return Tokenizer(
        path=str(directory.path),
        vocab_size=vocabulary_size(vocabulary.values()),
        bos_id=ids.get("bos_token_id"),
        eos_id=ids.get("eos_token_id"),
        pad_id=ids.get("pad_token_id"),
        chat_template=directory.chat_template(),
        special_tokens=directory.special_tokens(),
        fingerprint=hashlib.sha256(content).hexdigest(),
        _plain=library,
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer has ids that a model of ``vocab_size`` rows cannot embed."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer.path} has {tokenizer.vocab_size} tokens, model.vocab_size is {vocab_size}: "
            f"give a new model model.vocab_size={tokenizer.vocab_size} or more, make room in trained weights with "
            "`convert resize`, or choose another tokenizer"
        )


def _places(pieces: Sequence[tuple[str, int, int]], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in a text of tokens whose ``offsets`` are places among what stands for its pieces."""
    begins: list[int] = []
    at = 0
    for piece, _, _ in pieces:
        begins.append(at)
        at += len(piece)

    def place(offset: int, is_end: bool) -> int:
        number = max(0, bisect.bisect_right(begins, offset - is_end) - 1)  # of several without characters, the last
        piece, begin, end = pieces[number]
        inside = offset - begins[number]
        if len(piece) == end - begin:
            return begin + inside
        return end if is_end else begin  # a stand-in is one token

    return [(place(begin, False), place(end, True) if begin < end else place(begin, False)) for begin, end in offsets]


def _load_unchanged(path: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{path}/{LIBRARY} has changed since this process started: start the run again")
    return tokenizer


def _unencodable(texts: Sequence[str]) -> ValueError:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return ValueError(f"text {number} must be a string, got {type(text).__name__}")
        for position, character in enumerate(text):
            if 0xD800 <= ord(character) < 0xE000:
                return ValueError(
                    f"text {number} holds the lone surrogate U+{ord(character):04X} at character {position}, which is "
                    "no Unicode character: mend the file that it comes from"
                )
    raise AssertionError("the library refused texts that it should take")
