"""Pages of mapped files: what was let go is not resident, what is read is, and nothing is lost."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from overleap.checkpoint import Checkpoint, Damaged, build, pages, placed
from overleap.checkpoint.files import Shard, Writer, read_header
from overleap.checkpoint.pages import PAGE, Pages, _reads_huge_pages
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

linux = pytest.mark.skipif(sys.platform != "linux", reason="advice about pages is Linux's")
SIZE = 9 * 2**20 + 777


@pytest.fixture
def shard(tmp_path: Path, seed: int) -> Shard:
    data = torch.randint(256, (SIZE,), generator=torch.Generator().manual_seed(seed))
    path = tmp_path / "one.safetensors"
    with Writer(path, {"x": ("U8", (SIZE,))}) as writer:
        writer.put("x", data.to(torch.uint8))
    return Shard(read_header(path))


def resident(shard: Shard) -> int:
    """Bytes of the mapped file that this process has resident."""
    text = Path("/proc/self/smaps").read_text("ascii")
    name = re.escape(str(shard.header.path))
    found = re.findall(rf"{name}\n(?:(?!\n[0-9a-f]+-).)*?Rss: +(\d+) kB", text, re.S)
    return 1024 * sum(map(int, found))


@linux
@pytest.mark.parametrize("huge", [True, False])
def test_read_and_let_go(shard: Shard, huge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_reads_huge_pages", lambda: huge and _reads_huge_pages())
    before = shard.bytes.clone()
    size, room = shard.header.size, bytearray(100_000)
    held = Pages(shard)
    assert held.lets_go
    begin, end = 12_345, 8 * 2**20 + 5
    held.scatter(0, size)
    held.scatter(begin, end, odd=True)
    held.drop(0, size)
    assert resident(shard) == 0
    held.read(begin, end, room)
    assert end - begin <= resident(shard) <= end - begin + 2 * PAGE, "no more and no less"
    held.drop(begin, end)
    assert resident(shard) == 0
    held.scatter(0, PAGE, odd=True)
    held.read(0, 10, room)
    assert 10 <= resident(shard) <= PAGE
    assert shard.bytes.equal(before)


@linux
def test_a_file_that_became_shorter_is_an_error_and_not_the_end(shard: Shard) -> None:
    held, path = Pages(shard), shard.header.path
    held.scatter(0, SIZE)
    os.truncate(path, 2**20)
    with pytest.raises(Damaged, match=r"one\.safetensors: not readable at byte 5000000"):
        held.read(5_000_000, 6_000_000, bytearray(2**20))


def test_without_advice_reading_touches_and_nothing_goes(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    held = Pages(shard)
    assert not held.lets_go
    held.scatter(0, SIZE)
    held.read(1000, SIZE, bytearray(10))
    held.drop(0, SIZE)
    if sys.platform == "linux":
        assert resident(shard) >= SIZE - 1000


def test_linux_before_the_call_that_maps(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """An advice that the system does not know is no error: the pages are touched."""
    monkeypatch.setattr(pages, "_POPULATE_READ", 9999)
    held = Pages(shard)
    held.drop(0, SIZE)
    held.read(1000, SIZE, bytearray(2**20))
    if sys.platform == "linux":
        assert resident(shard) >= SIZE - 1000


def test_which_linux_reads_huge_pages(tmp_path: Path) -> None:
    assert _reads_huge_pages("6.1.0-13-amd64", tmp_path)
    assert _reads_huge_pages("5.18.0", tmp_path)
    assert not _reads_huge_pages("5.15.0-91-generic", tmp_path)
    assert not _reads_huge_pages("6.1.0", tmp_path / "none")
    assert not _reads_huge_pages("strange", tmp_path)


@pytest.mark.parametrize("form", ["release", "base", "bf16"])
def test_where_experts_lie(form: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, form)
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "m", config, tensors, max_shard_bytes=100_000)
    checkpoint = Checkpoint(folder)
    found = placed(checkpoint, build(checkpoint, dtype=torch.bfloat16))
    assert len(found.experts) == len(config.all_kinds)
    names = [n for n in checkpoint.found if ".ffn.experts." in n]
    every = [e for layer in found.experts for expert in layer for e in expert]
    assert found.weights.expert_bytes == sum(e.memory for e in every)
    total = sum(checkpoint.found[n].end - checkpoint.found[n].start for n in names)
    assert total == sum(e.end - e.start for e in every)
    assert all(e.end - e.start <= e.memory <= e.end - e.start + 2 * PAGE for e in every)
    for layer, owner in ((0, "layers.0"), (-1, "mtp.0")):
        wanted = [checkpoint.found[n] for n in names if n.startswith(f"{owner}.ffn.experts.3.")]
        extents = found.experts[layer][3]
        for part in wanted:
            assert any(
                e.pages.path.name == part.file and e.start <= part.start and part.end <= e.end
                for e in extents
            )


def test_converted_experts_cannot_be_let_go(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, "bf16")
    folder = write_checkpoint(tmp_path / "m", config, random_tensors(config, seed))
    checkpoint = Checkpoint(folder)
    model = build(checkpoint, dtype=torch.float32)
    (shard,) = checkpoint.shards.values()
    if sys.platform == "linux":
        assert resident(shard) > shard.header.size / 2, "all was read to be converted"
    found = placed(checkpoint, model)
    assert found.experts == () and found.weights.expert_bytes == 0
    if sys.platform == "linux":
        assert resident(shard) < shard.header.size / 2, "what was copied is not there twice"
