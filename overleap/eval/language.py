"""How well a model predicts a text: bits per byte by depth, and how far two forms are apart.

Not questions (grid.py). gzip -9 and xz -9 of the same bytes stand beside it. Read next: reader.py.
"""

import gzip
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from overleap.errors import RequestError
from overleap.eval.reader import CHUNK, Progress, Reader


@dataclass(frozen=True)
class Bits:
    """Bits per byte of a text, in all and by depth (in parts that differ by a token at most).

    perplexity  a token: 2 to the bits that one takes in the mean. Of one tokenizer only: longer
                tokens take more bits each
    """

    tokens: int
    bytes: int
    bits_per_byte: float
    perplexity: float
    by_depth: tuple[float, ...]
    gzip: float
    xz: float


def bits_per_byte(
    reader: Reader, text: str, tokens: int, *, bands: int = 4, progress: Progress | None = None
) -> Bits:
    """Of the first `tokens` tokens of a text, read as one document after BOS.

    Raises RequestError when the text is shorter than a token a band.
    """
    ids = reader.tokenizer.encode_start(text, tokens)
    if len(ids) < bands:
        raise RequestError(f"the text has {len(ids)} tokens, {bands} bands need more")
    nll = []
    target = torch.tensor(ids)
    for number, logits in enumerate(reader.logits([reader.tokenizer.bos_id, *ids[:-1]])):
        part = target[number * CHUNK : (number + 1) * CHUNK]
        nll.append(F.cross_entropy(logits, part, reduction="none"))
        if progress is not None:
            progress(min((number + 1) * CHUNK, len(ids)), len(ids))
    bits = torch.cat(nll).double() / math.log(2)
    raw = b"".join(reader.tokenizer.token_bytes(i) for i in ids)
    sizes = torch.tensor([len(reader.tokenizer.token_bytes(i)) for i in ids]).double()
    pieces = zip(bits.tensor_split(bands), sizes.tensor_split(bands), strict=True)
    return Bits(
        len(ids),
        len(raw),
        float(bits.sum() / sizes.sum()),
        float(bits.mean().exp2()),
        tuple(float(b.sum() / s.sum()) for b, s in pieces),
        8 * len(gzip.compress(raw, 9)) / len(raw),
        8 * len(lzma.compress(raw, preset=9)) / len(raw),
    )


@dataclass(frozen=True)
class Apart:
    """How far form B of a model is from form A on a text.

    kl        mean KL(A || B) of the next token's distribution, nats; kl_99: 99th percentile
    agree     share of positions with the same likeliest token
    bits      bits per token of A and of B; loss: how much more B needs, as a share
    """

    tokens: int
    kl: float
    kl_99: float
    agree: float
    bits: tuple[float, float]

    @property
    def loss(self) -> float:
        """0.01 means that B needs one per cent more bits."""
        return self.bits[1] / self.bits[0] - 1


def apart(a: Reader, b: Reader, ids: Sequence[int], progress: Progress | None = None) -> Apart:
    """Both read the same ids; positions after the first are compared.

    Raises RequestError where the two have different vocabularies, or fewer than two ids.
    """
    sizes = a.model.config.vocab_size, b.model.config.vocab_size
    if sizes[0] != sizes[1] or len(ids) < 2:
        raise RequestError(
            f"vocabularies of {sizes[0]} and {sizes[1]} and a text of {len(ids)} tokens "
            "cannot be compared"
        )
    far, same, bits = [], [], []
    target, at = torch.tensor(list(ids[1:])), 0
    for x, y in zip(a.logits(list(ids[:-1])), b.logits(list(ids[:-1])), strict=True):
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        part = target[at : at + len(p)]
        at += len(p)
        far.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        bits.append(torch.stack([-z.gather(1, part[:, None])[:, 0] for z in (p, q)]))
        if progress is not None:
            progress(at, len(target))
    kl, need = torch.cat(far), torch.cat(bits, 1).double().mean(1) / math.log(2)
    return Apart(
        len(target),
        float(kl.mean()),
        float(kl.quantile(0.99)),
        float(torch.cat(same).float().mean()),
        (float(need[0]), float(need[1])),
    )
