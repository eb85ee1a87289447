"""Official checkpoints in and out: every storage form, one file and many, views, conversion, hub.

Damaged checkpoints have their own file. Read next: test_checkpoint_corrupt.py, checkpoints.py.
"""

import json
import random
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import psutil
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from overleap.checkpoint import (
    Checkpoint,
    Damaged,
    Verified,
    convert,
    hub,
    load,
    locate,
    manifest,
    open_checkpoint,
    preflight,
    save,
    show,
    tensor_table,
    verify,
    write_manifest,
)
from overleap.checkpoint.convert import parameters
from overleap.checkpoint.table import Role
from overleap.config import ModelConfig
from overleap.errors import CapacityError, CheckpointError, ConfigError
from overleap.kernels.spec import Weight
from overleap.kernels.torch.quant import dequantize
from tests.checkpoints import FORMS, random_tensors, rewrite, tiny_config, write_checkpoint

SMALL_SHARDS = 60_000
INDEX = "model.safetensors.index.json"


@pytest.fixture
def tiny(seed: int, tmp_path: Path) -> Path:
    """A tiny float32 checkpoint in one file."""
    config = tiny_config(seed)
    return write_checkpoint(tmp_path / "tiny", config, random_tensors(config, seed))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bytes, types and shapes; float8 tensors cannot be compared directly."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales applied: what the weights mean, in float32."""
    meant = {}
    for name, tensor in tensors.items():
        if not name.endswith(".scale"):
            scale = tensors.get(name.removesuffix("weight") + "scale")
            meant[name] = dequantize(Weight(tensor, scale)).float()
    return meant


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.read_order()}


@pytest.mark.parametrize("limit", [SMALL_SHARDS, 2**30])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_read(form: str, limit: int, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, form)
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "model", config, tensors, limit)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (limit == SMALL_SHARDS) == (folder / INDEX).is_file()
    checkpoint = Checkpoint(folder)
    assert checkpoint.config == config
    got = read(folder)
    assert got.keys() == tensors.keys()
    assert all(same(got[name], tensors[name]) for name in tensors)
    assert verify(folder, cache=tmp_path).ok
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("form", FORMS)
def test_the_safetensors_library_agrees(form: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, form)
    tensors = random_tensors(config, seed)
    ours = write_checkpoint(tmp_path / "ours", config, tensors, SMALL_SHARDS)
    read_by_them: dict[str, Tensor] = {}
    for path in ours.glob("*.safetensors"):
        read_by_them |= load_file(path)
    assert read_by_them.keys() == tensors.keys()
    assert all(same(read_by_them[name], tensors[name]) for name in tensors)

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    shutil.copy(ours / "config.json", theirs)
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    got = read(theirs)
    assert all(same(got[name], tensors[name]) for name in tensors)
    assert open_checkpoint(theirs)[1] is Verified.NONE


def test_unaligned_data_is_read(tmp_path: Path, tiny: Path) -> None:
    """The format asks for no alignment: move every byte by one with a header of odd length."""
    file = tiny / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    before = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.write_bytes(struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :])
    (tiny / manifest.MANIFEST).unlink()
    after = read(tiny)
    assert all(same(after[name], before[name]) for name in before)


@pytest.mark.parametrize("form", FORMS)
def test_load_keeps_packed_weights_packed(form: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, form)
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    placed = dict(load(folder).named_parameters())
    assert placed.keys() == tensors.keys()
    table = tensor_table(config)
    for name, tensor in placed.items():
        small = table[name].role is Role.SMALL
        assert same(tensor, tensors[name].float() if small else tensors[name]), name
        assert not tensor.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_load_wide_unpacks(form: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, form)
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    model = load(folder, wide=True, dtype=torch.bfloat16)
    placed = dict(model.named_parameters())
    meant = values(tensors)
    assert placed.keys() == meant.keys()
    for name, tensor in placed.items():
        assert not name.endswith(".scale")
        wanted = torch.bfloat16 if tensor.ndim == 2 and name.endswith("weight") else tensor.dtype
        assert tensor.dtype is wanted
        assert torch.equal(tensor.float(), meant[name].to(tensor.dtype).float()), name


def test_views_are_of_the_file_and_writing_stays_private(tiny: Path) -> None:
    before = (tiny / "model.safetensors").read_bytes()
    checkpoint = Checkpoint(tiny)
    whole = checkpoint.shards["model.safetensors"].bytes
    model = load(tiny)
    for name in checkpoint.read_order():
        view = checkpoint.tensor(name)
        start = checkpoint.found[name].start
        assert view.data_ptr() == whole.data_ptr() + start, f"{name} was copied"
    model.embed.weight.data.add_(1.0)
    assert (tiny / "model.safetensors").read_bytes() == before
    assert torch.equal(model.embed.weight, checkpoint.tensor("embed.weight") + 1)


def test_opening_reads_no_data(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, "release", vocab_size=300_000, hidden_size=128, num_hash_layers=0)
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "large", config, tensors)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 100e6
    del tensors
    before = psutil.Process().memory_info().rss
    checkpoint, _ = open_checkpoint(folder, verify=False)
    views = [checkpoint.tensor(name) for name in checkpoint.read_order()]
    assert psutil.Process().memory_info().rss - before < 10e6
    assert len(views) == len(checkpoint.table)


def test_duplicates_of_embedding_and_head_are_skipped(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    names = ("mtp.0.emb.tok_emb.weight", "mtp.0.embed.weight", "mtp.0.head.weight")
    rewrite(file, tensors | {name: tensors["embed.weight"].clone() for name in names})
    write_manifest(tiny)
    assert set(dict(load(tiny).named_parameters())) == set(tensors)


def test_drafting_stages_that_the_config_leaves_out_are_skipped(tiny: Path, seed: int) -> None:
    """As the hints say: without a drafter, whatever its tensors are."""
    file, config = tiny / "model.safetensors", tiny / "config.json"
    tensors = load_file(file)
    rewrite(file, tensors | {"mtp.1.norm.weight": torch.zeros(4), "mtp.2.w": torch.zeros(4)})
    (tiny / manifest.MANIFEST).unlink()
    with pytest.raises(Damaged, match=r"mtp\.1\.norm\.weight: is not part"):
        load(tiny)
    raw = json.loads(config.read_text())
    raw["num_nextn_predict_layers"] = 0
    raw["compress_ratios"] = raw["compress_ratios"][: raw["num_hidden_layers"]]
    config.write_text(json.dumps(raw))
    found = set(dict(load(tiny).named_parameters()))
    assert found == {name for name in tensors if not name.startswith("mtp.")}


def test_int64_tables_are_accepted(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    name = "layers.0.ffn.gate.tid2eid"
    rewrite(file, tensors | {name: tensors[name].long()})
    write_manifest(tiny)
    assert same(dict(load(tiny).named_parameters())[name], tensors[name])


def test_save_refuses_what_does_not_fit(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed)
    tensors = random_tensors(config, seed)
    bad: list[tuple[dict[str, Tensor], str]] = [
        (tensors | {"layers.0.extra": torch.zeros(1)}, "layers.0.extra: is not part"),
        ({n: t for n, t in tensors.items() if n != "norm.weight"}, "norm.weight: is missing"),
        (tensors | {"norm.weight": torch.zeros(3)}, r"norm.weight: has shape \[3\]"),
        (tensors | {"norm.weight": tensors["norm.weight"].half()}, "norm.weight: has the type"),
        (tensors | {"norm.weight": tensors["norm.weight"].char()}, "norm.weight: is stored as I8"),
    ]
    for given, message in bad:
        with pytest.raises(Damaged, match=message):
            save(given, config, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_save_is_all_or_nothing(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(seed)
    tensors = random_tensors(config, seed)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("overleap.checkpoint.files.Writer.put", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save(tensors, config, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    save(tensors, config, tmp_path / "model")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        save(tensors, config, tmp_path / "model")


def test_companions_are_copied_and_vouched_for(seed: int, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# A tiny model\n")
    config = tiny_config(seed)
    save(random_tensors(config, seed), config, tmp_path / "model", companions=[card])
    assert verify(tmp_path / "model", cache=tmp_path).ok
    (tmp_path / "model" / "README.md").write_text("# Another model\n")
    (problem,) = verify(tmp_path / "model", cache=tmp_path).problems
    assert problem.file == "README.md"
    load(tmp_path / "model")  # which does not read the card


@pytest.mark.parametrize("target", ["release", "bf16", "f32"])
@pytest.mark.parametrize("source", FORMS)
def test_convert(source: str, target: Any, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, source)
    tensors = random_tensors(config, seed)
    old = write_checkpoint(tmp_path / "old", config, tensors, SMALL_SHARDS)
    (old / "tokenizer.json").write_text("{}")
    (old / "README.md").write_text("# Card\n")
    (old / "stray.bin").write_bytes(b"\x80")
    write_manifest(old)
    calls: list[tuple[int, int]] = []
    new = tmp_path / "new"
    convert(old, new, target, max_shard_bytes=90_000, progress=lambda *at: calls.append(at))

    assert verify(new, cache=tmp_path).ok
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    assert (new / "tokenizer.json").is_file() and (new / "README.md").is_file()
    assert not (new / "stray.bin").exists()
    made = ModelConfig.from_checkpoint(new)
    packed = target == "release"
    assert made.torch_dtype == ("float32" if target == "f32" else "bfloat16")
    assert made.expert_dtype == ("fp4" if packed else None)
    assert (made.quantization_config is not None) == packed
    got = values(read(new))
    meant = values(tensors)
    assert got.keys() == meant.keys()
    for name, spec in tensor_table(config).items():
        if name not in got:
            continue
        exact = spec.role in ("small", "ids") or target == "f32" or source == target
        exact |= source != "f32" and (target == "bf16" or spec.role == "matrix")
        exact |= source == "base" and spec.role == "linear"
        if exact:
            assert torch.equal(got[name], meant[name]), name
        elif spec.role == "matrix" or target == "bf16":
            assert torch.equal(got[name], meant[name].bfloat16().float()), name
        else:
            step = 2**-4 if spec.role == "linear" else 0.25  # half the widest gap between codes
            limit = meant[name].abs().max()
            assert (got[name] - meant[name]).abs().max() <= step * limit, name
    again = tmp_path / "again"
    convert(new, again, target)
    unchanged = read(again)
    assert all(same(unchanged[name], tensor) for name, tensor in read(new).items())


def test_convert_sets_entries_of_the_tokenizer_config(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed)
    old = write_checkpoint(tmp_path / "old", config, random_tensors(config, seed))
    entries = {"chat_profile": "v4-pro-base"}
    convert(old, tmp_path / "made", "bf16", tokenizer_config=entries)
    for form in ("bf16", "release"):
        (old / "tokenizer_config.json").write_text('{"bos": "é", "chat_profile": "mini"}', "utf-8")
        write_manifest(old)
        new = tmp_path / form
        convert(old, new, form, tokenizer_config=entries)  # type: ignore[arg-type]
        said = json.loads((new / "tokenizer_config.json").read_text("utf-8"))
        assert said == {"bos": "é"} | entries
        assert verify(new, cache=tmp_path).ok, "the manifest is of what was written"
    assert json.loads((tmp_path / "made" / "tokenizer_config.json").read_text()) == entries
    (old / "tokenizer_config.json").write_text("[]")
    write_manifest(old)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds a list"):
        convert(old, tmp_path / "no", "bf16", tokenizer_config=entries)
    assert not (tmp_path / "no").exists()


def test_convert_refuses_what_fp4_cannot_hold(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, moe_intermediate_size=40)
    write_checkpoint(tmp_path / "old", config, random_tensors(config, seed))
    with pytest.raises(ConfigError, match="40 inputs, FP4 experts need a multiple of 32"):
        convert(tmp_path / "old", tmp_path / "new", "release")
    with pytest.raises(CheckpointError, match="no form is called 'int4'"):
        convert(tmp_path / "old", tmp_path / "new", "int4")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("preset", "total", "active"), [("v4-flash", 284.33, 13.27), ("v4-pro", 1573.0, 48.85)]
)
def test_parameter_counts_of_the_releases(preset: str, total: float, active: float) -> None:
    """Against the published sizes (facts, section 2); active without the embedding."""
    config = ModelConfig.preset(preset)
    counted = parameters(config, tensor_table(config))
    assert round(counted["total"] / 1e9, 2) == total
    assert round(counted["active"] / 1e9, 2) == active


def test_resident_bytes_of_a_release() -> None:
    """Packed bytes as stored, the 3.2 GB of plain weights doubled by float32 (facts, section 2)."""
    table = tensor_table(ModelConfig.preset("v4-flash"))
    stored = hub.resident_bytes(table, plain=2)
    assert stored < hub.resident_bytes(table, plain=4) < stored + 3.3e9


def test_show(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, "release")
    tensors = random_tensors(config, seed)
    facts = show(write_checkpoint(tmp_path / "model", config, tensors))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["weight_bytes"]["total"] == sum(t.nbytes for t in tensors.values())
    assert facts["weight_bytes"]["F8_E8M0"] > 0
    counted = sum(t.numel() for n, t in values(tensors).items() if "tid2eid" not in n)
    assert facts["parameters"]["total"] + facts["parameters"]["mtp"] == counted
    assert facts["parameters"]["active"] < facts["parameters"]["total"]
    layers = facts["layers"]
    assert layers["sliding"] + layers["csa"] + layers["hca"] == layers["total"]
    assert facts["cache"]["release"]["bytes_per_token"] > 0
    assert facts["manifest"] is True


def test_large_checkpoints_are_read_when_asked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert open_checkpoint(tiny, cache=cache)[1] is Verified.FULL
    assert not cache.exists(), "a small checkpoint is always read, so there is nothing to remember"
    monkeypatch.setattr(manifest, "FULL_CHECK_BYTES", 0)
    assert open_checkpoint(tiny, cache=cache)[1] is Verified.HEADERS
    calls: list[tuple[int, int]] = []
    first = open_checkpoint(tiny, cache=cache, verify=True, progress=lambda *at: calls.append(at))
    assert first[1] is Verified.FULL
    assert calls[-1][0] == calls[-1][1] == (tiny / "model.safetensors").stat().st_size
    assert open_checkpoint(tiny, cache=cache)[1] is Verified.REMEMBERED
    assert open_checkpoint(tiny, cache=cache, verify=False)[1] is Verified.HEADERS
    (tiny / "model.safetensors").touch()
    assert open_checkpoint(tiny, cache=cache)[1] is Verified.HEADERS
    assert verify(tiny, cache=cache).ok
    assert open_checkpoint(tiny, cache=cache)[1] is Verified.REMEMBERED
    (cache / "verified.json").write_text("[")
    assert open_checkpoint(tiny, cache=cache)[1] is Verified.HEADERS
    assert open_checkpoint(tiny, cache=cache, verify=True)[1] is Verified.FULL
    write_manifest(tiny)
    assert open_checkpoint(tiny, cache=cache)[1] is Verified.REMEMBERED


def test_damage_of_a_large_checkpoint_is_not_converted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new manifest would vouch for it."""
    monkeypatch.setattr(manifest, "FULL_CHECK_BYTES", 0)
    monkeypatch.setattr(manifest.platformdirs, "user_cache_dir", lambda *_: str(tmp_path / "c"))
    convert(tiny, tmp_path / "sound", "f32")
    path = tiny / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with pytest.raises(Damaged):
        convert(tiny, tmp_path / "other", "f32")
    assert not (tmp_path / "other").exists()


def test_a_folder_is_filled_where_a_link_leads(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    convert(tiny, tmp_path / "link", "f32")
    assert (tmp_path / "large" / "config.json").exists() and (tmp_path / "link").is_symlink()


def test_a_mounted_disk_is_refused_before_hours_of_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(CheckpointError, match="where a disk is mounted"):
        convert(tiny, tmp_path / "disk", "f32")
    convert(tiny, tmp_path / "disk" / "model", "f32")


def test_verify_needs_a_manifest_when_asked(tiny: Path, tmp_path: Path) -> None:
    (tiny / manifest.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="cannot be verified"):
        load(tiny, verify=True)
    report = verify(tiny, cache=tmp_path)
    assert report.ok and not report.has_manifest


# Where a checkpoint is.


def test_locate(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(tiny) == tiny
    assert locate(str(tiny)) == tiny
    for nothing in (tmp_path / "none", "none", "../none", "a/b/c", "org/", ""):
        with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
            locate(nothing)
    package = tmp_path / "package"
    monkeypatch.setattr("overleap.checkpoint.hub._PACKAGE", package)
    with pytest.raises(CheckpointError, match="bundled"):
        locate("mini")
    (package / "bundled" / "mini").mkdir(parents=True)
    assert locate("mini") == locate("bundled") == package / "bundled" / "mini"


class FakeHub:
    """The two functions of huggingface_hub that are used, over a folder."""

    def __init__(self, source: Path, cached: bool) -> None:
        self.source, self.cached = source, cached
        self.downloads: list[str] = []
        self.files: list[str] = []  # fetched, in order; "*" for what a snapshot has

    def snapshot_download(self, hub_id: str, **how: Any) -> Any:
        if how.get("local_files_only"):
            if self.cached:
                return str(self.source)
            raise LocalEntryNotFoundError("not in the cache")
        if how.get("dry_run"):
            return [
                SimpleNamespace(
                    filename=path.name,
                    file_size=path.stat().st_size,
                    will_download=not self.cached,
                    commit_hash="0123456789abcdef",
                )
                for path in self.source.iterdir()
            ]
        assert how["revision"] == "0123456789abcdef", "what was announced is what is fetched"
        assert "*.safetensors" in how["allow_patterns"]
        self.downloads.append(hub_id)
        self.files.append("*")
        return str(self.source)

    def hf_hub_download(self, hub_id: str, filename: str, **how: Any) -> str:
        assert filename in ("config.json", "encoding/encoding_dsv4.py")
        assert how["revision"] == "0123456789abcdef"
        if not (self.source / filename).is_file():
            raise RemoteEntryNotFoundError(filename, response=MagicMock())
        self.files.append(filename)
        return str(self.source / filename)


@pytest.fixture
def fake(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tiny, cached=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def test_hub_says_the_sizes_before_it_fetches(
    fake: FakeHub,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**33))
    size = sum(path.stat().st_size for path in tiny.iterdir())
    said: list[hub.Preflight] = []

    def announce(needed: hub.Preflight) -> None:
        assert not fake.downloads
        said.append(needed)

    assert locate("org/name", announce) == tiny
    assert fake.downloads == ["org/name"]
    (needed,) = said
    assert needed.download == needed.total == size and needed.files == len(list(tiny.iterdir()))
    assert needed.ram == sum(t.nbytes for t in read(tiny).values())
    assert needed == preflight("org/name") and needed.disk_free == 2**33
    locate("org/name")
    written = capsys.readouterr()
    assert written.out == "" and "to download" in written.err and "RAM" in written.err
    fake.cached = True
    assert locate("org/name", announce) == tiny
    assert len(said) == 1, "a complete copy in the cache needs no network"


def test_the_encoder_of_a_repository_is_fetched_as_a_text(fake: FakeHub, tiny: Path) -> None:
    """That file alone knows its effort table, where the name tells nothing."""
    (tiny / "encoding").mkdir()
    (tiny / "encoding" / "encoding_dsv4.py").write_text("REASONING_EFFORT_PROMPTS = {}\n")
    assert locate("org/name", lambda _: None) == tiny
    # Before the rest, because what has all of the weights is not fetched again.
    assert fake.files == ["config.json", "encoding/encoding_dsv4.py", "*"]


def test_hub_refuses_when_the_disk_is_too_small(
    fake: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match="1000 B is free"):
        locate("org/name", lambda _: None)
    assert not fake.downloads


def test_hub_refuses_other_repositories(fake: FakeHub, tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json with \*.safetensors"):
        preflight("org/name")


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, with its offline switch on (see conftest) and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="org/name is not in the cache"):
        load("org/name")


def test_hub_cache_is_used_offline(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny, repository / "snapshots" / commit)
    assert locate("org/name") == repository / "snapshots" / commit
    # A download that was interrupted: the library returns the folder, the weights are not there.
    (repository / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="org/name is not in the cache"):
        locate("org/name")


def test_random_configs_cover_every_kind() -> None:
    """The helper that other tests build on: both routings, all kinds, YaRN on and off."""
    configs = [tiny_config(random.randrange(2**31), form) for form in FORMS for _ in range(20)]
    assert all(len(set(config.layer_kinds)) == 3 for config in configs)
    assert all(0 < config.num_hash_layers < config.num_hidden_layers for config in configs)
    assert {config.rope_scaling is None for config in configs} == {True, False}
    assert tiny_config(7) == tiny_config(7) != tiny_config(8)
