"""A graph of the pretend device: what torch.cuda.CUDAGraph is on a card.

While it captures, nothing that is given to the device is done, as on a card: what was written is
put back, and results are NaN. What a card refuses to capture is refused. `replay` does all of it
again, on the same memory. Kernels of Triton run in its interpreter.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from overleap import devices
from tests import pretend

ROOM = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}
WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.repeat_interleave.Tensor,
}


class Graph:
    """Captures what is done while it is entered. RuntimeError for what a card would refuse."""

    captured = 0  # by all
    replays = 0

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []
        self._made: list[Tensor] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._mode = _Capture(self)

    def __enter__(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self._launch = InterpretedFunction.run

        def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self.take(partial(self._launch, kernel, *args, **kwargs))

        InterpretedFunction.run = run
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self._mode.__exit__(*error)
        InterpretedFunction.run = self._launch
        for written, before in reversed(self._before):
            written.copy_(before)
        for made in self._made:
            made.fill_(torch.nan if made.is_floating_point() else 1)
        Graph.captured += 1
        if error[0] is not None:
            raise RuntimeError("the capture was broken off")

    def take(self, call: Callable[[], object]) -> object:
        """Do it, and remember it."""
        self._calls.append(call)
        return call()

    def saw(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An op on tensors of the device, or of the host."""
        with self._mode:  # an op that is made of others
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        devices = {one.device.type for one in tensors((args, kwargs))}
        if func in WAITS and devices - {"cpu"}:
            raise RuntimeError(f"{func} waits for the device, which is capturing")
        if any(one.dtype is torch.bool for one in tensors(args[1:])) and "index" in str(func):
            raise RuntimeError(f"{func} by a mask waits for the device, which is capturing")
        with _disable_current_modes():
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            self._before += [(value, value.clone()) for value in written]
            result = func(*args, **kwargs)
            devices |= {one.device.type for one in tensors(result)}
            if "cpu" in devices and len(devices) > 1 and not _number(args, kwargs):
                raise RuntimeError(f"{func} crosses between host and device, which is capturing")
            if written:
                self._calls.append(partial(func, *args, **kwargs))
            elif devices - {"cpu"} and func not in ROOM:
                given = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs))}
                made = [
                    one for one in tensors(result) if one.untyped_storage().data_ptr() not in given
                ]
                if made:  # else views of what was given
                    self._made += made
                    self._calls.append(partial(_again, made, func, args, kwargs))
        return result

    def replay(self) -> None:
        for call in self._calls:
            call()
        Graph.replays += 1


def provide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretend device has such graphs, and none was captured yet."""
    row = devices.Kind(pretend.NAME, pretend.NAME, "a pretend device", "gloo", graph="Graph")
    monkeypatch.setattr(devices, "KINDS", (row, *devices.KINDS))
    module = torch.get_device_module(pretend.NAME)
    for name, value in {
        "Graph": Graph,
        "graph": lambda graph, pool, stream: graph,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device: None,
    }.items():
        monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr("overleap.kernels.graph._FAILED", {})
    Graph.captured = Graph.replays = 0


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._graph.saw(func, args, kwargs or {})


def tensors(value: Any) -> Iterator[Tensor]:
    """All in it."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _number(args: Any, kwargs: Any) -> bool:
    """Whether what comes from the host is a number, which goes along with the op."""
    return all(one.dim() == 0 for one in tensors((args, kwargs)) if one.device.type == "cpu")


def _again(made: list[Tensor], func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    for own, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
        own.copy_(new)
