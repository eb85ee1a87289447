"""A tokenizer from texts, and texts as memory-mapped token files.

Documents lie one after another, each padded to whole pages of 128 tokens, so that any window that
begins at a page holds whole pages of every document in it. Read next: data.py (rows of them).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from overleap.chat.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, Tokenizer
from overleap.errors import TrainingError

PAGE = 128
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
HELD_OUT_EVERY = 50  # one document in fifty is never trained on


def train_tokenizer(texts: Iterable[str], path: Path, size: int, words: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer of `size` tokens and write tokenizer.json.

    The official special tokens come first. The last merges make each of `words` one token; a word
    is written with the space that stands before it.
    """
    words = list(words)
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    learned = [tuple(pair) for pair in raw["model"]["merges"]]
    fixed = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    # Fewer learned merges leave room for the words: bisect for the most that fit.
    low, high = 0, len(learned)
    while low < high:
        middle = (low + high + 1) // 2
        if fixed + len(_with_words(learned[:middle], words)) <= size:
            low = middle
        else:
            high = middle - 1
    merges = _with_words(learned[:low], words)
    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += ["".join(pair) for pair in merges]
    names += [f"<｜place▁holder▁no▁{i}｜>" for i in range(size - len(names))]
    if len(set(names)) != size:
        raise TrainingError(
            f"{len(set(names))} tokens are the least for these words, {size} were asked for",
            f"{fixed} are fixed, and {len(words)} words take a merge for every piece of theirs",
        )
    raw["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    raw["model"]["merges"] = [list(pair) for pair in merges]
    for token in raw["added_tokens"]:  # as released: only these three vanish from decoded text
        token["special"] = token["content"] in (BOS, EOS, PAD)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return Tokenizer.from_file(path)


def _with_words(merges: list[tuple[str, str]], words: list[str]) -> list[tuple[str, str]]:
    """The merges, then those that join the pieces of each word from left to right."""
    out = list(merges)
    ranks = {pair: i for i, pair in enumerate(out)}
    for word in words:
        pieces = list(word.replace(" ", "Ġ"))  # how byte-level BPE writes a space
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            pair = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                ranks[pair] = len(ranks)
                out.append(pair)
            at = pairs.index(pair)
            pieces[at : at + 2] = ["".join(pair)]
    return out


@dataclass(frozen=True)
class Shard:
    """Tokens of many documents on disk.

    folder  holds tokens.bin (little-endian u16 or u32), begins.bin (i64), shard.json
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """A folder that build() wrote. Raises TrainingError where it is not whole."""
        shard = cls(Path(folder))
        try:
            size = len(shard.tokens)
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"{folder} is no token folder: {error}") from None
        if size != shard.facts["tokens"] or len(shard.begins) != shard.facts["documents"]:
            raise TrainingError(f"{folder} has {size} tokens, {shard.facts['tokens']} were written")
        return shard

    @cached_property
    def facts(self) -> dict[str, Any]:
        """tokens, documents, characters, bytes (of UTF-8), dtype."""
        found: dict[str, Any] = json.loads((self.folder / "shard.json").read_text("utf-8"))
        return found

    @cached_property
    def tokens(self) -> "np.memmap[Any, Any]":
        """All token ids, mapped."""
        return np.memmap(self.folder / "tokens.bin", dtype=self.facts["dtype"], mode="r")

    @cached_property
    def begins(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Where each document begins, multiples of 128."""
        return np.fromfile(self.folder / "begins.bin", dtype=np.int64)

    def window(self, at: int, length: int) -> tuple[list[int], list[int]]:
        """Token ids from `at` on, and the lengths of the pieces of documents in them."""
        ids = self.tokens[at : at + length].tolist()
        low, high = np.searchsorted(self.begins, [at + 1, at + length])
        cuts = [at, *self.begins[low:high].tolist(), at + length]
        return ids, [int(b - a) for a, b in pairwise(cuts)]


def build(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, folder: Path
) -> tuple[Shard, Shard]:
    """Write `train` and `held_out` below `folder`; every fiftieth document is held out.

    Each document: BOS, its tokens, EOS, padding to a whole page. What a text spells is text: no
    special token comes out of it.
    """
    kind = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    train, held_out = (_Writer(folder / name, kind) for name in ("train", "held_out"))
    for number, (_, text) in enumerate(documents):
        writer = held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train
        writer.add([BOS_ID, *tokenizer.encode(text), EOS_ID], text)
    return train.close(), held_out.close()


class _Writer:
    def __init__(self, folder: Path, kind: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.kind = folder, kind
        self.file = (folder / "tokens.bin").open("wb")
        self.begins: list[int] = []
        self.tokens = self.characters = self.bytes = 0

    def add(self, ids: list[int], text: str) -> None:
        padded = ids + [PAD_ID] * (-len(ids) % PAGE)
        self.begins.append(self.tokens)
        self.tokens += len(padded)
        self.characters += len(text)
        self.bytes += len(text.encode())
        self.file.write(np.asarray(padded, dtype=self.kind).tobytes())

    def close(self) -> Shard:
        self.file.close()
        np.asarray(self.begins, dtype=np.int64).tofile(self.folder / "begins.bin")
        facts = {
            "tokens": self.tokens,
            "documents": len(self.begins),
            "characters": self.characters,
            "bytes": self.bytes,
            "dtype": self.kind,
        }
        (self.folder / "shard.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        return Shard(self.folder)
