"""The tokenizer against the library that owns the format, over both vocabularies."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Encoding
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import WordLevel

from overleap.chat.dialects import Prompt
from overleap.chat.replies import ReplyFormat
from overleap.chat.tokenizer import (
    ASSISTANT,
    BATCH,
    BOS,
    DSML,
    END_THINK,
    EOS,
    NEAR,
    PAD,
    PIECE,
    SPECIAL_TOKENS,
    TASKS,
    THINK,
    USER,
    Tokenizer,
)
from overleap.errors import CheckpointError, DialectError, RequestError

BOTH = ["released", "small"]
# Any text, with characters of every UTF-8 length and spellings of special tokens mixed in.
texts = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [*SPECIAL_TOKENS, "é", "文字", "👩‍👩‍👧‍👦", "\u2028", "\x00", " \r\n\t", "｜", "▁"]
        ),
    ),
    max_size=12,
).map("".join)


def pushed(tokenizer: Tokenizer, ids: list[int], control: bool = False) -> list[str]:
    decoder = tokenizer.decoder(control=control)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def random_text(rng: random.Random, length: int) -> str:
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(length))


@pytest.mark.parametrize("which", BOTH)
@given(text=texts)
def test_text_comes_back(tokenizers: dict[str, Tokenizer], which: str, text: str) -> None:
    tokenizer = tokenizers[which]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True), control=True) == text


@pytest.mark.parametrize("which", BOTH)
@given(text=texts)
def test_streamed_text_is_the_text(tokenizers: dict[str, Tokenizer], which: str, text: str) -> None:
    tokenizer = tokenizers[which]
    pieces = pushed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_streaming_any_ids_equals_decoding_them(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for length in (0, 1, 2, 63, 127, 1000):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
        for control in (False, True):
            assert "".join(pushed(tokenizer, ids, control)) == tokenizer.decode(
                ids, control=control
            )


@pytest.mark.parametrize("which", ["small", "released"])
def test_long_texts_are_encoded_in_pieces_that_do_not_show(
    tokenizers: dict[str, Tokenizer], which: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real text, runs of blanks and lines, odd characters; pieces of a few hundred characters."""
    rng, tokenizer = random.Random(seed), tokenizers[which]
    lines = Path(__file__).read_text("utf-8").splitlines(keepends=True)
    odd = ["\n", "\n\n", "  \n", "\t\n", "\r\n", "    ", "ab\n12345\n", "字\n字", "🙂\n!", "\n?\n"]
    runs = [rng.choice("a1 \n!_é字，\u0301'\u0e19") * rng.randint(1, 99) for _ in range(99)]
    for _ in range(20):
        kinds = rng.choice(((lines, odd), (lines, odd, runs), (runs,)))
        text = "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 300)))
        whole = tokenizer.encode(text)
        for piece in (65, rng.randint(66, 500)):
            monkeypatch.setattr("overleap.chat.tokenizer.PIECE", piece)
            assert tokenizer.encode(text) == whole
            start = rng.randint(0, len(whole) + 1)
            assert tokenizer.encode_start(text, start) == whole[:start]
        monkeypatch.undo()


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"name": f"n{i}", "at": [i, None]} for i in range(5000)], indent=2),
        json.dumps(
            [{"name": f"n{i}", "at": [i, None]} for i in range(5000)], separators=(",", ":")
        ),
        "    and so on\n" * 20_000,
        "word " * 50_000,
        "字，" * 100_000,
    ],
    ids=["indented", "dense", "lines", "words", "chinese"],
)
@pytest.mark.parametrize("which", BOTH)
def test_a_long_text_is_never_encoded_as_a_whole(
    tokenizers: dict[str, Tokenizer],
    references: dict[str, HfTokenizer],
    which: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces: list[str] = []
    tokenizer, library = tokenizers[which], tokenizers[which]._plain

    class Spy:
        normalizer, pre_tokenizer = library.normalizer, library.pre_tokenizer

        def encode_batch_fast(self, texts: list[str], **more: bool) -> list[Encoding]:
            pieces.extend(texts)
            return library.encode_batch_fast(texts, **more)

    monkeypatch.setattr(tokenizer, "_plain", Spy())
    assert tokenizer.encode(text) == references[which].encode(text, add_special_tokens=False).ids
    assert "".join(pieces) == text and max(map(len, pieces)) <= PIECE + NEAR
    pieces.clear()
    tokenizer.encode_start(text, 99)
    assert 0 < sum(map(len, pieces)) <= BATCH * (PIECE + NEAR)


def test_a_cut_character_waits_and_ends_in_one_replacement(tokenizer: Tokenizer) -> None:
    # A character of the supplementary private area: no vocabulary holds it whole.
    ids = tokenizer.encode("a\U0010fffd")
    decoder = tokenizer.decoder()
    assert "".join(decoder.push(i) for i in ids[:-1]) == "a"
    assert decoder.pending and "\U0010fffd".encode().startswith(decoder.pending)
    assert decoder.flush() == "\ufffd" == tokenizer.decode(ids[:-1])[1:]
    assert decoder.pending == b""
    assert "".join(decoder.push(i) for i in ids) == "a\U0010fffd"


@pytest.mark.parametrize("which", BOTH)
def test_ids_equal_the_library(
    tokenizers: dict[str, Tokenizer], references: dict[str, HfTokenizer], which: str, seed: int
) -> None:
    tokenizer, reference, rng = tokenizers[which], references[which], random.Random(seed)
    for length in (0, 1, 5, 129, 1000):
        text = random_text(rng, length)
        expected = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == expected
        words = " ".join(rng.choice([*SPECIAL_TOKENS, "word", "<", "｜", "\n"]) for _ in range(30))
        expected = reference.encode(words, add_special_tokens=False).ids
        assert tokenizer.encode(words, special=True) == expected
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
        parts = [tokenizer.decode([i], control=True) for i in ids[:50]]
        assert parts == [reference.decode([i], skip_special_tokens=False) for i in ids[:50]]


def test_every_plain_token_has_the_bytes_of_the_library(
    tokenizers: dict[str, Tokenizer], references: dict[str, HfTokenizer]
) -> None:
    tokenizer, reference = tokenizers["released"], references["released"]
    every = list(range(tokenizer.vocab_size))
    assert tokenizer.vocab_size == 129280
    # Joined in the plain range, where the library's added-token handling cannot interfere.
    plain = every[3:128000]
    assert tokenizer.decode(plain) == reference.decode(plain, skip_special_tokens=False)


def test_the_longest_added_token_wins(small_json: bytes) -> None:
    raw = json.loads(small_json)
    for n, content in enumerate(["<aa>", "<aa>b", "a><"]):
        raw["added_tokens"].append(raw["added_tokens"][-1] | {"id": 700 + n, "content": content})
    tokenizer = Tokenizer(json.dumps(raw).encode())
    reference = HfTokenizer.from_str(json.dumps(raw))
    for text in ("x<aa>b<aa>", "<aa><aa>b", "za><aa>b", "<a<aa>a><"):
        expected = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == expected
        assert tokenizer.decode(expected) == text


def test_a_token_outside_the_byte_alphabet_spells_itself(small_json: bytes) -> None:
    raw = json.loads(small_json)
    raw["model"]["vocab"] |= {"文字": 700, "a b": 701, "\xa0": 702}
    tokenizer, reference = (
        Tokenizer(json.dumps(raw).encode()),
        HfTokenizer.from_str(json.dumps(raw)),
    )
    for token_id in (700, 701, 702):
        assert tokenizer.decode([token_id]) == reference.decode([token_id])


def test_written_special_tokens_stay_text(tokenizer: Tokenizer) -> None:
    special = {tokenizer.id_of(token) for token in SPECIAL_TOKENS}
    for token in SPECIAL_TOKENS:
        text = f"say {token} twice: {token}{token}"
        assert not special & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(token, special=True) == [tokenizer.id_of(token)]


def test_a_prompt_has_special_tokens_only_where_marked(tokenizer: Tokenizer) -> None:
    text = f"{BOS}{USER}I write {USER} and {EOS}{ASSISTANT}"
    marked = [(0, len(BOS)), (len(BOS), len(BOS + USER)), (len(text) - len(ASSISTANT), len(text))]
    ids = tokenizer.encode_prompt(Prompt(text, tuple(marked), ReplyFormat()))
    special = [i for i in ids if i in {tokenizer.id_of(t) for t in SPECIAL_TOKENS}]
    assert special == [tokenizer.id_of(BOS), tokenizer.id_of(USER), tokenizer.id_of(ASSISTANT)]
    assert tokenizer.decode(ids, control=True) == text
    assert ids[2:-1] == tokenizer.encode(f"I write {USER} and {EOS}")


def test_fixed_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.id_of(BOS), tokenizer.id_of(EOS), tokenizer.id_of(PAD)) == (0, 1, 2)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert len(set(map(tokenizer.id_of, SPECIAL_TOKENS))) == len(SPECIAL_TOKENS)


def test_released_ids(tokenizers: dict[str, Tokenizer]) -> None:
    known = {USER: 128803, ASSISTANT: 128804, THINK: 128821, END_THINK: 128822, DSML: 128825}
    known |= {TASKS["action"]: 128829, TASKS["title"]: 128836, TASKS["read_url"]: 128845}
    assert {token: tokenizers["released"].id_of(token) for token in known} == known


def test_control_tokens_are_silent_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("a"), tokenizer.id_of(END_THINK), *tokenizer.encode("b"), 1, 2]
    assert tokenizer.decode(ids) == f"a{END_THINK}b" == "".join(pushed(tokenizer, ids))
    assert tokenizer.decode(ids, control=True) == f"{BOS}a{END_THINK}b{EOS}{PAD}"
    assert [i for i in range(tokenizer.vocab_size) if tokenizer.is_control(i)] == [0, 1, 2]


def test_bytes_of_one_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("naïve 文字 👍")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "naïve 文字 👍".encode()


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(RequestError, match=f"token id {wrong} is outside the vocabulary"):
        tokenizer.decode([5, wrong])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        tokenizer.decoder().push(wrong)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    for special in (False, True):
        with pytest.raises(RequestError, match="lone surrogate"):
            tokenizer.encode("a\ud800b", special=special)


def test_a_text_without_words_is_refused_before_it_takes_memory(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overleap.chat.tokenizer.LONGEST", 2**17)
    for text in ("文" * 2**17, "a" * (2**17 - 1) + "\n", "one two\n" * 2**15):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in ("文" * (2**17 + 1), "b. " + "a" * 2**18 + "\n"):
        with pytest.raises(RequestError, match="characters in which no word ends, 131,072 are"):
            tokenizer.encode(text)


def test_digest_follows_the_file(tmp_path: Path, small_json: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(small_json)
    first = Tokenizer.from_folder(tmp_path)
    assert first.digest == Tokenizer.from_file(tmp_path / "tokenizer.json").digest
    (tmp_path / "tokenizer.json").write_bytes(small_json + b"\n")
    assert Tokenizer.from_folder(tmp_path).digest != first.digest


def test_files_that_cannot_serve(tmp_path: Path, small_json: bytes) -> None:
    with pytest.raises(CheckpointError, match="cannot read") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.hint is not None
    with pytest.raises(CheckpointError, match="is not a tokenizer file"):
        Tokenizer(small_json[:-50])
    words = HfTokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(CheckpointError, match="ByteLevel"):
        Tokenizer(words.to_str().encode())


@pytest.mark.parametrize("edit", ["swapped", "absent"])
def test_bos_and_eos_have_their_ids(small_json: bytes, edit: str) -> None:
    raw = json.loads(small_json)
    if edit == "swapped":
        raw["added_tokens"][0]["content"], raw["added_tokens"][1]["content"] = EOS, BOS
        raw["model"]["vocab"][BOS], raw["model"]["vocab"][EOS] = 1, 0
    else:
        raw["added_tokens"] = raw["added_tokens"][2:]
    with pytest.raises(CheckpointError, match="expects 0 and 1"):
        Tokenizer(json.dumps(raw).encode())


def test_a_token_the_vocabulary_lacks(small_json: bytes) -> None:
    raw = json.loads(small_json)
    raw["added_tokens"] = raw["added_tokens"][:4]
    tokenizer = Tokenizer(json.dumps(raw).encode())
    with pytest.raises(DialectError, match="no special token '<think>'"):
        tokenizer.encode_prompt(Prompt(THINK, ((0, len(THINK)),), ReplyFormat()))
