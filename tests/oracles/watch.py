"""How clear every choice of a run is: the best entry left out, the best expert left out.

Two correct programs whose scores differ in the last bit may choose differently where two scores
are as good as equal, and then all their logits differ. Tests that compare programs use texts
without such places; a test of the tie rule itself is in tests/kernels/test_attention.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.cache.layout import CacheFormat
from overleap.config import ModelConfig
from overleap.kernels.composed import Assembled
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops, Pool
from overleap.kernels.torch.attention import entry_rows
from overleap.kernels.torch.linear import values_of
from tests.oracles import where
from tests.oracles.running import build, draw_ids, feed, room, start


def watched() -> tuple[Ops, list[Tensor]]:
    """The usual ops, and a list that receives the margins [T] of every choice they make.

    A margin is the score of the last one chosen minus that of the first left out, relative to
    the largest score. For one sequence read in one piece.
    """
    ops, margins = where.ops(), list[Tensor]()

    def route(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fixed_TX: Tensor | None,
        k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        if fixed_TX is None:
            affinity = F.softplus(x.double() @ weight.double().t()).sqrt()
            margins.append(_margin(affinity + (0 if bias is None else bias.double()), k))
        return ops.route(x, weight, bias, fixed_TX, k, scale)

    def index_topk(
        q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
    ) -> Tensor:
        number = torch.arange((spans.start[0] + spans.count[0]) // ratio, device=q_TI.device)
        rows = values_of(entry_rows(keys, spans.table_BP[0], number), keys.format).double()
        dots = (values_of(q_TI, keys.format).double() @ rows.t()).relu()
        score = (dots * weight_TI.double()[..., None]).sum(1)
        hidden = number >= ((spans.position_T + 1) // ratio)[:, None]
        margins.append(_margin(score.masked_fill(hidden, -torch.inf), k))
        return ops.index_topk(q_TI, weight_TI, keys, ratio, spans, k)

    return Assembled(vars(ops) | {"route": route, "index_topk": index_topk}), (margins)


def _margin(score_TS: Tensor, k: int) -> Tensor:
    ordered = score_TS.sort(dim=-1, descending=True).values
    if ordered.shape[1] <= k:
        return ordered.new_full(ordered.shape[:1], torch.inf)
    gap = ordered[:, k - 1] - ordered[:, k]  # -inf minus -inf: fewer than k are visible
    largest = score_TS.masked_fill(score_TS == -torch.inf, 0).abs().max()
    return torch.where(ordered[:, k] == -torch.inf, torch.inf, gap) / largest


def clear_text(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    length: int,
    generator: torch.Generator,
    margin: float,
    cache_format: CacheFormat = CacheFormat.WIDE,
) -> tuple[list[int], Tensor]:
    """Random ids for which every choice is clear by `margin`, and their logits [length, V].

    A token at which a choice is not clear is drawn again; those before it stay clear, since no
    token sees what follows.
    """
    ops, margins = watched()
    model = build(config, tensors, ops)
    ids = draw_ids(config, length, generator)
    for _ in range(10 + length):
        margins.clear()
        cache = room(config, length, cache_format, slots=1)
        logits = feed(model, cache, start(cache, length), ids)
        unclear = torch.zeros(length, dtype=torch.bool)
        for one in margins:
            unclear |= (one < margin).cpu()
        if not unclear.any():
            return ids, logits
        ids[int(unclear.nonzero()[0])] = draw_ids(config, 1, generator)[0]
    raise AssertionError(f"no text of {length} tokens with choices clear by {margin}")
