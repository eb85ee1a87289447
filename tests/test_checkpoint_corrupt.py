"""Damaged checkpoints: truncated, edited, renamed, flipped. Refused with file, tensor and reason.

200 random damages with a manifest, where nothing may load in silence; then, without one, all that
names, shapes and headers can tell. Read next: overleap/checkpoint/manifest.py.
"""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overleap.checkpoint import Checkpoint, Damaged, load, manifest, verify
from overleap.checkpoint.files import read_header
from overleap.errors import CheckpointError, ConfigError, OverleapError
from tests.checkpoints import FORMS, random_tensors, rewrite, tiny_config, write_checkpoint

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Damage:
    """What was done: the file, the tensor where one is meant, and words for the test's output."""

    file: str
    tensor: str | None
    what: str


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, read without the code under test."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def some_shard(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def some_tensor(header: dict[str, Any], draw: random.Random) -> str:
    return draw.choice([name for name in header if name != "__metadata__"])


def truncate(folder: Path, draw: random.Random) -> Damage:
    path = some_shard(folder, draw)
    header, data = split(path)
    size = path.stat().st_size
    start = size - len(data)
    keep = draw.randrange(size)
    path.write_bytes(path.read_bytes()[:keep])
    if keep < start:
        return Damage(path.name, None, f"cut within its header at {keep}")
    del header["__metadata__"]
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    tensor = next(name for name in order if start + header[name]["data_offsets"][1] > keep)
    return Damage(path.name, tensor, f"cut at {keep} of {size}")


def grow(folder: Path, draw: random.Random) -> Damage:
    path = some_shard(folder, draw)
    path.write_bytes(path.read_bytes() + bytes(draw.randrange(1, 9)))
    return Damage(path.name, None, "bytes after the end")


def flip_data(folder: Path, draw: random.Random) -> Damage:
    path = some_shard(folder, draw)
    header, data = split(path)
    at = draw.randrange(len(data))
    changed = bytearray(path.read_bytes())
    changed[len(changed) - len(data) + at] ^= 1 << draw.randrange(8)
    path.write_bytes(changed)
    del header["__metadata__"]
    ranges = {name: entry["data_offsets"] for name, entry in header.items()}
    tensor = next(name for name, (start, end) in ranges.items() if start <= at < end)
    return Damage(path.name, tensor, f"a bit of data byte {at}")


def flip_header(folder: Path, draw: random.Random) -> Damage:
    path = some_shard(folder, draw)
    changed = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", changed[:8])
    at = draw.randrange(8 + length)
    changed[at] ^= 1 << draw.randrange(8)
    path.write_bytes(changed)
    return Damage(path.name, None, f"a bit of header byte {at}")


def change_dtype(folder: Path, draw: random.Random) -> Damage:
    """Another type of the same width, so that the header stays consistent in itself."""
    path = some_shard(folder, draw)
    header, data = split(path)
    name = some_tensor(header, draw)
    twins = [{"F32", "I32"}, {"F8_E4M3", "I8", "U8", "F8_E8M0"}, {"BF16", "F16"}]
    old = header[name]["dtype"]
    header[name]["dtype"] = draw.choice(sorted(next(t for t in twins if old in t) - {old}))
    join(path, header, data)
    return Damage(path.name, name, f"{old} called {header[name]['dtype']}")


def change_shape(folder: Path, draw: random.Random) -> Damage:
    """The same number of elements in another shape, or another number."""
    path = some_shard(folder, draw)
    header, data = split(path)
    name = some_tensor(header, draw)
    shape = header[name]["shape"]
    choices = [[*shape, 1], [1, *shape], [*shape[:-1], shape[-1] + 1], shape[:-1], [0]]
    choices += [shape[::-1]] if shape[::-1] != shape else []
    new = draw.choice([shape_ for shape_ in choices if shape_ != shape])
    header[name]["shape"] = new
    join(path, header, data)
    return Damage(path.name, name, f"shape {shape} called {new}")


def move_offsets(folder: Path, draw: random.Random) -> Damage:
    path = some_shard(folder, draw)
    header, data = split(path)
    name = some_tensor(header, draw)
    header[name]["data_offsets"][draw.randrange(2)] += draw.choice([-4, -1, 1, 4, 2**40])
    join(path, header, data)
    return Damage(path.name, None, f"offsets of {name}")


def swap_names(folder: Path, draw: random.Random) -> Damage:
    """Two tensors change places; with equal shapes only the digests can tell."""
    path = some_shard(folder, draw)
    header, data = split(path)
    pairs = [
        (a, b)
        for a in header
        for b in header
        if a < b
        and a != "__metadata__"
        and b != "__metadata__"
        and header[a]["dtype"] == header[b]["dtype"]
        and header[a]["shape"] == header[b]["shape"]
    ]
    if not pairs:
        return rename(folder, draw)
    a, b = draw.choice(pairs)
    header[a], header[b] = header[b], header[a]
    join(path, header, data)
    return Damage(path.name, None, f"{a} and {b} exchanged")


def rename(folder: Path, draw: random.Random) -> Damage:
    path = some_shard(folder, draw)
    header, data = split(path)
    name = some_tensor(header, draw)
    at = draw.randrange(len(name))
    new = name[:at] + draw.choice("_x9") + name[at:]
    join(path, {new if key == name else key: entry for key, entry in header.items()}, data)
    return Damage(path.name, None, f"{name} called {new}")


def drop(folder: Path, draw: random.Random) -> Damage:
    """Take a tensor out, with its bytes, so that the file is sound in itself."""
    path = some_shard(folder, draw)
    header, data = split(path)
    name = some_tensor(header, draw)
    start, end = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    join(path, header, data[:start] + data[end:])
    return Damage(path.name, name, "taken out")


def edit_json(folder: Path, draw: random.Random) -> Damage:
    """One bit of config.json, the index or the manifest."""
    path = draw.choice(sorted(folder.glob("*.json")))
    changed = bytearray(path.read_bytes())
    at = draw.randrange(len(changed) - 1)  # not the final line feed, which means nothing
    changed[at] ^= 1 << draw.randrange(8)
    path.write_bytes(changed)
    return Damage(path.name, None, f"a bit of byte {at}")


def lose_file(folder: Path, draw: random.Random) -> Damage:
    files = [path for path in sorted(folder.iterdir()) if path.name != manifest.MANIFEST]
    path = draw.choice(files)
    path.unlink()
    return Damage(path.name, None, "removed")


DAMAGES = [
    truncate,
    grow,
    flip_data,
    flip_data,
    flip_header,
    change_dtype,
    change_shape,
    move_offsets,
    swap_names,
    rename,
    drop,
    edit_json,
    lose_file,
]


def sound(folder: Path, seed: int, form: str) -> Path:
    config = tiny_config(seed, form)
    limit = 100_000 if seed % 2 else 2**30
    write_checkpoint(folder, config, random_tensors(config, seed), limit)
    load(folder)
    return folder


def refusal_of(call: Callable[[], object]) -> OverleapError:
    with pytest.raises(OverleapError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("form", FORMS)
def test_fifty_damages_are_refused(form: str, seed: int, tmp_path: Path) -> None:
    """Four forms make 200. Both `verify` and `load` refuse, and say which file and tensor."""
    draw = random.Random(seed)
    original = sound(tmp_path / "sound", seed, form)
    for turn in range(50):
        folder = tmp_path / f"turn{turn}"
        shutil.copytree(original, folder)
        damage = draw.choice(DAMAGES)(folder, draw)
        try:
            report = verify(folder, cache=tmp_path)
            error = refusal_of(lambda at=folder: load(at))  # type: ignore[misc]
        except BaseException:
            print(turn, damage)
            raise
        assert not report.ok, damage
        named = {(problem.file, problem.tensor) for problem in report.problems}
        assert damage.file in {file for file, _ in named}, (damage, report.problems)
        assert all(problem.reason for problem in report.problems)
        if damage.tensor is not None:
            assert damage.tensor in {tensor for _, tensor in named}, (damage, report.problems)
            assert damage.tensor in error.message, (damage, error)
        assert isinstance(error, CheckpointError), (damage, error)
        shutil.rmtree(folder)


@pytest.mark.parametrize("form", FORMS)
def test_every_flipped_bit_is_found(form: str, seed: int, tmp_path: Path) -> None:
    """Bits of the data alone: the damage that the safetensors library never sees."""
    draw = random.Random(seed)
    folder = sound(tmp_path / "sound", seed, form)
    for _ in range(10):
        saved = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
        damage = flip_data(folder, draw)
        (problem,) = verify(folder, cache=tmp_path).problems
        assert (problem.file, problem.tensor) == (damage.file, damage.tensor)
        assert damage.tensor is not None and damage.tensor in str(refusal_of(lambda: load(folder)))
        load_file(folder / damage.file)  # no complaint
        for path, raw in saved.items():
            path.write_bytes(raw)


# Without a manifest: everything but the values is still held against config.json.


@pytest.fixture
def bare(seed: int, tmp_path: Path) -> Path:
    """A tiny checkpoint in one file, without a manifest."""
    config = tiny_config(seed)
    folder = write_checkpoint(tmp_path / "bare", config, random_tensors(config, seed))
    (folder / manifest.MANIFEST).unlink()
    return folder


@pytest.mark.parametrize(
    "damage", [truncate, grow, change_dtype, change_shape, move_offsets, rename, drop]
)
def test_structure_needs_no_manifest(
    damage: Callable[[Path, random.Random], Damage], bare: Path, seed: int, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    raw = (bare / "model.safetensors").read_bytes()
    for _ in range(10):
        done = damage(bare, draw)
        error = refusal_of(lambda: load(bare))
        assert isinstance(error, CheckpointError)
        assert done.file in error.message or "checkpoint" in error.message, (done, error)
        assert not verify(bare, cache=tmp_path).ok
        (bare / "model.safetensors").write_bytes(raw)


def test_header_bits_never_crash_the_reader(bare: Path, seed: int) -> None:
    """Random bytes in a header give Damaged or a header, never another exception."""
    draw = random.Random(seed)
    path = bare / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    refused = 0
    for _ in range(400):
        changed = bytearray(raw)
        for _ in range(draw.choice([1, 1, 2, 8])):
            changed[draw.randrange(8 + length)] = draw.choice(b'{}[]",:0019-e \x00\xff\xed')
        path.write_bytes(changed)
        try:
            header = read_header(path)
        except Damaged as error:
            assert error.problems[0].file == path.name
            refused += 1
        else:
            spans = sorted((t.start, t.end) for t in header.tensors.values())
            assert spans[-1][1] == len(changed)
    assert refused > 100


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "does not start with"),
        (b"[]", "does not start with"),
        (b' {"a":1}', "does not start with"),
        (b"{", "is not JSON"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":{},"a":{}}', "'a' occurs twice"),
        (b'{"\xff":1}', "is not JSON"),
        (b'{"a":' + b"[" * 100_000, "is not JSON"),
        (b'{"a":' + b"1" * 10_000 + b"}", "is not JSON"),
        (b'{"__metadata__":[]}', "__metadata__"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b'{"a":3}', "a: needs dtype, shape and data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[1]}}', "a: needs dtype"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"b":1}}', "a: needs dtype"),
        (b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', "a: has the type 'F4'"),
        (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "a: has the type"),
        (b'{"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}', "a: has the shape"),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "a: has the shape"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "a: has the shape"),
        (b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "a: has the shape"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', "a: has the data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}}', "a: has the data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', "a: takes -4 bytes"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "a: takes 4 bytes"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "a: ends at byte"),
        (b'{"a":{"dtype":"I8","shape":[3],"data_offsets":[1,4]}}', "a: leaves a gap"),
        (b'{"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}}', "has 1 bytes after"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"I8","shape":[2],"data_offsets":[2,4]}}',
            "b: overlaps the tensor before it",
        ),
        (b'{"a\\n\\u001b[2J":3}', re.escape(r"'a\n\x1b[2J': needs dtype")),
    ],
)
def test_headers_that_break_a_rule(header: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    join(path, header, b"\0\0\0\0")
    with pytest.raises(Damaged, match=f"model.safetensors: .*{reason}"):
        read_header(path)


@pytest.mark.parametrize(
    "raw", [b"", b"\1", struct.pack("<Q", 2**63), struct.pack("<Q", 3) + b"{}"]
)
def test_files_without_room_for_a_header(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(Damaged, match=r"model\.safetensors"):
        read_header(path)


def test_misnamed_missing_extra_are_told_apart(bare: Path) -> None:
    path = bare / "model.safetensors"
    tensors = load_file(path)
    wrong = dict(tensors)
    wrong["layers.1.attn.wq_a.wieght"] = wrong.pop("layers.1.attn.wq_a.weight")
    wrong["lm_head.bias"] = torch.zeros(4)
    del wrong["norm.weight"]
    wrong["embed.weight"] = wrong["embed.weight"][:-1].clone()
    wrong["head.weight"] = wrong["head.weight"].to(torch.int32)
    rewrite(path, wrong)
    with pytest.raises(Damaged, match=r"and 4 more problems") as caught:
        Checkpoint(bare)
    said = {problem.tensor: problem.reason for problem in caught.value.problems}
    assert "did you mean layers.1.attn.wq_a.weight?" in said["layers.1.attn.wq_a.wieght"]
    assert said["lm_head.bias"] == "is not part of this model"
    assert said["norm.weight"] == "is missing"
    assert "has shape" in said["embed.weight"] and "stored as I32" in said["head.weight"]
    assert all(problem.file == path.name for problem in caught.value.problems)


def test_missing_mtp_layers_come_with_a_way_out(bare: Path) -> None:
    path = bare / "model.safetensors"
    rewrite(path, {n: t for n, t in load_file(path).items() if not n.startswith("mtp.")})
    assert "num_nextn_predict_layers 0" in str(refusal_of(lambda: load(bare)))


def test_a_routing_table_out_of_range_is_refused(bare: Path) -> None:
    path = bare / "model.safetensors"
    tensors = load_file(path)
    name = "layers.0.ffn.gate.tid2eid"
    tensors[name][3, 0] = 1000
    rewrite(path, tensors)
    with pytest.raises(Damaged, match=f"{name}: holds experts 0..1000"):
        load(bare)


def test_a_config_of_endless_experts_is_refused(bare: Path) -> None:
    path = bare / "config.json"
    raw = json.loads(path.read_text()) | {"n_routed_experts": 10**12}
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="experts in all"):
        load(bare)


# Folders and indexes.


@pytest.fixture
def sharded(seed: int, tmp_path: Path) -> Path:
    """A checkpoint of several shards, without a manifest."""
    config = tiny_config(seed)
    folder = write_checkpoint(tmp_path / "s", config, random_tensors(config, seed), 100_000)
    (folder / manifest.MANIFEST).unlink()
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "model.bin",
        "model.safetensors\n",
        "a\\b.safetensors",
        "model.safetensors/",
        "~.safetensors",
        "mødel.safetensors",
        None,
        7,
        ["model.safetensors"],
    ],
)
def test_shard_names_are_plain_file_names(name: object, sharded: Path) -> None:
    edit_index(sharded, lambda where: where.update({"norm.weight": name}))
    with pytest.raises(Damaged, match=f"{re.escape(INDEX)}: norm.weight: is said to be in"):
        Checkpoint(sharded)


def test_an_index_that_does_not_fit_its_shards(sharded: Path) -> None:
    raw = (sharded / INDEX).read_bytes()
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    first, last = files[0], files[-1]
    lone = next(n for f in files if len(t := load_file(sharded / f)) > 1 and f != last for n in t)
    home = json.loads(raw)["weight_map"][lone]
    cases: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda where: where.pop(lone), f"{home}: {lone}: is not in"),
        (lambda where: where.update({"a.weight": first}), "a.weight: is said .* no file has it"),
        (lambda where: where.update({lone: last}), f"{lone}: is said .* it is in {home}"),
        (lambda where: where.update({"a": "b.safetensors"}), "b.safetensors: a: the file is mis"),
        (lambda where: where.clear(), "has no weight_map"),
    ]
    for change, reason in cases:
        edit_index(sharded, change)
        with pytest.raises(Damaged, match=reason):
            Checkpoint(sharded)
        (sharded / INDEX).write_bytes(raw)
    Checkpoint(sharded)
    (sharded / INDEX).write_text('{"weight_map": [], "weight_map": {}}')
    with pytest.raises(Damaged, match="occurs twice"):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(files[0])))
    tensors = load_file(files[1])
    rewrite(files[1], tensors | {name: load_file(files[0])[name]})
    with pytest.raises(Damaged, match=f"{files[1].name}: {name}: is also in {files[0].name}"):
        Checkpoint(sharded)


def test_folders_that_are_none(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors").write_bytes(b"")
    with pytest.raises(Damaged, match=r"stands beside model\.safetensors"):
        Checkpoint(sharded)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(sharded / "config.json", empty)
    with pytest.raises(Damaged, match=r"has neither model\.safetensors nor"):
        Checkpoint(empty)
    with pytest.raises(OverleapError, match=r"config\.json does not exist"):
        Checkpoint(tmp_path / "nothing")
    assert not verify(tmp_path / "nothing", cache=tmp_path).ok


# The manifest itself.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("[]", "is not of the format"),
        ("{}", "is not of the format"),
        ('{"format": "overleap.manifest/2"}', "is not of the format"),
        ('{"format": "overleap.manifest/1"}', "does not match its own digest"),
        ('{"format": "overleap.manifest/1", "digest": "00"}', "does not match its own digest"),
    ],
)
def test_a_damaged_manifest_is_no_manifest(text: str, reason: str, bare: Path) -> None:
    (bare / manifest.MANIFEST).write_text(text)
    with pytest.raises(Damaged, match=f"{re.escape(manifest.MANIFEST)}: {reason}"):
        load(bare)
    assert not verify(bare).ok


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"../a": {"size": 1, "digest": ""}}, "names a file outside its folder"),
        ({"a": {"size": 1}}, "has a file entry of another form"),
        ([], "has a file entry of another form"),
        ({"a": {"size": 1, "digest": "", "tensors": {"b": 1}}}, "has a file entry of another form"),
    ],
)
def test_a_forged_manifest_is_refused(files: Any, reason: str, bare: Path) -> None:
    """Its own digest can be made by anyone: it is against accidents, so the rest is checked too."""
    body = {"format": manifest.FORMAT, "files": files}
    body["digest"] = manifest._digest_of(body)
    (bare / manifest.MANIFEST).write_text(json.dumps(body))
    with pytest.raises(Damaged, match=reason):
        load(bare)


def test_files_that_the_manifest_does_not_know(tmp_path: Path, seed: int) -> None:
    folder = sound(tmp_path / "sound", 2 * (seed // 2), "f32")
    (folder / "notes.txt").write_text("not read by anything")
    load(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    error = refusal_of(lambda: load(folder))
    assert "tokenizer_config.json: is not in overleap.manifest.json" in error.message
    assert error.hint is not None and "make a new manifest" in error.hint


def test_a_manifest_does_not_vouch_for_damage(bare: Path) -> None:
    truncate(bare, random.Random(1))
    with pytest.raises(Damaged):
        manifest.write_manifest(bare)
    assert not (bare / manifest.MANIFEST).exists()
