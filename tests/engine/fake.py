"""A model whose next token depends on every token before it, read back from the real cache.

It writes token ids into page entries and window rings of a wide cache, where the true model
writes vectors. A page, slot or snapshot that is mixed up changes the answer or fails outright.
Its draft block does the same with its own window, and is right about two times in three.
"""

import hashlib
import random

import torch

from overleap.cache.state import Cache, Sequence
from overleap.config import ModelConfig
from overleap.kernels import select
from overleap.kernels.spans import Spans
from overleap.model.transformer import Batch, Output

VOCABULARY = 40
EMPTY = torch.empty(0, VOCABULARY)
CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=1,
    head_dim=8,
    qk_rope_head_dim=4,
    q_lora_rank=4,
    o_groups=1,
    o_lora_rank=4,
    compress_ratios=(4, 128, 0, 0),
    index_n_heads=1,
    index_head_dim=8,
    index_topk=4,
    n_routed_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=4,
    num_hash_layers=0,
    routed_scaling_factor=1.0,
    max_position_embeddings=4096,
)


def next_logits(ids: list[int]) -> torch.Tensor:
    """f32 [V]: logits that the whole text decides."""
    digest = hashlib.sha256(repr(ids).encode()).digest()
    number = random.Random(digest)
    return torch.tensor([number.gauss(0, 2) for _ in range(VOCABULARY)])


class FakeModel:
    """Stands where a Transformer does: config, device, dtype, ops, calls that advance sequences."""

    def __init__(self) -> None:
        self.config = CONFIG
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.ops = select()
        self.watchers = {"the test"}  # its steps are no calls of ops that could be recorded
        self.steps: list[list[int]] = []  # tokens of each sequence in each step
        self.fail: BaseException | None = None
        self.broken: set[int] = set()  # a sequence that ends with one of these gets NaN logits
        self.right = 2 / 3  # how often the draft block's logits are those of the main layers
        self.luck = random.Random(0)
        self.texts: list[list[int]] = []  # what the streams of tokens stand for
        self.drafted: list[list[int]] = []  # tokens of each sequence in each run of the draft block
        self.draft_broken = False

    def __call__(self, batch: Batch, cache: Cache) -> Output:
        self.steps.append(list(batch.spans.count))
        texts = []
        for row, sequence in enumerate(batch.sequences):
            first, last = batch.spans.offset[row], batch.spans.offset[row + 1]
            texts.append(self.write(cache, sequence, batch.ids_T[first:last].tolist()))
        if self.fail is not None:
            raise self.fail
        for sequence, count in zip(batch.sequences, batch.spans.count, strict=True):
            sequence.length += count
        # The text up to every packed token: what its logits and its streams follow from.
        upto = [
            text[: len(text) - count + n + 1]
            for text, count in zip(texts, batch.spans.count, strict=True)
            for n in range(count)
        ]
        wanted = range(len(upto)) if batch.rows is None else batch.rows.tolist()
        logits = torch.stack([self.logits(upto[row]) for row in wanted]) if wanted else EMPTY
        self.texts = upto
        return Output(logits, torch.empty(0), torch.arange(len(upto))[:, None, None])

    def logits(self, ids: list[int]) -> torch.Tensor:
        if ids[-1] in self.broken:
            return torch.full((VOCABULARY,), float("nan"))
        return next_logits(ids)

    def draft(
        self,
        streams_TMD: torch.Tensor,
        next_T: torch.Tensor,
        cache: Cache,
        spans: Spans,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each text with its next token, remembered by the length of the text."""
        self.drafted.append(list(spans.count))
        ring = cache.layers[CONFIG.num_hidden_layers].ring.rows
        texts = [
            [*self.texts[int(number)], int(token)]
            for number, token in zip(streams_TMD.flatten(), next_T, strict=True)
        ]
        for text, at, slot in zip(texts, spans.position_T, spans.slot_T, strict=True):
            for back in range(1, min(int(at), 127) + 1):
                assert ring[slot, (at - back) % ring.shape[1], 0] == len(text) - back
            ring[slot, at % ring.shape[1], 0] = len(text)
        guesses = []
        for row in rows.tolist():
            guess = next_logits(texts[row])
            if self.luck.random() >= self.right:
                guess[guess.argmax()] = -torch.inf
            guesses.append(guess)
            if self.draft_broken:
                guesses[-1] = guess * float("nan")
        return torch.stack(guesses) if guesses else EMPTY, streams_TMD

    def write(self, cache: Cache, sequence: Sequence, ids: list[int]) -> list[int]:
        """Put the ids where a CSA layer and a window keep theirs; read the whole text back."""
        layer = cache.layers[0]
        assert layer.entries is not None and layer.tail is not None
        entries, ring = layer.entries.rows, layer.ring.rows
        window = range(max(0, sequence.length - 127), sequence.length)
        places = [at % ring.shape[1] for at in window]
        before = [int(token) for token in ring[sequence.slot, places, 0].tolist()]
        for at, token in enumerate(ids, sequence.length):
            entries[sequence.pages[at // 128], at % 128 // 4, at % 4] = token
            ring[sequence.slot, at % ring.shape[1], 0] = token
        end = sequence.length + len(ids)
        pages = entries[sequence.pages[: -(-end // 128)], :, :4]
        text = [int(token) for token in pages.flatten()[:end].tolist()]
        assert text[sequence.length :] == ids, "another sequence wrote here"
        assert before == text[window.start : window.stop], "the window is not this text's"
        return text


def poison(cache: Cache) -> None:
    """Fill all rows with a number that is no token."""
    for layer in cache.layers:
        for pool in (layer.ring, layer.entries, layer.keys):
            if pool is not None:
                pool.rows.fill_(-1)


def answer(prompt: list[int], count: int) -> list[int]:
    """The greedy continuation, from the definition alone."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(next_logits(ids).argmax()))
    return ids[len(prompt) :]
