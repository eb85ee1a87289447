"""How many planted facts a model still finds, read and asked as the product does it.

    python -m overleap.train.recall FOLDER 4096,16384 1,2,3

Straight on model and cache, without engine or chat: `overleap demo` goes through those. Read next:
eval/needle.py.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache, Sequence
from overleap.chat.tokenizer import ASSISTANT, BOS, END_THINK, EOS, USER
from overleap.checkpoint import load
from overleap.eval.needle import Planted, plant, stdlib_text
from overleap.model.transformer import Batch, Transformer

CHUNK = 2048


def document(tokenizer: Tokenizer, tokens: int, facts: int, seed: int) -> Planted:
    """Shuffled standard library text of about `tokens` tokens with `facts` facts."""
    text = stdlib_text(seed)
    start = random.Random(seed).randrange(max(1, len(text) - 5 * tokens))
    ids = tokenizer.encode(text[start : start + 5 * tokens]).ids
    room = tokens - 9 * facts - 24
    return plant(tokenizer.decode(ids[:room], skip_special_tokens=False), facts, seed)


def recall(
    model: Transformer,
    tokenizer: Tokenizer,
    tokens: int,
    *,
    facts: int = 8,
    seed: int = 0,
    cache_format: CacheFormat = CacheFormat.RELEASE,
    answer_tokens: int = 4,
) -> tuple[int, list[tuple[str, str, str]], float]:
    """Right answers; (question, value, reply) of each; seconds spent reading."""
    planted = document(tokenizer, tokens, facts, seed)
    head = tokenizer.encode(f"{BOS}{USER}{planted.text.rstrip()}\n\n").ids
    pages = -(-(len(head) + 64) // 128)
    cache = Cache(model.config, pages=pages + 2, slots=2, format=cache_format)
    sequence = cache.open()
    began = time.monotonic()
    with torch.inference_mode():
        for low in range(0, len(head), CHUNK):
            _step(model, cache, sequence, head[low : low + CHUNK])
        seconds = time.monotonic() - began
        rows, right = [], 0
        for fact in planted.facts:
            twin = cache.fork(sequence)
            ask = tokenizer.encode(f"{fact.question}{ASSISTANT}{END_THINK}").ids
            reply: list[int] = []
            while len(reply) < answer_tokens:
                token = _step(model, cache, twin, ask)
                if token == tokenizer.token_to_id(EOS):
                    break
                reply.append(token)
                ask = [token]
            cache.close(twin)
            text = tokenizer.decode(reply)
            right += fact.is_answered_by(text)
            rows.append((fact.question, fact.value, text))
    return right, rows, seconds


def _step(model: Transformer, cache: Cache, sequence: Sequence, ids: list[int]) -> int:
    cache.reserve(sequence, sequence.length + len(ids))
    logits = model(Batch.of([(sequence, ids)], cache), cache).logits
    return int(logits[-1].argmax())


def main(folder: Path, lengths: list[int], seeds: list[int]) -> None:
    """Recall of a model folder, a JSON line a document."""
    model = load(folder)
    text = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for length in lengths:
        for seed in seeds:
            right, rows, seconds = recall(model, text, length, seed=seed)
            record = {"tokens": length, "seed": seed, "right": right, "of": len(rows)}
            wrong = [row for row in rows if row[1] != row[2].strip()]
            print(json.dumps(record | {"seconds": round(seconds, 1), "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        [int(n) for n in sys.argv[2].split(",")],
        [int(n) for n in sys.argv[3].split(",")],
    )
