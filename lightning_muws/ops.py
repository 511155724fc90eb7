"""Registers the operators of accelerated models with torch: ``import lightning_muws.ops``.

Import this module before loading a model that ``accelerate`` made and that ``torch.export.save`` or AOTInductor stored:

    >>> import torch
    >>> import lightning_muws.ops
    >>> torch.ops.lightning_muws.block_sparse
    <OpOverloadPacket(op='lightning_muws.block_sparse')>

Such files name the operators but do not contain them. ``import lightning_muws`` alone does not register them, because
it does not import torch. This import takes about 10 ms more than ``import torch``; it loads neither Lightning nor rich.
"""

from lightning_muws.runtime.native.ops import block_sparse_op, int8_sparse_op, program_op, signed_linear_op

__all__ = ["block_sparse_op", "int8_sparse_op", "program_op", "signed_linear_op"]
