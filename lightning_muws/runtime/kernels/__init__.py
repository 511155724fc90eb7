"""The table of kernels: ways to compute a layer, each equal to ``reference``; a new one is a file and a row.

A row is ``build(layer, block_shape, example, *, relu=False) -> nn.Module | None``. ``layer`` is a Linear, Conv1d or
Conv2d in eval mode whose weight holds exact zeros where its blocks are pruned; it is never changed. ``block_shape`` is
that of its blocks on the matrix ``(out, in * kernel)``, ``example`` one of its inputs. What comes back takes any batch
and keeps its weights in buffers; None where the kernel does not apply.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_muws.runtime.kernels import bsr, compact, dense, groups, native, pooled, signs

Build = Callable[..., "nn.Module | None"]


KERNELS: dict[str, Build] = {
    "dense": dense.build,
    "onednn": dense.build_prepacked,
    "compact": compact.build,
    "groups": groups.build,
    "groups_loop": groups.build_loop,
    "bsr": bsr.build,
    "pooled": pooled.builder([native.build, bsr.build, compact.build]),
    "native": native.build,
    "signs": signs.build,
    "native_bf16": native.build_bfloat16,
    "bf16": dense.build_bf16,
    "int8": dense.build_int8,
}
DENSE = ("dense", "onednn")  # the layer itself: what a kernel has to beat
ROUNDED = ("bf16", "int8", "native_bf16")  # of lower precision: only where asked for, else to compare with
