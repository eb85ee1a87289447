"""Official checkpoints in and out: load, save, convert, verify, show.

A package and not one file because each part stands alone: names and shapes (table.py), one
safetensors file (files.py), a folder (folder.py), digests (manifest.py), the hub (hub.py), other
storage forms (convert.py), what to do with a folder (load.py). Read next: load.py.
"""

from overleap.checkpoint.convert import convert, show
from overleap.checkpoint.folder import Checkpoint, save
from overleap.checkpoint.hub import Preflight, locate, preflight
from overleap.checkpoint.load import Report, Verified, build, load, open_checkpoint, verify
from overleap.checkpoint.manifest import write_manifest
from overleap.checkpoint.pages import Placed, placed
from overleap.checkpoint.table import Damaged, Problem, TensorSpec, tensor_table

__all__ = [
    "Checkpoint",
    "Damaged",
    "Placed",
    "Preflight",
    "Problem",
    "Report",
    "TensorSpec",
    "Verified",
    "build",
    "convert",
    "load",
    "locate",
    "open_checkpoint",
    "placed",
    "preflight",
    "save",
    "show",
    "tensor_table",
    "verify",
    "write_manifest",
]
