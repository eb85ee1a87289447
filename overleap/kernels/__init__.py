"""Who serves each op on a device, decided once when a model is built.

A backend is a folder beside this file. Today: `torch`, the definition, on every torch device.
"""

from types import SimpleNamespace
from typing import cast

from overleap.errors import BackendError
from overleap.kernels.spec import Ops

BACKENDS = ("torch",)


def select(wanted: str = "auto") -> Ops:
    """The ops of a backend by name, or the best that is there for `auto`.

    Raises BackendError when a backend asked for by name cannot serve.
    """
    if wanted not in ("auto", *BACKENDS):
        raise BackendError(
            f"no kernel backend is called {wanted!r}", f"backends are {', '.join(BACKENDS)}"
        )
    from overleap.kernels.torch import attention, compress, hyper, linear, moe

    return cast(
        Ops,
        SimpleNamespace(
            matmul=linear.matmul,
            grouped_matmul=linear.grouped_matmul,
            rms_norm=linear.rms_norm,
            norm_rope=linear.norm_rope,
            rotate=linear.rotate,
            hadamard=linear.hadamard,
            quantize=linear.quantize,
            window_write=attention.window_write,
            page_write=attention.page_write,
            compress=compress.compress,
            index_topk=attention.index_topk,
            attend=attention.attend,
            route=moe.route,
            experts=moe.experts,
            hc_pre=hyper.hc_pre,
            hc_post=hyper.hc_post,
        ),
    )
