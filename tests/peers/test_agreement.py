"""Three independent programs, one checkpoint, the same token ids: the same next-token odds.

In float32 with nothing rounded on any side (weights are bf16 values; llama.cpp gets them as
float32, its cache as well), so only the order of sums differs. Each program runs in a process of
its own. Texts are those where no choice of experts or entries hangs on the last bit.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overleap.config import Yarn
from overleap.eval.peers.gguf import write_gguf
from overleap.eval.peers.versus import Contender, answers
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.oracles.watch import clear_text

PEERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
        ),
    )
    for name, package in (("transformers", "transformers"), ("llama.cpp", "xllamacpp"))
]
# Differences of log-probabilities, which are of the size of 10. Sums of a thousand float32 terms
# in another order move by some 1e-6 relative; eight layers of them by less than this.
TOLERANCE = 5e-4
CLEAR = 1e-4  # choices closer than this are avoided: ten times what the sums may move
# llama.cpp: four streams, and an indexer key that its Hadamard transform of 64 takes.
FOR_LLAMA: dict[str, Any] = {"hc_mult": 4, "index_head_dim": 64, "index_n_heads": 16}
CASES: dict[str, dict[str, Any]] = {
    "every kind of layer": {"rope_scaling": None, "index_topk": 20},
    "YaRN": {"rope_scaling": Yarn(16.0, 256), "index_topk": 20},
    "few entries chosen": {"rope_scaling": None, "index_topk": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("peer", PEERS)
def test_log_probabilities_agree(peer: str, case: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, "bf16", num_nextn_predict_layers=0, **FOR_LLAMA, **CASES[case])
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    generator = torch.Generator().manual_seed(seed)
    ids, _ = clear_text(config, tensors, 301, generator, CLEAR)
    ends = (1, 3, 8, 127, 129, 257, 301)
    found = answers(folder, [Contender("ours", "overleap"), Contender.peer(peer)], ids, ends)
    apart = np.abs(found["ours"] - found[peer])
    print(f"{peer}, {case}: {apart.max():.1e} apart, by place {apart.max(1)}")
    assert np.isfinite(found[peer]).all() and found[peer].shape == (7, config.vocab_size)
    assert apart.max() <= TOLERANCE
