"""The table of kernels. A new kernel is a file, which keeps the contract in base.py, and a row here."""

from __future__ import annotations

from lightning_muws.runtime.kernels import bsr, compact, dense, groups, native, native_int8, pooled, signs
from lightning_muws.runtime.kernels.base import Build

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
    "native_int8": native_int8.build,
    "bf16": dense.build_bf16,
    "int8": dense.build_int8,
}
DENSE = ("dense", "onednn")  # the layer with all its weights: what a kernel has to beat
ROUNDED = ("bf16", "int8", "native_bf16", "native_int8")  # of lower precision: they win only if dtype allows it
ALLOWED = {  # which of them may win, by the lowest precision allowed
    "bfloat16": ("bf16", "int8", "native_bf16"),
    "int8": ROUNDED,
}
ON_REQUEST = ("native_int8",)  # tried only if dtype allows it, or by name
