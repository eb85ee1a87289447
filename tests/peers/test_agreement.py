"""Three independent programs, one checkpoint, the same token ids: the same next-token odds.

In float32 with nothing rounded on any side (weights are bf16 values; llama.cpp gets them as
float32, its cache as well), so only the order of sums differs. Each program runs in a process of
its own. Texts are those where no choice of experts or entries hangs on the last bit.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overleap.config import Yarn
from overleap.eval.peers.versus import Contender, answers
from overleap.eval.speed import open_folder
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.oracles.watch import clear_text
from tests.peers.installed import needs

# Differences of log-probabilities, which are of the size of 10: some 20 units of float32's last
# place there. Measured: 4e-6 with other sums of up to a thousand terms on each side.
TOLERANCE = 2e-5
CLEAR = 1e-5  # choices closer than this are avoided: both sides agree to about 1e-6
# llama.cpp: four streams, and an indexer key that its Hadamard transform of 64 takes.
FOR_LLAMA: dict[str, Any] = {"hc_mult": 4, "index_head_dim": 64, "index_n_heads": 16}
CASES: dict[str, dict[str, Any]] = {
    "every kind of layer": {"rope_scaling": None, "index_topk": 20},
    "YaRN, few entries chosen": {"rope_scaling": Yarn(16.0, 256), "index_topk": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("peer", needs("transformers", "llama.cpp"))
def test_log_probabilities_agree(peer: str, case: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, "bf16", num_nextn_predict_layers=0, **FOR_LLAMA, **CASES[case])
    if config.head_dim == 64:
        config = config.with_(head_dim=72)  # of 64 the wheel's llama.cpp divides by zero
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    generator = torch.Generator().manual_seed(seed)
    ids, _ = clear_text(config, tensors, 261, generator, CLEAR)
    ends = (1, 3, 8, 127, 129, 257, 261)
    found = answers(folder, [Contender("ours", "overleap"), Contender.peer(peer)], ids, ends)
    apart = np.abs(found["ours"] - found[peer])
    print(f"{peer}, {case}: {apart.max():.1e} apart, by place {apart.max(1)}")
    assert np.isfinite(found[peer]).all() and found[peer].shape == (7, config.vocab_size)
    assert apart.max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("peer", needs("transformers", "llama.cpp"))
def test_the_bench_model_agrees(peer: str, seed: int) -> None:
    """Its bf16 form at up to 700 tokens, on any text: a choice too close to call may differ.

    So it is the median of 14 places that must be near. Measured: 5e-6 and 1e-5.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(8192, (700,), generator=draw).tolist()
    ends = tuple(range(50, 701, 50))
    with open_folder("bench-122m-bf16", seed) as (folder, _, _):
        ours = Contender("ours", "overleap")
        found = answers(folder, [ours, Contender.peer(peer)], ids, ends, threads=2)
    apart = np.abs(found["ours"] - found[peer]).max(1)
    print(f"{peer}: apart by place {apart}")
    assert np.median(apart) <= 5e-5
