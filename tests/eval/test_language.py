"""Bits per byte against a plain sum, and two forms of a model against each other."""

import gzip
import json
import math
import random

import pytest
import torch
from typer.testing import CliRunner

from overleap.cache.layout import CacheFormat
from overleap.cli import app
from overleap.errors import OverleapError, RequestError
from overleap.eval.grid import document
from overleap.eval.language import apart, bits_per_byte
from overleap.eval.needle import stdlib_text
from overleap.eval.reader import Reader
from overleap.eval.tasks import draw_tasks


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.open("mini")


def test_bits_are_those_of_the_text(reader: Reader, seed: int) -> None:
    text = stdlib_text(seed)[:20000]
    found = bits_per_byte(reader, text, 2500)
    ids = reader.tokenizer.encode(text)[:2500]
    raw = reader.tokenizer.decode(ids).encode()
    assert found.tokens == 2500 and abs(found.bytes - len(raw)) <= 3
    logits = torch.cat(list(reader.logits([0, *ids[:-1]])))
    nll = -logits.log_softmax(-1)[torch.arange(2500), torch.tensor(ids)].double()
    assert found.bits_per_byte == pytest.approx(float(nll.sum()) / math.log(2) / found.bytes)
    assert found.perplexity == pytest.approx(math.exp(nll.mean()))
    assert found.gzip == pytest.approx(8 * len(gzip.compress(raw, 9)) / len(raw), rel=1e-2)
    assert min(found.by_depth) <= found.bits_per_byte <= max(found.by_depth)
    with pytest.raises(RequestError, match="bands need more"):
        bits_per_byte(reader, "x", 4)


def test_positions_that_the_model_lacks(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    few = reader.model.config.with_(max_position_embeddings=256)
    monkeypatch.setattr(reader.model, "config", few)
    with pytest.raises(RequestError, match="takes 300 tokens, the model has 256 positions"):
        list(reader.logits([5] * 300))
    with pytest.raises(RequestError, match="takes 257 tokens, the model has 256"):
        reader.read([5] * 257)
    cache, sequence = reader.read([5] * 250)
    assert len(reader.ask(cache, sequence, [5], 6)) <= 6
    with pytest.raises(RequestError, match="takes 260 tokens"):
        reader.ask(cache, sequence, [5] * 10, 1)
    tasks = draw_tasks(8, random.Random(1))
    with pytest.raises(RequestError, match=r"8 tasks take \d+ tokens, the text has 96"):
        document(reader, 96, tasks, 1)


@pytest.mark.parametrize("tokens", [4, 5, 6, 9])
def test_few_tokens_have_as_many_bands(reader: Reader, tokens: int) -> None:
    found = bits_per_byte(reader, "import os, sys, json, time, re, math", tokens)
    assert found.tokens == tokens and len(found.by_depth) == 4


def test_a_form_is_nowhere_from_itself_and_near_its_own_release(reader: Reader, seed: int) -> None:
    ids = [0, *reader.tokenizer.encode(stdlib_text(seed)[:6000])[:900]]
    same = apart(reader, reader, ids)
    assert same.kl == same.loss == 0 and same.agree == 1 and same.tokens == 900
    wide = Reader(reader.model, reader.tokenizer, format=CacheFormat.WIDE)
    near = apart(wide, reader, ids)
    assert 0 < near.kl < 0.1 and near.agree > 0.8 and abs(near.loss) < 0.05
    with pytest.raises(RequestError, match="cannot be compared"):
        apart(reader, reader, [0])


def test_dense_reading_is_sparse_reading_where_all_entries_are_chosen(seed: int) -> None:
    sparse, dense = Reader.open("mini"), Reader.open("mini", dense=True)
    ids = [0, *sparse.tokenizer.encode(stdlib_text(seed)[:6000])[:700]]
    a, b = (torch.cat(list(r.logits(ids))) for r in (sparse, dense))
    assert torch.equal(a[:256], b[:256])  # 64 entries of four tokens: all of them
    assert not torch.equal(a[300:], b[300:])


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_perplexity_is_printed() -> None:
    arguments = "bits", "mini", "--tokens", "64"
    found = json.loads(said(*arguments, "--json"))["perplexity"]
    assert f"perplexity a token {found:.2f}" in said(*arguments)


def test_both_forms_are_read_on_the_device_asked_for() -> None:
    arguments = "forms", "mini", "mini", "--tokens", "16", "--device"
    assert json.loads(said(*arguments, "cpu", "--json"))["tokens"] == 16
    with pytest.raises(OverleapError, match="nosuch"):
        said(*arguments, "nosuch")
