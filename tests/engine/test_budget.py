"""Memory known beforehand: what fits, what is refused, and the largest context that would fit."""

import random
import re

import pytest

from overleap import machine
from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.config import ModelConfig
from overleap.engine.budget import CHUNKS, budget, parse_bytes
from overleap.errors import CapacityError

GIB = 2**30
FLASH = ModelConfig.preset("v4-flash")


def test_a_million_tokens_of_flash_take_under_eight_gigabytes_beside_the_weights() -> None:
    found = budget(FLASH, 2**20, CacheFormat.RELEASE, memory_bytes=8 * GIB, resident_bytes=0)
    assert 3.4 * GIB < found.cache_bytes < 3.6 * GIB
    assert found.peak_bytes < 8 * GIB


def test_snapshots_then_the_chunk_shrink_before_anything_is_refused() -> None:
    roomy = budget(FLASH, 4096, CacheFormat.RELEASE, memory_bytes=64 * GIB, resident_bytes=0)
    tight = budget(
        FLASH,
        4096,
        CacheFormat.RELEASE,
        memory_bytes=roomy.peak_bytes - 1,
        resident_bytes=0,
    )
    assert roomy.chunk_tokens == tight.chunk_tokens == CHUNKS[0]
    assert tight.snapshot_bytes == 4 * layout.snapshot_bytes(FLASH, CacheFormat.RELEASE)
    tighter = budget(
        FLASH,
        4096,
        CacheFormat.RELEASE,
        memory_bytes=tight.peak_bytes - 1,
        resident_bytes=0,
    )
    assert tighter.chunk_tokens == CHUNKS[1]


@pytest.mark.parametrize("form", CacheFormat)
def test_the_refusal_names_a_context_that_fits(form: CacheFormat, seed: int) -> None:
    memory = random.Random(seed).randrange(3 * GIB, 6 * GIB)
    with pytest.raises(CapacityError) as caught:
        budget(FLASH, 30 * 2**20, form, memory_bytes=memory, resident_bytes=GIB)
    assert f"{machine.size(memory)} may be used" in caught.value.message
    named = re.search(r"a context of (\d+) tokens fits", caught.value.hint or "")
    assert named is not None
    largest = int(named[1])
    fits = budget(FLASH, largest, form, memory_bytes=memory, resident_bytes=GIB)
    assert fits.peak_bytes <= memory
    with pytest.raises(CapacityError):
        budget(FLASH, largest + 1, form, memory_bytes=memory, resident_bytes=GIB)


def test_weights_alone_can_be_too_much() -> None:
    with pytest.raises(CapacityError) as caught:
        budget(FLASH, 128, CacheFormat.RELEASE, memory_bytes=GIB, resident_bytes=2 * GIB)
    assert "no context fits" in (caught.value.hint or "")


def test_without_a_limit_what_is_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 2 * GIB)
    assert budget(FLASH, 1024, CacheFormat.RELEASE, resident_bytes=GIB).peak_bytes <= 3 * GIB
    with pytest.raises(CapacityError, match=r"3\.0 GiB may be used"):
        budget(FLASH, 2**20, CacheFormat.RELEASE, resident_bytes=GIB)


def test_scratch_does_not_depend_on_the_context() -> None:
    found = [
        budget(FLASH, tokens, CacheFormat.RELEASE, memory_bytes=64 * GIB, resident_bytes=0)
        for tokens in (1024, 2**20)
    ]
    assert found[0].scratch_bytes == found[1].scratch_bytes == layout.scratch_bytes(FLASH, 512)


def test_a_wide_cache_is_that_of_wide_activations() -> None:
    """`--cache wide` reads the model in float32: temporaries take twice what they do in bf16."""
    assert FLASH.torch_dtype == "bfloat16"
    release, wide = (
        budget(FLASH, 1024, form, memory_bytes=64 * GIB, resident_bytes=0, native=True)
        for form in (CacheFormat.RELEASE, CacheFormat.WIDE)
    )
    assert release.chunk_tokens == wide.chunk_tokens
    assert wide.scratch_bytes > 1.7 * release.scratch_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * GIB), ("512 MiB", 512 * 2**20), ("2e9", 2_000_000_000), ("1.5gb", 15 * 10**8),
     ("100B", 100)],
)  # fmt: skip
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "0", "nan", "inf", "8 apples", "1e30TiB"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(CapacityError, match="is no amount of memory"):
        parse_bytes(text)
