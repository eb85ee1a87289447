"""Text, tokens, rows: words stay whole, rows point at the right places, series repeat."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from overleap.chat.profiles import profile_named
from overleap.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from overleap.errors import TrainingError
from overleap.eval.needle import stdlib_sources
from overleap.train.conversations import spoken
from overleap.train.data import Chat, Row, Rows, Source, Tasks, Text, fact_words
from overleap.train.kept import sample
from overleap.train.shards import EOS_ID, PAD_ID, Shard, build, train_tokenizer
from overleap.train.text import documents, text_of_html

SIZE = 4096


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tokenizer(list(stdlib_sources().values())[:60], path, SIZE, fact_words())


@pytest.fixture(scope="module")
def shard(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    sources = list(stdlib_sources().items())[:40]
    return build(sources, tokenizer, tmp_path_factory.mktemp("tokens"))[0]


def rows_of(tokenizer: Tokenizer, shard: Shard | None, seed: int) -> Rows:
    return Rows(tokenizer, shard, seed, profile_named("v4-flash"))


def test_special_tokens_come_first_and_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == SIZE
    assert [tokenizer.id_of(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    for word in fact_words():
        assert len(tokenizer.encode(word)) == 1, word


def test_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = "def f():\n    return 'naïve ünïcode 汉字 🙂'\t\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="300 were asked for"):
        train_tokenizer(["some text"], tmp_path / "tokenizer.json", 300, fact_words())


def test_documents_fill_whole_pages_and_come_back(
    tokenizer: Tokenizer, seed: int, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    texts = [("name", "<think>" + "word " * draw.randrange(20, 900)) for _ in range(120)]
    train, held_out = build(texts, tokenizer, tmp_path)
    assert held_out.facts["documents"] == 2 and train.facts["documents"] == 118
    again = Shard.open(tmp_path / "train")
    ends = [*again.begins[1:].tolist(), len(again.tokens)]
    kept = [text for number, (_, text) in enumerate(texts) if number % 50 != 49]
    for begin, end, text in zip(again.begins.tolist(), ends, kept, strict=True):
        ids = again.tokens[begin:end].tolist()
        assert begin % 128 == 0 and ids[0] == 0 and EOS_ID in ids[-128:]
        assert tokenizer.decode(ids) == text
        assert tokenizer.id_of("<think>") not in ids
    at = 128 * draw.randrange(len(again.tokens) // 128 - 8)
    ids, counts = again.window(at, 1024)
    assert sum(counts) == len(ids) == 1024
    assert [at + sum(counts[:i]) for i in range(1, len(counts))] == [
        begin for begin in again.begins.tolist() if at < begin < at + 1024
    ]


def test_a_cut_shard_is_refused(shard: Shard, tmp_path: Path) -> None:
    for name in ("shard.json", "begins.bin"):
        (tmp_path / name).write_bytes((shard.folder / name).read_bytes())
    (tmp_path / "tokens.bin").write_bytes((shard.folder / "tokens.bin").read_bytes()[:-2])
    with pytest.raises(TrainingError, match="were written"):
        Shard.open(tmp_path)
    with pytest.raises(TrainingError, match="no token folder"):
        Shard.open(tmp_path / "nowhere")


def test_documents_of_all_kinds(tmp_path: Path) -> None:
    long = "a line of text that is long enough to be a document of its own, no doubt\n"
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.rst.gz").write_bytes(gzip.compress(long.encode()))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": long}) for _ in range(3)))
    (tmp_path / "d.html").write_text(f"<head><title>no</title></head><p>{long}</p><pre>  x</pre>")
    (tmp_path / "e.bin").write_bytes(b"\xff" * 900)
    (tmp_path / "f.txt").write_bytes(b"\xff" * 900)
    found = list(documents([tmp_path]))
    assert len(found) == 6 and all(long.strip() in text for _, text in found)
    assert text_of_html("<p>a  b</p><script>no</script><pre> c\n  d</pre>") == "a b\n\n c\n  d\n"
    (tmp_path / "bad.jsonl").write_text('{"text": 1}')
    with pytest.raises(TrainingError, match="line 1 has no string `text`"):
        list(documents([tmp_path / "bad.jsonl"]))
    with pytest.raises(TrainingError, match="does not exist"):
        list(documents([tmp_path / "none"]))


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i} " * 9 for i in range(7)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert [text for _, text in documents([tmp_path])] == texts


@pytest.mark.parametrize("kind", ["fact", "values", "chain"])
def test_answers_point_at_what_is_planted(
    tokenizer: Tokenizer, shard: Shard, seed: int, kind: str
) -> None:
    rows = rows_of(tokenizer, shard, seed)
    row = rows.row((Tasks(1.0, kind, 12, 9, size=3),), 0, 5, 2048)
    assert len(row.ids) == 2048 == sum(row.counts)
    assert len(row.answers) == len(row.gold) == 9 * (3 if kind == "values" else 1)
    for answer, gold in zip(row.answers, row.gold, strict=True):
        assert 0 <= gold < answer and not row.learn[answer]
        assert row.ids[answer + 1] == row.ids[gold]
        before = tokenizer.decode(row.ids[max(gold - 8, 0) : gold])
        assert before.endswith(" is")
    asked = tokenizer.decode(row.ids[row.answers[0] - 12 : row.answers[0] + 1])
    name = asked.split("What")[-1].split(" of ")[1].split("?")[0]
    assert f" of {name} is " in tokenizer.decode(row.ids[: row.answers[0] - 12])


def test_a_row_follows_from_its_number_alone(tokenizer: Tokenizer, shard: Shard, seed: int) -> None:
    mixture: tuple[Source, ...] = (Tasks(0.3, "fact", 8, 8), Text(0.7))
    numbers = list(range(40))
    first = rows_of(tokenizer, shard, seed)
    series = {n: first.row(mixture, 1, n, 512) for n in numbers}
    random.Random(seed).shuffle(numbers)
    other = rows_of(tokenizer, shard, seed)
    assert {n: other.row(mixture, 1, n, 512) for n in numbers} == series
    asked = sum(bool(row.answers) for row in series.values())
    assert asked == 12
    assert rows_of(tokenizer, shard, seed + 1).row(mixture, 1, 0, 512) != series[0]


def test_an_epoch_of_text_reads_every_window_once(
    tokenizer: Tokenizer, shard: Shard, seed: int
) -> None:
    windows = len(shard.tokens) // 512
    rows = [Text().row(shard, n, 512, f"{seed}") for n in range(2 * windows)]
    seen = [tuple(row.ids) for row in rows]
    everything = {tuple(shard.tokens[i * 512 : i * 512 + 512].tolist()) for i in range(windows)}
    assert set(seen[:windows]) == set(seen[windows:]) == everything
    assert seen[:windows] != seen[windows:]
    for row in rows[:20]:
        ends = {sum(row.counts[: i + 1]) for i in range(len(row.counts))}
        for i, learn in enumerate(row.learn):
            assert learn == (i + 1 not in ends and row.ids[i + 1] != PAD_ID)


def test_conversations_teach_what_the_assistant_says(
    tokenizer: Tokenizer, seed: int, tmp_path: Path
) -> None:
    talks = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": f"Answer {i}."},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": f"More of {i}."},
            ]
        }
        for i in range(30)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(talk) for talk in talks))
    row = rows_of(tokenizer, None, seed).row((Chat(str(path)),), 0, 0, 1024)
    assert len(row.ids) == 1024 == sum(row.counts) and len(row.counts) > 1
    said = [row.ids[i + 1] for i in range(1023) if row.learn[i]]
    text = tokenizer.decode(said, control=True)
    assert "Answer" in text and "More of" in text and text.count("<｜end▁of▁sentence｜>") >= 2
    assert "Question" not in text and "brief" not in text and "think" not in text
    long = {"messages": [{"role": "user", "content": "Go on."},
                         {"role": "assistant", "content": "a\u2028b\x85 " * 900}]}  # fmt: skip
    (tmp_path / "long.jsonl").write_text(json.dumps(long, ensure_ascii=False), "utf-8")
    cut = rows_of(tokenizer, None, seed).row((Chat(str(tmp_path / "long.jsonl")),), 0, 0, 256)
    assert cut.learn[254] and not cut.learn[255], "what follows the cut is not known"
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "no"}')
    with pytest.raises(TrainingError, match="has no list `messages`"):
        rows_of(tokenizer, None, seed).row((Chat(str(other)),), 0, 0, 1024)


def talk_of(name: str, asked: int, said: int) -> str:
    """A line of JSONL: a question and an answer of about so many tokens."""
    messages = [
        {"role": "user", "content": f"{name}: " + "word " * asked},
        {"role": "assistant", "content": "word " * said},
    ]
    return json.dumps({"messages": messages})


def test_an_epoch_of_conversations_has_each_once(
    tokenizer: Tokenizer, seed: int, tmp_path: Path
) -> None:
    """Short ones, such as fill a row, and longer ones; by the number of the row alone."""
    draw, path = random.Random(seed), tmp_path / "chat.jsonl"
    names = [f"talk-{number}" for number in range(60)]
    lines = [talk_of(name, draw.choice((5, 100)), draw.choice((5, 60, 400))) for name in names]
    path.write_text("\n".join(lines))

    def names_in(row: Row) -> list[str]:
        assert len(row.ids) == len(row.learn) == sum(row.counts) == 512
        return re.findall(r"(talk-\d+):", tokenizer.decode(row.ids))

    mixture, rows = (Chat(str(path)),), rows_of(tokenizer, None, seed)
    found: list[list[str]] = []
    while len({name for row in found for name in row}) < 60:
        found.append(names_in(rows.row(mixture, 0, len(found), 512)))
    epoch, fresh = len(found), rows_of(tokenizer, None, seed)
    again = [names_in(fresh.row(mixture, 0, n, 512)) for n in range(2 * epoch)]
    assert again[:epoch] == found != again[epoch:]
    for one in (found, again[epoch:]):
        assert sorted(name for row in one for name in row) == sorted(names)
    assert max(map(len, found)) > 1, "a row takes as many as fit"


def test_a_conversation_of_which_nothing_is_learned_is_refused(
    tokenizer: Tokenizer, seed: int, tmp_path: Path
) -> None:
    path, rows = tmp_path / "chat.jsonl", rows_of(tokenizer, None, seed)
    lines = [talk_of("a", 5, 5), "", talk_of("b", 5, 900), talk_of("c", 300, 5)]
    path.write_text("\n".join(lines))
    ids, learn = spoken(json.loads(lines[3]), tokenizer, rows.profile)
    before = learn.index(True) + 1
    assert 512 < before < len(ids)
    sentence = f"line 4 has {before} tokens before the assistant speaks, a row takes 512"
    with pytest.raises(TrainingError, match=sentence) as caught:
        rows.row((Chat(str(path)),), 0, 0, 512)
    assert caught.value.hint == "longer rows; 2 of 3 conversations are cut"
    row = rows.row((Chat(str(path)),), 0, 0, 1024)
    assert len(row.ids) == 1024
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}))
    with pytest.raises(TrainingError, match="line 1: a conversation cannot be written"):
        rows.row((Chat(str(silent)),), 0, 0, 512)


def test_rows_that_cannot_be_made_are_refused(
    tokenizer: Tokenizer, shard: Shard, seed: int
) -> None:
    rows = rows_of(tokenizer, shard, seed)
    with pytest.raises(TrainingError, match="need more than 128 tokens"):
        rows.row((Tasks(1.0, "fact", 12, 12),), 0, 0, 128)
    with pytest.raises(TrainingError, match="a row takes"):
        rows.row((Text(),), 0, 0, 1 << 24)
    with pytest.raises(TrainingError, match="has no token folder"):
        rows_of(tokenizer, None, seed).row((Text(),), 0, 0, 128)


def test_a_tokenizer_sees_pieces_of_all_texts_and_no_more_than_asked(seed: int) -> None:
    """The same ones every time, and a corpus larger than memory is never held."""
    texts = [chr(0x4E00 + number) * 1000 for number in range(3000)]
    found = list(sample(iter(texts), 100_000, 250))
    assert 99_000 <= sum(map(len, found)) <= 100_250
    assert found == list(sample(iter(texts), 100_000, 250))
    assert len({piece[0] for piece in found}) > 300 and max(map(len, found)) == 250
    assert sorted(sample(iter(["ab"] * 3), 100)) == ["ab"] * 3


def test_lines_end_where_json_ends_them(tmp_path: Path) -> None:
    text = "one\u2028two\x85three " * 40
    lines = [json.dumps({"text": text}, ensure_ascii=False)] * 2
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), "utf-8")
    assert [found for _, found in documents([tmp_path / "a.jsonl"])] == [text] * 2
