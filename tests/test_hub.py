"""What is fetched for a checkpoint that the hub's cache has already: the encoder's text, once.

Not here: a checkpoint that is not in the cache (test_checkpoint.py).
"""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from overleap.checkpoint import locate
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

ENCODER = "encoding/encoding_dsv4.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's own cache, with the snapshot of a small checkpoint and no encoder in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    config = tiny_config(seed, "f32")
    snapshot = repository / "snapshots" / COMMIT
    write_checkpoint(snapshot, config, random_tensors(config, seed))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_text("{}")
    return repository


@pytest.fixture
def asked(cached: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of the commit that the hub was asked for; it has them."""
    names: list[str] = []

    def download(hub_id: str, filename: str, *, revision: str, **how: Any) -> str:
        assert (hub_id, revision) == ("org/name", COMMIT)
        names.append(filename)
        path = cached / "snapshots" / revision / filename
        path.parent.mkdir(exist_ok=True)
        path.write_text("REASONING_EFFORT_PROMPTS = {}\n")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return names


def test_the_encoder_of_a_cached_snapshot_is_fetched_once(cached: Path, asked: list[str]) -> None:
    snapshot = cached / "snapshots" / COMMIT
    for _ in range(2):
        assert locate("org/name") == snapshot
        assert (snapshot / ENCODER).is_file() and asked == [ENCODER]


def test_what_is_known_to_have_no_encoder_is_not_asked(cached: Path, asked: list[str]) -> None:
    marker = cached / ".no_exist" / COMMIT / ENCODER
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert locate("org/name") == cached / "snapshots" / COMMIT
    assert asked == []


def test_a_tokenizer_that_is_missing_is_fetched(cached: Path, asked: list[str]) -> None:
    """Other programs fetch file by file."""
    snapshot = cached / "snapshots" / COMMIT
    (snapshot / "tokenizer.json").unlink()
    assert locate("org/name") == snapshot
    assert (snapshot / "tokenizer.json").is_file() and asked == [ENCODER, "tokenizer.json"]


def test_without_a_network_the_snapshot_serves_as_it_is(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*what: Any, **how: Any) -> str:
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert locate("org/name") == cached / "snapshots" / COMMIT
