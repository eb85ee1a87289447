"""A model that reads token ids and answers: straight on model and cache, without engine or chat.

For measuring models, where a prompt is read once and asked many times. `overleap demo` goes
through engine and chat. Read next: grid.py, language.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache, Sequence
from overleap.chat.tokenizer import Tokenizer
from overleap.checkpoint import load, locate
from overleap.errors import RequestError
from overleap.model.indexer import Indexer
from overleap.model.transformer import Batch, Transformer

CHUNK = 2048
PAGE = 128
Progress = Callable[[int, int], None]


class Reader:
    """A model, its tokenizer, and how its cache is kept.

    format  of the cache: `release` rounds as it is served, `wide` does not
    dense   attend every entry, not the chosen ones only
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        format: CacheFormat = CacheFormat.RELEASE,
        dense: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.format = model, tokenizer, format
        for module in model.modules():
            if isinstance(module, Indexer) and dense:
                module.topk = 1 << 30

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        format: CacheFormat = CacheFormat.RELEASE,
        dense: bool = False,
        device: str = "cpu",
    ) -> Self:
        """A model folder, hub id or `mini`, on a device as devices.find() takes it."""
        folder = locate(str(name))
        model = load(folder, device=device)
        return cls(model, Tokenizer.from_folder(folder), format=format, dense=dense)

    def read(
        self, ids: list[int], room: int = 64, progress: Progress | None = None
    ) -> tuple[Cache, Sequence]:
        """Read a text, leaving room for so many more tokens a question."""
        self._check(len(ids))
        pages = -(-(len(ids) + room) // PAGE) + -(-room // PAGE) + 2
        cache = self._cache(pages, slots=2)
        sequence = cache.open()
        for low in range(0, len(ids), CHUNK):
            self._step(cache, sequence, ids[low : low + CHUNK])
            if progress is not None:
                progress(min(low + CHUNK, len(ids)), len(ids))
        return cache, sequence

    def ask(self, cache: Cache, sequence: Sequence, ids: list[int], most: int) -> list[int]:
        """The greedy reply to `ids` after what was read, without EOS; what was read stays."""
        twin = cache.fork(sequence)
        reply: list[int] = []
        while len(reply) < most:
            token = int(self._step(cache, twin, ids)[-1].argmax())
            if token == self.tokenizer.eos_id:
                break
            reply.append(token)
            ids = [token]
        cache.close(twin)
        return reply

    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """Logits f32 [chunk, V] of every position, chunk after chunk."""
        self._check(len(ids))
        cache = self._cache(-(-len(ids) // PAGE) + 1, slots=1)
        sequence = cache.open()
        for low in range(0, len(ids), CHUNK):
            yield self._step(cache, sequence, ids[low : low + CHUNK], whole=True).cpu()

    def _check(self, tokens: int) -> None:
        """Raise RequestError for more tokens than the model has positions."""
        most = self.model.config.max_position_embeddings
        if tokens > most:
            raise RequestError(
                f"the text takes {tokens:,} tokens, the model has {most:,} positions",
                "fewer --tokens",
            )

    def _cache(self, pages: int, slots: int) -> Cache:
        model = self.model
        return Cache(
            model.config, pages=pages, slots=slots, format=self.format, device=model.device
        )

    def _step(
        self, cache: Cache, sequence: Sequence, ids: list[int], whole: bool = False
    ) -> Tensor:
        self._check(sequence.length + len(ids))
        cache.reserve(sequence, sequence.length + len(ids))
        with torch.inference_mode():
            batch = Batch.of([(sequence, ids)], cache, "all" if whole else "last")
            logits: Tensor = self.model(batch, cache).logits
            return logits
