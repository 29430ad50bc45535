"""Quantized layers over several processes: shards of a weight, styles for tensor parallelism, sharding of the op.

    parallelize_module(model, mesh, {"*.q_proj": ColwiseParallel(), "*.o_proj": RowwiseParallel()})

A shard is cut from the codes: it dequantizes to the very values that the whole has there. Every process must hold the
same whole layer first; each keeps its part, and nothing is sent.

torch's fully_shard takes models with quantized layers as they are. But a MixedPrecisionPolicy with a param_dtype would
round scales to that dtype, without a word: give the quantized layers of a block a group of their own, without a policy,
before the block, as in fully_shard([m for m in block.modules() if isinstance(m, QuantLinear)]).

For those who distribute tensors themselves, importing this package also tells DTensor how the ops can be sharded.
"""

from qkernels.parallel import dtensor
from qkernels.parallel.shards import sharded
from qkernels.parallel.styles import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "RowwiseParallel", "dtensor", "sharded"]
