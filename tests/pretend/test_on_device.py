"""What the package does on the pretend device. Skipped but in the process that has it: see
../test_pretend_device.py."""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from overleap import devices
from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache
from overleap.checkpoint import load, placing
from overleap.checkpoint.folder import Checkpoint
from overleap.checkpoint.placing import SPARE_BYTES, is_routed, tensor_bytes
from overleap.cli import app
from overleap.cli.room import Room, open_front
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.errors import BackendError, CapacityError, RequestError
from overleap.kernels import select, table
from overleap.kernels.conformance import Ceilings, Rate, conform
from overleap.kernels.spec import COARSE, OP_NAMES, Ops
from tests import pretend
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.oracles import where
from tests.oracles.running import build, draw_ids, feed, room, start
from tests.oracles.steady import Steady

if where.DEVICE.type != pretend.NAME:
    pytest.skip("not in a process with the pretend device", allow_module_level=True)


def test_it_is_told_apart_from_the_host() -> None:
    x = torch.ones(3, 4, device=where.DEVICE)
    with pytest.raises(RuntimeError, match=r"cpu|same device"):
        _ = x + torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"on cpu, others are on pretend"):
        _ = x[torch.tensor([0, 2])]
    view = x.view(2, 6)[1]
    view.fill_(7)
    assert x.cpu().tolist() == [[1] * 4, [1, 1, 7, 7], [7] * 4]
    came, left = pretend.crossings()
    _ = (x.to(where.DEVICE) @ x.t()).cpu()
    assert pretend.crossings() == (came, left + 36)


def test_the_table_serves_a_device_that_is_not_in_it() -> None:
    assert devices.find("pretend") == where.DEVICE
    assert devices.kind_of(where.DEVICE).group == "gloo"
    before = devices.free_bytes(where.DEVICE)
    kept = torch.ones(1 << 20, device=where.DEVICE)
    after = devices.free_bytes(where.DEVICE)
    assert before is not None and after == before - kept.nbytes
    devices.synchronise(where.DEVICE)
    assert 0 < devices.seconds(lambda: torch.ones(1 << 20, device=where.DEVICE), where.DEVICE) < 10


def test_every_op_conforms(seed: int) -> None:
    verdicts = conform(select("auto", pretend.NAME), where.DEVICE, seed=seed, enough_s=0.5)
    assert {v.op for v in verdicts} == set(OP_NAMES)
    assert [(v.op, v.case, v.error, v.reason) for v in verdicts if not v.passed] == []


def test_no_backend_is_made_for_it() -> None:
    served = {row.op: row.backend for row in table("auto", pretend.NAME)}
    assert set(served.values()) == {"torch", "fine ops"}
    assert {op for op, who in served.items() if who != "torch"} == set(COARSE)
    with pytest.raises(BackendError, match="run on a CPU"):
        select("cpu", pretend.NAME)


@pytest.mark.parametrize("form", ["f32", "release"])
def test_a_step_crosses_with_numbers_only(form: str, seed: int) -> None:
    """To the device go ids, positions and pages; back come how many tokens each expert has, and
    nothing that is as wide as the model."""
    config = tiny_config(seed, form)
    model = build(config, random_tensors(config, seed))
    ids = draw_ids(config, 200, torch.Generator().manual_seed(seed))
    cache = room(config, 220, CacheFormat.RELEASE, slots=1)
    sequence = start(cache, 220)
    with torch.no_grad():
        for count in (199, 1):
            came, left = pretend.crossings()
            feed(model, cache, sequence, ids[sequence.length : sequence.length + count])
            now_came, now_left = pretend.crossings()
            layers = len(config.all_kinds)
            assert now_left - left <= layers * 8 * (config.n_routed_experts + 2)
            # 8 bytes a token for each of: id, position, slot; page and entry numbers; tables.
            assert now_came - came <= layers * (8 * 40 * count + 4096)


def test_the_bundled_model_answers_as_on_the_host() -> None:
    prompt = [7, 11, 13, 17, 19, 23, 29, 31] * 40
    answers = []
    for device in (pretend.NAME, "cpu"):
        model = load("mini", device=device, backend="torch")
        assert model.device.type == device
        engine = Engine(model, memory_bytes=64 << 20, chunk_tokens=100)
        sampling = Sampling(temperature=0, max_tokens=12, stop_ids=())
        answers.append(
            [t.id for t in engine.generate(Request(prompt=prompt, sampling=sampling)).tokens]
        )
    assert answers[0] == answers[1] and len(answers[0]) == 12


def with_host(backend: str, wanted: str, kind: str) -> Ops:
    return select(backend if kind == "cpu" else wanted, kind)


# Logits may be apart by a share of the largest: sums in another order. Packed linears round their
# inputs, so that a value within an ulp of the middle between two codes may fall to either side, and
# what follows in its text differs by a code: not under Steady, not with plain weights.
HOSTS = {("torch", "release"): 1e-4, ("cpu", "f32"): 1e-4, ("cpu", "release"): 0.3}


@pytest.mark.parametrize(("backend", "form"), HOSTS)
def test_experts_stay_on_the_host_where_the_device_is_small(
    backend: str, form: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else on the device; logits as of the model that is on the host throughout."""
    config = tiny_config(seed, form)
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config, seed))
    checkpoint = Checkpoint(folder)
    sizes = tensor_bytes(checkpoint, torch.float32, False)
    routed = sum(count for name, count in sizes.items() if is_routed(name))
    free = [sum(sizes.values()) - routed // 2 + SPARE_BYTES]
    monkeypatch.setattr(placing, "free_bytes", lambda device: free[0])
    try:
        select(backend, "cpu")
    except BackendError as error:
        pytest.skip(str(error))
    # `auto` on the host is its native kernels; without them, the definition.
    chosen = partial(with_host, backend)
    monkeypatch.setattr(sys.modules["overleap.checkpoint.load"], "select", chosen)
    model = load(folder, device=pretend.NAME, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == ("cpu" if is_routed(name) else pretend.NAME), name
    held = sum(p.nbytes for n, p in model.named_parameters() if not is_routed(n))
    assert held == sum(sizes.values()) - routed
    generator = torch.Generator().manual_seed(seed)
    host, found = load(folder, dtype=torch.float32), []
    for _ in range(15):
        ids = draw_ids(config, 12, generator)
        cache = room(config, 12, CacheFormat.WIDE, slots=1)
        with torch.no_grad(), Steady():
            ours = feed(model, cache, start(cache, 12), ids, 5)
            cache = Cache(config, pages=1, slots=1, format=CacheFormat.WIDE)
            theirs = feed(host, cache, start(cache, 12), ids, 5)
        found.append((ours.cpu() - theirs).abs().amax(1) / theirs.abs().max())
    by_position = torch.cat(found)
    print(f"median {by_position.median():.1e}, largest {by_position.max():.1e}")
    assert by_position.max() <= HOSTS[backend, form]
    assert by_position.median() <= 1e-4, "most texts of a few tokens meet no such value"
    free[0] = 10**12
    model = load(folder, device=pretend.NAME, dtype=torch.float32)
    assert {p.device.type for p in model.parameters()} == {pretend.NAME}
    free[0] = SPARE_BYTES
    with pytest.raises(CapacityError, match="without its routed experts the model needs"):
        load(folder, device=pretend.NAME, dtype=torch.float32)


def told(*command: str) -> tuple[dict[str, Any], str]:
    """What a command printed as JSON, and what it said beside it."""
    done = CliRunner().invoke(app, [*command, "--device", pretend.NAME, "--json"])
    assert done.exception is None, done.exception
    return json.loads(done.stdout), done.stderr


def test_a_command_reads_and_answers_on_it(seed: int) -> None:
    came, _ = pretend.crossings()
    found, said = told("demo", "--tokens", "600", "--facts", "2", "--seed", str(seed), "--verify")
    assert found["verified"]["tokens"] > 0
    assert found["predicted_peak_bytes"] > found["cache_bytes"]
    assert "predicted peak memory of pretend " in said and "on the host" not in said
    assert pretend.crossings()[0] - came > open_front("mini").weight_bytes / 2


def test_a_command_leaves_experts_on_the_host_where_memory_is_scarce(seed: int) -> None:
    """--memory bounds the device; what the run takes beside the weights is known before."""
    front = open_front("mini")
    config, context = front.config, 700
    beside = Room(CacheFormat.RELEASE, None, False).beside(config, context, slots=2)
    sizes = tensor_bytes(Checkpoint(front.folder), torch.bfloat16, False)
    routed = sum(count for name, count in sizes.items() if is_routed(name))
    least = beside + sum(sizes.values()) - routed
    prompt = " ".join(["def"] * 500)
    asked = ("generate", prompt, "--max-tokens", "5", "--temperature", "0", "--memory")
    whole, said = told(*asked, str(least + routed))
    assert "on the host" not in said
    parts, said = told(*asked, str(least + routed // 2))
    assert re.search(r"; on the host [\d.]+ MiB for [\d.]+ MiB of experts", said)
    assert parts["usage"]["generated_tokens"] == whole["usage"]["generated_tokens"] == 5
    assert parts["text"] == whole["text"] != ""
    refused = CliRunner().invoke(app, [*asked, str(least // 2), "--device", pretend.NAME])
    assert isinstance(refused.exception, CapacityError)
    assert "on pretend" in refused.exception.message


def test_speed_is_measured_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Rate(1e10, "")  # a real device multiplies 8,192 x 8,192 in no time
    light = Ceilings(pretend.NAME, 1, rate, rate, None, None)
    monkeypatch.setattr("overleap.kernels.conformance.ceilings.ceilings", lambda device: light)
    short = ("--threads", "1", "--results", str(tmp_path))
    record, _ = told("bench", "random", "--depth", "300", "--decode", "2", *short)
    assert record["settings"]["device"] == pretend.NAME
    assert record["numbers"][0]["prefill_s"] > 0
    assert record["numbers"][0]["peak_process_bytes"] is None
    record, _ = told("bench", "--geometry", "v4-flash", "--context", "2048", *short)
    assert {row.get("part") for row in record["numbers"]} > {"index scan (CSA)", None}
    refused = CliRunner().invoke(
        app, ["bench", "--versus", "transformers", "--device", pretend.NAME, *short]
    )
    assert isinstance(refused.exception, RequestError)


def test_steps_run_with_their_device_as_the_current_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches kernels on the current device: on a second one that must be the second."""
    seen: list[int | None] = []
    own = torch.accelerator.device_index

    def noted(index: int | None) -> Any:
        seen.append(index)
        return own(index)

    monkeypatch.setattr(torch.accelerator, "device_index", noted)
    config = tiny_config(seed)
    model = build(config, random_tensors(config, seed))
    cache = room(config, 9, CacheFormat.WIDE)
    feed(model, cache, start(cache, 9), [1, 2, 3])
    conform(model.ops, where.DEVICE, seed=seed, only=["hadamard"], enough_s=0)
    assert seen == [0, None]  # tensors of a device know its number
