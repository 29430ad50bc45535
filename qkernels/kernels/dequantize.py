"""Dequantize: w[n, k] = (code[n, k] - zero[g, n]) * scale[g, n], or code * scale + offset, with g = k // group length.

Shapes    packed (N, words) int32, scale and zero (groups, N), w (N, K); N and K at least 1.
Numerics  float32 arithmetic without fused multiply-add, one rounding to w's dtype: equals the oracle bit for bit.
Oracle    qkernels.reference.dequantize      Tuning  qkernels.tuning.choose
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.kernels.launch import group_strides, on_device, program_of
from qkernels.kernels.unpack import load_codes
from qkernels.scheme import Scheme
from qkernels.tuning.configs import DequantizeConfig


@triton.jit
def dequantize_kernel(
    packed_ptr,  # (N, words) int32
    scale_ptr,  # (groups, N) floating
    zero_ptr,  # (groups, N): uint8 zeros, floating offsets, or unused
    w_ptr,  # (N, K) floating
    N,
    K,
    group_length,  # weights along K that share a scale
    stride_packed_n,  # in elements; the inner strides of packed and w are 1
    stride_scale_g,
    stride_scale_n,
    stride_w_n,
    BITS: tl.constexpr,
    VALUE_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n_block, k_block = program_of(N, BLOCK_N)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    n64 = n.to(tl.int64)  # n * stride overflows int32 on large weights

    row = (packed_ptr + n64 * stride_packed_n)[:, None].to(tl.pointer_type(tl.uint8), bitcast=True)
    code = load_codes(row, (k // 16)[None, :], (k % 16)[None, :], K, mask, BITS)
    group_offset = (k // group_length).to(tl.int64)[None, :] * stride_scale_g + (n64 * stride_scale_n)[:, None]
    scale = tl.load(scale_ptr + group_offset, mask=mask, other=0.0).to(tl.float32)
    if VALUE_MAP == "offset":
        offset = tl.load(zero_ptr + group_offset, mask=mask, other=0.0).to(tl.float32)
        w = code.to(tl.float32) * scale + offset
    elif VALUE_MAP == "affine":
        zero = tl.load(zero_ptr + group_offset, mask=mask, other=0).to(tl.int32)
        w = (code - zero).to(tl.float32) * scale
    else:
        w = (code - 2 ** (BITS - 1)).to(tl.float32) * scale
    w_offset = (n64 * stride_w_n)[:, None] + k[None, :]
    tl.store(w_ptr + w_offset, w.to(w_ptr.dtype.element_ty), mask=mask)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    in_features: int,
    dtype: torch.dtype,
    config: DequantizeConfig,
) -> Tensor:
    """Launch only: w (N, K) in dtype, from contiguous tensors, N and K at least 1."""
    N, K = packed.shape[0], in_features
    w = packed.new_empty((N, K), dtype=dtype)
    with on_device(packed):
        dequantize_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(K, config.block_k),)](
            packed, scale, scale if zero is None else zero, w,
            N, K, scheme.group_length(K),
            packed.stride(0), *group_strides(scale), w.stride(0),
            BITS=scheme.bits, VALUE_MAP=scheme.value_map, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return w
