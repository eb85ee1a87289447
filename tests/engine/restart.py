"""True models asked about texts of chosen lengths, in this process or as a program of its own.

    python -m tests.engine.restart <seed> <cache format> <folder> <length> ...

prints, for each length, the answer of an engine over the store in `folder`, as JSON. Used by
test_disk_true_model.py. Arithmetic is steady (oracles/steady.py), as in test_state.py.
"""

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from overleap.cache.disk import DiskTier
from overleap.cache.layout import CacheFormat
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.model.transformer import Transformer
from tests.checkpoints import random_tensors, tiny_config
from tests.oracles.steady import Steady

ANSWER = 4


@dataclass(frozen=True)
class Said:
    """An answer: its tokens, the log-probability of every token at each place, what was cached."""

    ids: list[int]
    logprobs: list[list[float]]
    cached: int

    def far_from(self, other: "Said") -> float:
        """The largest difference of a log-probability, relative to the largest of them."""
        one, two = torch.tensor(self.logprobs), torch.tensor(other.logprobs)
        return float((one - two).abs().max() / two.abs().max())


def make_model(seed: int) -> Transformer:
    """All layer kinds, random weights, room for 8192 tokens."""
    config = tiny_config(seed, max_position_embeddings=8192, vocab_size=150)
    model = Transformer(config)
    model.assign(random_tensors(config, seed))
    return model


def make_engine(
    model: Transformer, cache_format: CacheFormat, disk: DiskTier | None, share: bool = True
) -> Engine:
    """An engine over the store; without `share` it keeps and finds nothing."""
    return Engine(
        model, pages=100, slots=2, format=cache_format, chunk_tokens=300, speculate="off",
        snapshot_bytes=2**28 if share else 0, model_digest="11" * 32, disk=disk,
    )  # fmt: skip


def prompt_of(seed: int, length: int) -> list[int]:
    """A text of its own for every length."""
    number = random.Random(f"{seed} {length}")
    return [number.randrange(2, 150) for _ in range(length)]


def ask(engine: Engine, prompt: list[int]) -> Said:
    """Greedy, with all log-probabilities."""
    sampling = Sampling(temperature=0, max_tokens=ANSWER, stop_ids=(), logprobs=150)
    done = engine.generate(Request(prompt=prompt, sampling=sampling))
    rows = [[value for _, value in sorted(token.top_logprobs)] for token in done.tokens]
    return Said(done.ids, rows, done.finish.usage.cached_tokens)


def main() -> None:
    seed, cache_format = int(sys.argv[1]), CacheFormat(sys.argv[2])
    with DiskTier(Path(sys.argv[3]), space_bytes=10**10) as disk, Steady():
        engine = make_engine(make_model(seed), cache_format, disk)
        answers = [ask(engine, prompt_of(seed, int(length))) for length in sys.argv[4:]]
        stats = disk.stats()
        assert stats.errors == stats.dropped == 0, stats
    print(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
