"""compressed-tensors' integer weights: w = s (q - z) in the dtype of the scale, one rounding of the exact product; and
how the inputs that meet them are quantized to 8 bits.

b is num_bits, 1 to 8; q and z are from -2^(b-1) to 2^(b-1) - 1, codes are u = q + 2^(b-1), zeros z + 2^(b-1); G is
K / group_size, or 1 for a scale per channel:

    part               format pack-quantized                       int-quantized, naive-quantized
    weight             -                                           (N, K) int8, q
    weight_packed      (N, words) int32, u along K                 -
    weight_shape       (2,) int32 or int64, N and K                -
    weight_scale       (N, G), or one number for a tensor; float16, bfloat16 or float32
    weight_zero_point  asymmetric: (words, G) int32, zeros along   asymmetric: int8 z, of the shape of weight_scale
                       N; int8 z as on the right for a tensor,
                       and in files of 0.5
    weight_g_idx       (K,), which group each input feature is of, with actorder "group" (or "dynamic"): written up to
                       0.18, no longer read by the package since 0.19. It is not there, or -1 throughout, where features
                       were not reordered after all; other values of actorder leave nothing in the file

    input_scale        static inputs: one number; float16, bfloat16 or float32
    input_zero_point   static inputs, asymmetric: one number, int8

Words hold codes low bits first. Since 0.18 they are a stream without gaps, where a code may begin in one word and end
in the next; up to 0.17 a word holds floor(32 / b) whole codes. For 3, 5, 6 and 7 bits that is not the same. The number
of words tells which: always for more than 150 codes in a row, or for 64 or 128 of them, but not for 80 of 3 bits or 48
of 5, for example. There zeros may tell, which lie along N, or the configuration's "version", if it is that of a
release; else the weight is refused.

Groups must divide K, but for one that is longer than K, which version 0.9 still read: the package reads no others.
Symmetric weights of one bit (q is -1 or 0) get zeros of 1 here, as such a scheme has no symmetric map.

A group of the configuration with input_activations of 8 bits, type "int", has weights of 4 or 8 bits, and schemes that
end in -a8 (dynamic true, strategy "token") or -a8t (dynamic false, strategy "tensor"), and in s if they are symmetric.
Inputs are quantized as reference_int8.py says, in float32. The package has no product of codes: it rounds inputs to
what their codes stand for, in the dtype that they have. The same in float32, but for this:

    -a8s       the package's scale is absmax / 127.5 and its codes are from -128 to 127, so that the largest magnitude
               lies half a step from its code; here it is absmax / 127, from -127 to 127, as in vLLM's kernel, which
               runs such checkpoints. Of inputs of two dimensions, one less than in a model, the package takes one
               scale for all tokens; here each token always has its own
    -a8ts      what lies 127.5 steps or more below zero gets -128 in the package, -127 here
    -a8, -a8t  a value in the middle between two codes gets the even one in the package; here what is even is the code
               less its zero, as in vLLM
    all        the package divides by the scale, and adds the zero before it rounds; here a value is multiplied by the
               reciprocal. So one that lies within 2^-15 of a step of the middle between two codes may get the other

Where codes are equal, so are the values that they stand for, bit for bit. Of bfloat16 inputs the package rounds the
quotient, too, to 8 significant bits, before it rounds it to a code.

Refused, by name: other input_activations, output_activations and key-value caches, transforms (a product would be
another), sparsity, float weights, other strategies, and fields that are not known. Which group of the configuration a
module is of: compressed_tensors_groups.py.

Source    the package compressed-tensors, 0.5 to 0.20: its compressors, how they pack, its dequantize, its
          forward_quantize and calculate_qparams; vLLM's int8_quant_kernels.cu
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.formats.compressed_tensors_groups import Group, Groups
from qkernels.formats.reader import Reader, activation_of, field, order_of, part, unpack_stream, weight
from qkernels.scheme import GROUP_MULTIPLE, GroupSize, ValueMap
from qkernels.tensor import QTensor

_PARTS = ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx")
_INPUTS = ("input_scale", "input_zero_point")


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Reader:
    """A reader of integer weights; a module without weight_scale is not quantized.

    Raises:
        ValueError: the configuration has a field that is not known or a value that is not supported.
    """
    field(config, "quant_method", ("compressed-tensors",))
    groups = Groups(config)
    release = _layout_of_release(config.get("version"))
    return Reader("weight_scale", _PARTS + _INPUTS, lambda name, parts: _decode(parts, groups.of(name), release))


def _decode(parts: Mapping[str, Tensor], group: Group, release: str | None) -> QTensor:
    """The weight of a module; release: how codes are packed where tensors do not tell, if known."""
    other = "weight" if group.packed else "weight_packed"
    if other in parts:
        raise ValueError(f"there is {other!r}, which weights of this format do not have")
    code, zero = _packed(parts, group, release) if group.packed else (_plain_codes(parts, group), None)
    rows, in_features = code.shape
    size, groups = group.group_size, 1
    if isinstance(size, int):
        groups = -(-in_features // size)
        if in_features % size and groups > 1:
            raise ValueError(f"group_size must divide K = {in_features}, got {size}")
    scale = _transposed(part(parts, "weight_scale"), "weight_scale", size, rows, groups)
    if zero is None:
        zero = _plain_zeros(parts, group, rows, groups)
    elif zero.shape[0] != groups:
        raise ValueError(f"weight_zero_point must be (words, {groups}), got {tuple(parts['weight_zero_point'].shape)}")
    if (order := _order(parts, group, in_features)) is not None:
        code = code.index_select(1, order)
    value_map: ValueMap = "symmetric" if zero is None else "affine"
    if isinstance(size, int) and groups == 1 and size % GROUP_MULTIPLE:
        size = "channel"
    return weight(
        code,
        scale,
        zero,
        bits=group.bits,
        group_size=size,
        value_map=value_map,
        order=order,
        activations=group.activations,
        activation=activation_of(parts, *_INPUTS, group.activations),
    )


def _transposed(stored: Tensor, name: str, size: GroupSize, rows: int, groups: int) -> Tensor:
    """(groups, N) of (N, groups); (1, 1) of the one number of a tensor, whatever its shape."""
    if size == "tensor":
        if stored.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(stored.shape)}")
        return stored.reshape(1, 1)
    if stored.shape != (rows, groups):
        raise ValueError(f"{name} must have shape {(rows, groups)}, got {tuple(stored.shape)}")
    return stored.T


def _plain_codes(parts: Mapping[str, Tensor], group: Group) -> Tensor:
    """u (N, K) uint8 of q."""
    q = part(parts, "weight", dtypes=(torch.int8,))
    if q.ndim != 2 or not q.numel():
        raise ValueError(f"weight must be (N, K), of at least one row and column, got {tuple(q.shape)}")
    low, high, center = int(q.min()), int(q.max()), group.center
    if low < -center or high >= center:
        wrong = low if low < -center else high
        raise ValueError(f"weight must be from {-center} to {center - 1} for {group.bits} bits, got {wrong}")
    return q.contiguous().view(torch.uint8) + center  # modulo 256


def _plain_zeros(parts: Mapping[str, Tensor], group: Group, rows: int, groups: int) -> Tensor | None:
    """z + 2^(b-1), (groups, N) or (1, 1), for an affine map; values are yet to be looked at."""
    name = "weight_zero_point"
    if not group.symmetric:
        stored = part(parts, name, dtypes=(torch.int8,))
        return _transposed(stored, name, group.group_size, rows, groups).to(torch.int16) + group.center
    if name in parts and part(parts, name, dtypes=(torch.int8,)).any():
        raise ValueError(f"{name} must be 0 throughout, or not there, for symmetric weights")
    if group.bits > 1:
        return None
    shape = (1, 1) if group.group_size == "tensor" else (groups, rows)
    return torch.full(shape, group.center, dtype=torch.uint8)


def _order(parts: Mapping[str, Tensor], group: Group, in_features: int) -> Tensor | None:
    """As of QTensor."""
    if "weight_g_idx" not in parts:
        return None
    g_idx = part(parts, "weight_g_idx", (in_features,), (torch.int32, torch.int64))
    if (g_idx == -1).all():
        return None
    size = group.group_size
    order = order_of(g_idx, size if isinstance(size, int) else in_features)
    if order is not None and not group.reordered:
        raise ValueError("weight_g_idx reorders input features, and actorder says that they are not reordered")
    return order


# ---- packed codes ----


def _packed(parts: Mapping[str, Tensor], group: Group, release: str | None) -> tuple[Tensor, Tensor | None]:
    """Codes (N, K) and zeros (groups, N), uint8; None where zeros are not packed."""
    sizes = part(parts, "weight_shape", (2,), (torch.int32, torch.int64)).tolist()
    words = part(parts, "weight_packed", dtypes=(torch.int32,))
    rows, in_features = sizes
    if words.ndim != 2 or words.shape[0] != rows or rows < 1 or in_features < 1:
        raise ValueError(
            "weight_shape and weight_packed must be (N, K) and of shape (N, words), with at least one row and column, "
            f"got {sizes} and {tuple(words.shape)}"
        )
    held = {"weight_packed": (words.shape[1], in_features)}
    zeros = None
    if not group.symmetric and group.group_size != "tensor":
        zeros = part(parts, "weight_zero_point", dtypes=(torch.int32, torch.int8))
        if zeros.dtype is torch.int8:
            zeros = None
        elif zeros.ndim != 2:
            raise ValueError(f"weight_zero_point must be (words, groups), got {tuple(zeros.shape)}")
        else:
            held["weight_zero_point"] = (zeros.shape[0], rows)
    layout = _layout(held, group.bits, release)
    code = _unpacked(words, group.bits, in_features, layout)
    if zeros is not None:  # a clone: contiguous() leaves a single column the stride that it has, which has no bytes
        zeros = _unpacked(zeros.T.clone(memory_format=torch.contiguous_format), group.bits, rows, layout)
    return code, zeros


def _layout_of_release(version: Any) -> str | None:
    """How a release of the package packs, "stream" or "words"; None for what is no release."""
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}", version):
        return None
    return "stream" if [int(number) for number in version.split(".")] >= [0, 18] else "words"


def _layout(held: Mapping[str, tuple[int, int]], bits: int, release: str | None) -> str:
    """How codes are packed, where {part: (words of a row, codes in it)}; "stream" where it is all the same."""
    each = 32 // bits
    possible = {"stream", "words"}
    for name, (words, count) in held.items():
        wanted = {"stream": -(-count * bits // 32), "words": -(-count // each)}
        if words not in wanted.values():
            numbers = " or ".join(map(str, sorted(set(wanted.values()))))
            raise ValueError(f"{name} must have {numbers} words for {count} codes of {bits} bits, got {words}")
        possible = {layout for layout in possible if wanted[layout] == words}
    if not possible:
        raise ValueError("weight_packed and weight_zero_point hold codes in two different ways")
    if len(possible) == 1:
        return possible.pop()
    if 32 % bits == 0 or all(count <= each for _, count in held.values()):
        return "stream"
    if release is None:
        raise ValueError(
            f"weight_packed may hold a stream of {bits}-bit codes or {each} in each word: its shape is the same, and "
            "quantization_config's version, which would tell, is not that of a release"
        )
    return release


def _unpacked(words: Tensor, bits: int, count: int, layout: str) -> Tensor:
    """Codes (rows, count) uint8 of words (rows, words)."""
    if layout == "stream":
        return unpack_stream(words, bits, count)
    each = 32 // bits
    code = torch.empty((*words.shape, each), dtype=torch.uint8)
    for i in range(each):
        code[..., i] = (words >> bits * i) & (2**bits - 1)
    return code.flatten(1)[:, :count].contiguous()
