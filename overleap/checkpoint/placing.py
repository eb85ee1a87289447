"""Which weights go to an accelerator, and whether the routed experts stay on the host.

Decided from the memory that is there when a model is loaded. Not here: who computes them
(kernels/mixed.py), experts that do not fit into the host's memory either (engine/resident.py).
"""

from collections.abc import Mapping

import torch

from overleap.checkpoint.folder import Checkpoint
from overleap.checkpoint.table import Role
from overleap.devices import free_bytes
from overleap.errors import CapacityError
from overleap.machine import size

SPARE_BYTES = 2 << 30  # of the device, where nobody says what cache and temporaries will take
HOST = torch.device("cpu")


def is_routed(name: str) -> bool:
    """True for the tensors of routed experts, by their official names."""
    return ".ffn.experts." in name


def tensor_bytes(checkpoint: Checkpoint, dtype: torch.dtype, wide: bool) -> dict[str, int]:
    """Bytes of every tensor as the model takes it; no data is read."""
    found = {}
    for name in checkpoint.read_order():
        role, tensor = checkpoint.table[name].role, checkpoint.tensor(name)
        packed = name.removesuffix("weight") + "scale" in checkpoint.table
        if role is Role.SCALE:
            found[name] = 0 if wide else tensor.nbytes
        elif role in (Role.IDS, Role.SMALL):
            found[name] = 4 * tensor.numel()
        elif packed and not wide:
            found[name] = tensor.nbytes
        else:
            values = 2 if tensor.dtype is torch.int8 else 1  # a byte of FP4 holds two
            found[name] = values * tensor.numel() * dtype.itemsize
    return found


def experts_at(
    sizes: Mapping[str, int],
    device: torch.device,
    spare_bytes: int = SPARE_BYTES,
    memory_bytes: int | None = None,
) -> torch.device:
    """Where the routed experts go: to the device if all weights fit there, else to the CPU.

    sizes        bytes of every tensor by name
    spare_bytes  of the device that the weights must leave
    memory_bytes of the device that may be taken in all; None: what is free
    Raises CapacityError when what is left does not fit on the device either.
    """
    if device.type == "cpu":
        return device
    free = free_bytes(device)
    if memory_bytes is not None:
        free = memory_bytes if free is None else min(free, memory_bytes)
    if free is None:
        return device
    if sum(sizes.values()) + spare_bytes <= free:
        return device
    needed = spare_bytes + sum(count for name, count in sizes.items() if not is_routed(name))
    if needed > free:
        raise CapacityError(
            f"without its routed experts the model needs {size(needed)} on {device}, "
            f"{size(spare_bytes)} of it beside the weights; {size(free)} may be used",
            "take the CPU instead, a shorter context, or free memory of the device",
        )
    return HOST
