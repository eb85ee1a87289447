"""Token ids from text and text from token ids: byte-level BPE with the official special tokens.

Not a prompt format: dialects.py decides which parts of a prompt are special tokens.
Read next: dialects.py.
"""

import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from blake3 import blake3
from tokenizers import Tokenizer as HfTokenizer

from overleap.errors import CheckpointError, DialectError, RequestError

PIECE, NEAR = 2**15, 64  # characters: encoded at a time, looked at around a cut
BATCH = 2  # pieces that the library may encode side by side
LONGEST = 2**21  # characters that it may have to take in one piece, at some 450 bytes for each
# A letter or digit before what no tokenizer of this family takes together with it, whatever stands
# before them: a blank or punctuation, and not an accent.
_WORD_END = re.compile(r"[^\W_](?=[\0-\x7f\u3000-\u3003\uff00-\uff0f])(?!\w)")

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
# A message's task -> the token that asks for it ("quick instructions").
TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

# What a tokenizer of this family must know, in the order a trainer hands them out: the first three
# ids are fixed by the released checkpoints (BOS 0, EOS 1, padding 2).
SPECIAL_TOKENS: tuple[str, ...] = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    DSML,
    LATEST_REMINDER,
    *TASKS.values(),
    "<｜extracted_url｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
)


class MarkedText(Protocol):
    """Text of which some ranges are special tokens and the rest is plain (dialects.Prompt)."""

    @property
    def text(self) -> str: ...
    @property
    def special(self) -> Sequence[tuple[int, int]]: ...


class Tokenizer:
    """A byte-level BPE tokenizer.json of any vocabulary size, with BOS as id 0 and EOS as id 1.

    vocab_size     number of ids, the added tokens included
    bos_id, eos_id 0 and 1
    digest         BLAKE3 of the file, hex: two prompts share a cache only under one digest
    """

    def __init__(self, serialized: bytes, source: str = "tokenizer.json") -> None:
        """serialized: the bytes of a tokenizer.json. Raises CheckpointError if it cannot serve."""
        try:
            full = HfTokenizer.from_buffer(serialized)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{source} is not a tokenizer file: {error}") from error
        self.digest = blake3(serialized).hexdigest()
        self._added = {t.content: i for i, t in full.get_added_tokens_decoder().items()}
        self._bytes = _token_bytes(full, self._added, source)
        self.vocab_size = len(self._bytes)
        self.bos_id, self.eos_id = 0, 1
        found = self._added.get(BOS), self._added.get(EOS)
        if found != (self.bos_id, self.eos_id):
            raise CheckpointError(
                f"{source} gives {BOS} and {EOS} the ids {found[0]} and {found[1]}, "
                "a V4 model expects 0 and 1"
            )
        # One object for each number: a text of a million tokens would make a million of them.
        self._numbers = list(range(self.vocab_size))
        self._control = {self._added[token] for token in (BOS, EOS, PAD) if token in self._added}
        # The same model without its added tokens (shared, not copied): it reads any text as plain.
        self._plain = HfTokenizer(full.model)
        if full.normalizer is not None:
            self._plain.normalizer = full.normalizer
        self._plain.pre_tokenizer = full.pre_tokenizer
        # Longest first: at one place the longest added token wins, as in the vendor's reading.
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(re.escape(token) for token in longest_first) + ")")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a tokenizer.json. Raises CheckpointError."""
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}",
                "a checkpoint folder in the official layout carries a tokenizer.json",
            ) from error

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read the tokenizer.json of a checkpoint folder. Raises CheckpointError."""
        return cls.from_file(Path(path) / "tokenizer.json")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text.

        special=False  every character is plain text, also where it spells a special token: for
                       everything that a user wrote
        special=True   spellings of added tokens become those tokens, as in the vendor's files: for
                       text that we or a trusted file wrote
        Raises RequestError for text that is not valid Unicode (lone surrogates).
        """
        if not special:
            return self._encode_parts([(text, False)])
        # re.split with one group alternates plain text and matches.
        pieces = self._split.split(text)
        return self._encode_parts([(piece, i % 2 == 1) for i, piece in enumerate(pieces)])

    def encode_start(self, text: str, tokens: int) -> list[int]:
        """The first `tokens` ids of a plain text, as encode() has them; the rest is not encoded."""
        return self._encode_parts([(text, False)], tokens)[:tokens]

    def encode_prompt(self, prompt: MarkedText) -> list[int]:
        """Token ids of a prompt: its special ranges are tokens, all other text is plain.

        Raises DialectError when the prompt needs a special token that this tokenizer lacks.
        """
        parts: list[tuple[str, bool]] = []
        at = 0
        for start, end in prompt.special:
            parts += [(prompt.text[at:start], False), (prompt.text[start:end], True)]
            at = end
        parts.append((prompt.text[at:], False))
        return self._encode_parts(parts)

    def _encode_parts(
        self, parts: Sequence[tuple[str, bool]], least: int = sys.maxsize
    ) -> list[int]:
        """Encode (text, is_special) in order; of a longer part, `least` ids and some more."""
        ids: list[int] = []
        try:
            for text, is_special in parts:
                ids += [self.id_of(text)] if is_special else self._encode_plain(text, least)
        except (TypeError, UnicodeError) as error:
            raise RequestError(
                "the text is not valid Unicode: it holds a lone surrogate",
                "decode files as UTF-8 with errors='replace'",
            ) from error
        return ids

    def _encode_plain(self, text: str, least: int) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(text) and len(ids) < least:
            pieces: list[str] = []
            while start < len(text) and len(pieces) < BATCH:
                end = self._cut(text, start)
                pieces.append(text[start:end])
                start = end
            batch = self._plain.encode_batch_fast(pieces, add_special_tokens=False)
            ids += [self._numbers[i] for encoded in batch for i in encoded.ids]
        return ids

    def _cut(self, text: str, start: int) -> int:
        """Where a piece that begins at `start` may end, so that its tokens are those of the whole.

        The library holds some 450 bytes for each token of a piece until it is done with it. A cut
        is at the end of a word, and only where the library splits before it looks for tokens. It
        looks twice as far ahead after each attempt: a text that has no such place costs little.
        """
        end, ahead = start + PIECE, NEAR
        while found := _WORD_END.search(text, end):
            end = found.end()
            left, right = text[end - NEAR : end], text[end : end + NEAR]
            if self._split_up(left) + self._split_up(right) == self._split_up(left + right):
                break
            end, ahead = end + ahead, 2 * ahead
        else:
            end = len(text)
        if end - start > LONGEST:
            raise RequestError(
                f"the text has {end - start:,} characters in which no word ends, "
                f"{LONGEST:,} are the most",
                "is it binary or encoded data? break it into lines, or leave it out",
            )
        return end

    def _split_up(self, text: str) -> list[str]:
        """What the library looks for tokens in, one after the other."""
        if self._plain.normalizer is not None:
            text = self._plain.normalizer.normalize_str(text)
        if self._plain.pre_tokenizer is None:
            return [text]
        return [word for word, _ in self._plain.pre_tokenizer.pre_tokenize_str(text)]

    def id_of(self, token: str) -> int:
        """Id of an added token by its exact spelling. Raises DialectError if there is none."""
        if token not in self._added:
            raise DialectError(f"the tokenizer has no special token {token!r}")
        return self._added[token]

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token: possibly a part of a character. Raises RequestError."""
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"token id {token_id} is outside the vocabulary 0..{self.vocab_size - 1}"
            )
        return self._bytes[token_id]

    def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        control  show BOS, EOS and padding too; without it they are silent
        Raises RequestError for an id outside the vocabulary.
        """
        shown = (self.token_bytes(i) for i in ids if control or i not in self._control)
        return b"".join(shown).decode("utf-8", "replace")

    def decoder(self, *, control: bool = False) -> "Decoder":
        """A fresh incremental decoder for one stream of tokens."""
        return Decoder(self, control=control)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all added tokens."""
        return frozenset(self._added.values())

    def is_control(self, token_id: int) -> bool:
        """Whether the token frames a sequence (BOS, EOS, padding) and is no text."""
        return token_id in self._control


class Decoder:
    """Text of a token stream, character by character: never half a character.

    The joined pushes and the flush equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, control: bool = False) -> None:
        self._tokenizer = tokenizer
        self._show_control = control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that this token completes: "" while a character is unfinished."""
        if not self._show_control and self._tokenizer.is_control(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    @property
    def pending(self) -> bytes:
        """The bytes of a character that is not complete yet."""
        return self._utf8.getstate()[0]

    def flush(self) -> str:
        """End of the stream: U+FFFD if it ended within a character, else ""."""
        return self._utf8.decode(b"", final=True)


def _token_bytes(full: HfTokenizer, added: dict[str, int], source: str) -> list[bytes]:
    """Bytes of every token, by id. Raises CheckpointError unless the tokenizer is byte-level."""
    if type(full.decoder).__name__ != "ByteLevel":
        raise CheckpointError(
            f"{source} has the decoder {type(full.decoder).__name__}, a V4 model uses ByteLevel"
        )
    alphabet = _latin1_of_character()
    vocabulary = full.get_vocab(with_added_tokens=True)
    table = [b""] * (1 + max(vocabulary.values()))
    for token, token_id in vocabulary.items():
        try:
            # Added tokens are spelled out in the file, not in the alphabet of bytes.
            plain = "" if token in added else token.translate(alphabet)
            table[token_id] = plain.encode("latin-1") or token.encode()
        except UnicodeEncodeError:  # spells itself, as in the library's decoder
            table[token_id] = token.encode()
    return table


def _latin1_of_character() -> dict[int, int]:
    """Translation of the byte-level alphabet to Latin-1; what is not in it goes out of range.

    The alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    outside = dict.fromkeys(others, 0xFFFF)
    return outside | {0x100 + i: byte for i, byte in enumerate(others)}
