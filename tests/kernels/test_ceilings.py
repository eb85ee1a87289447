"""The machine's ceilings: measured, once a process, whatever the device lacks."""

from pathlib import Path

import pytest
import torch

from overleap.errors import BackendError
from overleap.kernels.conformance import ceilings as measured
from overleap.kernels.conformance.ceilings import Rate, ceilings, last_cache_bytes


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, and nothing remembered from or for another test."""
    monkeypatch.setattr(measured, "SIZE", {"cpu": 96, "other": 96})
    monkeypatch.setattr(measured, "LARGE_BYTES", 1 << 22)
    monkeypatch.setattr(measured, "last_cache_bytes", lambda: 0)
    monkeypatch.setattr(measured, "_measured", measured._measured.__wrapped__)


def test_a_cpu_has_all_four_and_keeps_its_threads(quick: None) -> None:
    before = torch.get_num_threads()
    for threads in (1, before + 1):
        found = ceilings("cpu", threads)
        assert found.threads == threads
        rates = (found.read, found.f32, found.bf16, found.int8)
        assert all(rate is not None and rate.per_s > 1e7 and rate.how for rate in rates)
        assert torch.get_num_threads() == before


def test_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SIZE", {"cpu": 64, "other": 64})
    monkeypatch.setattr(measured, "LARGE_BYTES", 1 << 22)
    monkeypatch.setattr(measured, "last_cache_bytes", lambda: 0)
    measured._measured.cache_clear()
    try:
        assert ceilings("cpu", 1) is ceilings(torch.device("cpu"), 1)
    finally:
        measured._measured.cache_clear()


def test_the_best_way_counts_and_a_missing_one_does_not() -> None:
    def broken() -> None:
        raise NotImplementedError("no such product")

    slow = torch.ones(1 << 20)
    ways = {"none": broken, "slow": lambda: [slow.sum() for _ in range(9)], "fast": slow.sum}
    best = measured._best(ways, 1.0, torch.device("cpu"))
    assert isinstance(best, Rate) and best.how == "fast"
    assert measured._best({"none": broken}, 1.0, torch.device("cpu")) is None


def test_a_device_without_a_product_has_no_ceiling_for_it(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert ceilings("cpu", 1).int8 is None
    monkeypatch.setattr(torch, "mm", refuse)
    with pytest.raises(BackendError, match="cpu cannot multiply"):
        ceilings("cpu", 1)


def test_the_last_cache_is_the_largest(tmp_path: Path) -> None:
    for number, text in enumerate(("48K\n", "1024K\n", "32M\n")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(text, "ascii")
    assert last_cache_bytes(tmp_path) == 32 << 20
    assert last_cache_bytes(tmp_path / "none") == 0
