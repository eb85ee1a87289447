"""The table of devices: what is there, what is not, and that nothing is imported unasked."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from overleap import devices, machine
from overleap.devices import CPU, KINDS
from overleap.errors import BackendError
from tests import pretend

ROOT = Path(__file__).resolve().parents[1]


class Chip:
    """What torch knows of a device that is not here: two of a kind, 3 GiB free on the second."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 2

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "Chip 3000"

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return (3 << 30, 8 << 30) if torch.device(device).index == 1 else (0, 8 << 30)


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package torch_npu, and a module of torch for its devices."""
    (tmp_path / "torch_npu.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: Chip)
    monkeypatch.setattr(torch, "device", Name)


class Name:
    """A torch.device for a type that this build of torch does not know."""

    def __init__(self, text: Any) -> None:
        self.text = str(text)
        self.type, _, number = self.text.partition(":")
        self.index = int(number) if number else None

    def __str__(self) -> str:
        return self.text


def test_a_cpu_is_always_there() -> None:
    assert devices.find("cpu") == torch.device("cpu")
    assert devices.kind_of(torch.device("cpu")) is CPU
    assert devices.title(torch.device("cpu")) == "cpu"
    assert devices.count(CPU) == 1
    free, known = devices.free_bytes(torch.device("cpu")), machine.free_bytes()
    assert free is not None and known is not None and abs(free - known) < 2**30
    devices.synchronise(torch.device("cpu"))
    assert 0 <= devices.seconds(lambda: None, torch.device("cpu")) < 10


def test_auto_takes_what_is_there(npu: None) -> None:
    assert str(devices.find("auto")) in [kind.type for kind in KINDS if kind is not CPU]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_auto_without_an_accelerator_is_the_cpu() -> None:
    assert devices.find("auto") == torch.device("cpu")
    assert devices.accelerators() == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not CPU], ids=lambda kind: kind.name)
def test_what_is_not_there_says_what_would_bring_it(kind: devices.Kind) -> None:
    if devices.present(kind):
        pytest.skip(f"{kind.what} is here")
    with pytest.raises(BackendError) as refused:
        devices.find(kind.name)
    assert kind.what in refused.value.message and refused.value.hint == kind.hint


def test_a_vendor_package_is_imported_when_asked_for(npu: None) -> None:
    assert "torch_npu" not in sys.modules
    device: Any = devices.find("npu:1")
    try:
        assert isinstance(sys.modules["torch_npu"], ModuleType)
        assert (device.type, device.index) == ("npu", 1)
        kind = devices.kind_of(device)
        assert (kind.name, kind.group, devices.count(kind)) == ("npu", "hccl", 2)
        assert devices.free_bytes(device) == 3 << 30
        assert devices.title(device) == "Chip 3000"
        for name in ("npu:2", "npu:x", "npu:-1"):
            with pytest.raises(BackendError, match="npu has 2"):
                devices.find(name)
    finally:
        sys.modules.pop("torch_npu", None)


def test_a_vendor_package_that_does_not_import_is_no_device(
    npu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, and its driver's libraries not found: as if it were not there."""
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open')")
    assert "npu" not in [kind.name for kind in devices.accelerators()]
    with pytest.raises(BackendError, match="was not found by torch"):
        devices.find("npu")


def test_a_name_that_nothing_has() -> None:
    with pytest.raises(BackendError, match="no device is called 'gpu'") as refused:
        devices.find("gpu")
    assert all(kind.name in str(refused.value.hint) for kind in KINDS)


@pytest.mark.parametrize("name", ["hpu", "xla", "meta", "vulkan", "xla:1"])
def test_a_type_that_torch_only_names_is_refused(name: str) -> None:
    with pytest.raises(BackendError, match=f"torch knows the name '{name}', but drives no"):
        devices.find(name)


def test_packed_weights_go_to_no_kind_that_cannot_hold_them(
    npu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "present", lambda kind: kind.name in ("mps", "cpu"))
    assert str(devices.find("auto")) == str(devices.find("mps")) == "mps"
    assert str(devices.find("auto", packed=True)) == "cpu"
    with pytest.raises(BackendError, match=r"Apple GPU .* FP8 or FP4, and these are") as refused:
        devices.find("mps", packed=True)
    assert "--form bf16" in str(refused.value.hint)


WITHOUT_FLOAT64 = """
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from overleap import devices, load
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.kernels import select
from overleap.kernels.conformance import conform
from tests import pretend

device, seed = pretend.register(), int(sys.argv[1])
devices.KINDS += (devices.Kind("pretend", "pretend", "a chip", "gloo", float64=False),)


class Without(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "pretend":
                assert leaf.dtype is not torch.float64, f"{func} makes float64 on the device"
        return out


with Without():
    verdicts = conform(select("auto", "pretend"), device, seed=seed, only=["sample"], enough_s=1)
    assert [(v.case, v.reason) for v in verdicts if not v.passed] == []
    said = []
    for where in ("pretend", "cpu"):
        engine = Engine(load("mini", device=where, backend="torch"), memory_bytes=64 << 20)
        for sampling in (
            Sampling(temperature=0, logprobs=2, max_tokens=4, stop_ids=()),
            Sampling(temperature=1, top_p=0.9, seed=seed, max_tokens=4, stop_ids=()),
        ):
            answer = engine.generate(Request(prompt=[7, 11, 13], sampling=sampling))
            said.append([token.id for token in answer.tokens])
assert len(said[0]) == 4 and said[:2] == said[2:], said
"""


def test_a_device_without_float64_yields_tokens(seed: int) -> None:
    """As an Apple GPU is: on the pretend device, in a process of its own."""
    if why := pretend.missing():
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLOAT64, str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_files_tell_what_is_plugged_in(tmp_path: Path) -> None:
    assert devices.plugged_in(tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "kfd").write_text("")
    assert [kind.name for kind in devices.plugged_in(tmp_path)] == ["rocm"]


def test_backends_are_fit_for_their_kinds() -> None:
    groups = {kind.name: kind.group for kind in KINDS}
    assert groups == {
        "cpu": "gloo", "cuda": "nccl", "rocm": "nccl", "xpu": "xccl", "mps": "gloo",
        "npu": "hccl", "mlu": "cncl",
    }  # fmt: skip


def test_one_vendor_is_named_in_two_places_only() -> None:
    """In the table, and in the kernels written for it."""
    allowed = (ROOT / "overleap" / "devices.py", ROOT / "overleap" / "kernels" / "triton")
    texts = [
        p for p in (ROOT / "overleap").rglob("*") if p.suffix in (".py", ".toml", ".cpp", ".h")
    ]
    found = [
        str(path.relative_to(ROOT))
        for path in texts
        if re.search("cuda", path.read_text("utf-8"), re.IGNORECASE)
        and not any(path == a or a in path.parents for a in allowed)
    ]
    assert len(texts) > 100 and found == []
