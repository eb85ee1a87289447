"""State equivalence over processes: what one has read, another goes on from, to the same logits.

Lengths around the ends of pages. All other ways to an answer: tests/test_state_engine.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from overleap.cache.disk import DiskTier
from overleap.cache.layout import CacheFormat
from overleap.kernels import native, select
from tests.engine.restart import Said, ask, make_engine, make_model, prompt_of
from tests.oracles.steady import Steady

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # of the largest log-probability, that of test_state.py
SHORT = (1, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 512, 513)
LONG = (4095, 4096, 4097)


def in_a_new_process(
    seed: int, cache_format: CacheFormat, folder: Path, lengths: tuple[int, ...]
) -> list[Said]:
    command = [sys.executable, "-m", "tests.engine.restart", str(seed), cache_format, str(folder)]
    done = subprocess.run(
        [*command, *map(str, lengths)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Said(**said) for said in json.loads(done.stdout)]


@pytest.mark.parametrize("cache_format", CacheFormat)
@pytest.mark.parametrize("lengths", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_found_after_a_restart(
    cache_format: CacheFormat, lengths: tuple[int, ...], tmp_path: Path, seed: int
) -> None:
    model, folder = make_model(seed), tmp_path / "kept"
    cold: list[Said] = []
    far = 0.0
    with DiskTier(folder, space_bytes=10**10) as disk, Steady():
        for length in lengths:
            prompt = prompt_of(seed, length)
            cold.append(ask(make_engine(model, cache_format, None, share=False), prompt))
            first = ask(make_engine(model, cache_format, disk), prompt)
            assert (cold[-1].cached, first.cached) == (0, 0)
            far = max(far, first.far_from(cold[-1]))
        stats = disk.stats()
        assert stats.errors == stats.dropped == stats.refused == 0
    for before, after, length in zip(
        cold, in_a_new_process(seed, cache_format, folder, lengths), lengths, strict=True
    ):
        assert after.cached == (length - 1) // 128 * 128
        assert after.ids == before.ids
        far = max(far, after.far_from(before))
    print(f"largest distance {far:.1e}")
    assert far <= TOLERANCE


@pytest.mark.skipif(not native(), reason="there is no native code here")
def test_rows_that_others_computed_are_not_taken(tmp_path: Path, seed: int) -> None:
    """Theirs may round otherwise: an answer is of who gives it, whoever read its prompt before."""
    prompt = prompt_of(seed, 300)
    with DiskTier(tmp_path / "kept", space_bytes=10**10) as disk:
        for backend in ("auto", "torch"):
            model = make_model(seed)
            model.ops = select(backend)
            for cached in (0, 256):
                said = ask(make_engine(model, CacheFormat.RELEASE, disk), prompt)
                assert said.cached == cached, backend
