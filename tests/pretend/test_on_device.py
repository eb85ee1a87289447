"""What the package does on the pretend device. Skipped but in the process that has it: see
../test_pretend_device.py."""

import pytest
import torch

from overleap import devices
from overleap.cache.layout import CacheFormat
from overleap.checkpoint import load
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.errors import BackendError
from overleap.kernels import select, table
from overleap.kernels.conformance import conform
from overleap.kernels.spec import COARSE, OP_NAMES
from tests import pretend
from tests.checkpoints import random_tensors, tiny_config
from tests.oracles import where
from tests.oracles.running import build, draw_ids, feed, room, start

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
