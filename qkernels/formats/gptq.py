"""GPTQ checkpoints, as AutoGPTQ, GPTQModel, optimum and transformers write and read them.

    w[n, k] = scales[g, n] (u[n, k] - z[g, n]),    g = g_idx[k], or k // group_size where there is no g_idx

    part      shape                     holds
    qweight   (K bits / 32, N) int32    codes u, packed along K
    qzeros    (G, N bits / 32) int32    zeros z, packed along N
    scales    (G, N) floating           G = ceil(K / group_size)
    g_idx     (K,) int32                the group of each input feature; with desc_act groups are no runs

Codes are dense streams, low bits first; 3-bit ones begin in one word and end in the next. In "gptq_p" the words of 32
codes hold planes instead, of the bits that `packing.PLANES` lists: first all low planes, then the next ones. Codes of
2, 4 and 8 bits are one plane, which is the stream; those of 5, 6 and 7 bits have no other layout, and make any
checkpoint a "gptq_p" one.

checkpoint_format says what zeros are stored. "gptq_v2" and "gptq_p" store z; "gptq", the default, stores z - 1. Of 2, 4
and 8 bits the one was subtracted from whole words, so that z = 0 borrowed from the field above: it is added to whole
words, modulo 2^32. Of 3 bits it was subtracted from each field, modulo 8.

With sym every zero is the center, 2^(bits - 1), so that a "gptq" file stores the center minus one. Files with sym and
this label exist that store the center: they hold the zeros of "gptq_v2" and are read so, tensor by tensor.

`dynamic` maps patterns to settings of the modules whose names they match from the start; the first one counts. Those
that begin with "-:" exclude modules, which then have no qweight. `lm_head` need not be looked at, for the same reason.

Source    gptqmodel 7.7.0: its packers, its conversion of zeros and its lookup of dynamic settings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels import packing
from qkernels.checks import DTYPES
from qkernels.formats import reader as base
from qkernels.formats.pattern import Pattern, literal
from qkernels.formats.reader import Reader, field, part, whole
from qkernels.tensor import QTensor

FORMATS = ("gptq", "gptq_v2", "gptq_p")
BITS = (2, 3, 4, 5, 6, 7, 8)
PLANAR = (5, 6, 7)  # never a stream
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every field of a word
MOST_CHARACTERS = 50_000  # of patterns in dynamic, each of which may be tried on each module


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How one module is stored."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """What a configuration says: of all modules, and of those that it gives settings of their own."""

    form: str  # of FORMATS
    common: _Settings
    exact: Mapping[str, tuple[int, _Settings]]  # module -> (place, settings)
    patterns: tuple[tuple[int, Pattern, _Settings], ...]

    def of(self, module: str) -> _Settings:
        """The settings of a module: of the first pattern that its name matches, or the common ones."""
        place, found = self.exact.get(module, (None, self.common))
        for at, pattern, settings in self.patterns:
            if place is not None and at > place:
                break
            if pattern.matches(module):
                return settings
        return found


def reader(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Reader:
    """How a checkpoint with this configuration, quantization_config or an old quantize_config.json, is read.

    Raises:
        ValueError: a field that is needed is missing, or one says what is not supported; it is named.
    """
    return Reader("qweight", ("qzeros", "scales", "g_idx"), functools.partial(_decode, _checkpoint(config)))


def _checkpoint(config: Mapping[str, Any]) -> _Checkpoint:
    field(config, "quant_method", (None, "gptq"), None)
    field(config, "is_marlin_format", (None, False), None)
    field(config, "rotation", (None,), None)  # inputs would have to be rotated too
    form = _form(config)
    common = _settings(config)
    own = _dynamic(config)
    patterns: list[tuple[int, Pattern, _Settings]] = []
    exact: dict[str, tuple[int, _Settings]] = {}
    left = MOST_CHARACTERS
    for place, (pattern, settings) in enumerate(own.items()):
        pattern = pattern.removeprefix("+:")
        if (name := literal(pattern)) is not None:
            exact.setdefault(name, (place, settings))
            continue
        if (left := left - len(pattern)) < 0:
            raise ValueError(
                f"quantization_config's dynamic has patterns of more than {MOST_CHARACTERS} characters in all"
            )
        try:
            patterns.append((place, Pattern(pattern), settings))
        except ValueError as error:
            raise ValueError(f"quantization_config's dynamic: {error}") from None
    if any(settings.bits in PLANAR for settings in (common, *own.values())):
        form = "gptq_p"
    return _Checkpoint(form, common, exact, tuple(patterns))


def _form(config: Mapping[str, Any]) -> str:
    """checkpoint_format, which newer files repeat as format."""
    found = {}
    for name in ("checkpoint_format", "format"):
        if config.get(name) is not None:
            value = config[name]
            found[name] = field({name: value.lower() if isinstance(value, str) else value}, name, FORMATS)
    if len(set(found.values())) > 1:
        raise ValueError(f"quantization_config's checkpoint_format and format differ: {found}")
    return next(iter(found.values()), "gptq")


def _settings(config: Mapping[str, Any]) -> _Settings:
    field(config, "pack_dtype", (None, "int32"), None)
    group_size = whole(config, "group_size")
    if group_size != -1 and group_size <= 0:
        raise ValueError(f"quantization_config's group_size must be positive or -1, got {group_size}")
    return _Settings(
        bits=field(config, "bits", BITS),
        group_size=group_size,
        sym=field(config, "sym", (True, False), True),
        desc_act=field(config, "desc_act", (True, False), False),
    )


def _dynamic(config: Mapping[str, Any]) -> dict[str, _Settings]:
    """The settings of patterns that do not exclude; what they leave out is as for other modules."""
    dynamic = config.get("dynamic")
    if dynamic is None:
        return {}
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"quantization_config's dynamic must map patterns to settings, got {dynamic!r}")
    own = {}
    for pattern, settings in dynamic.items():
        if not isinstance(pattern, str) or not isinstance(settings, Mapping):
            raise ValueError(
                f"quantization_config's dynamic must map patterns to settings, got {pattern!r}: {settings!r}"
            )
        if pattern.startswith("-:"):
            continue
        try:
            own[pattern] = _settings({**config, **settings})
        except ValueError as error:
            raise ValueError(f"{error}, in the settings of {pattern!r} in dynamic") from None
    return own


def _decode(checkpoint: _Checkpoint, module: str, parts: Mapping[str, Tensor]) -> QTensor:
    """The weight of a module."""
    settings = checkpoint.of(module)
    bits, planar = settings.bits, checkpoint.form == "gptq_p"
    in_features, out_features = _sizes(parts, bits)
    group_size, groups = base.groups_of(settings.group_size, in_features)
    scales = part(parts, "scales", (groups, out_features), DTYPES)
    qzeros = part(parts, "qzeros", (groups, out_features * bits // 32), (torch.int32,))
    order = None
    if "g_idx" in parts:
        g_idx = part(parts, "g_idx", (in_features,), (torch.int32, torch.int64))
        order = base.order_of(g_idx, in_features if group_size == "channel" else settings.group_size)
    elif settings.desc_act and groups > 1:
        raise ValueError(f"there is no tensor 'g_idx', which says what the {groups} groups of a desc_act weight are")
    zero = _zeros(qzeros, settings, checkpoint.form)
    code = _unpack(parts["qweight"].T, bits, planar)
    if order is not None:
        code = code[:, order.long()]
    return base.affine(code, scales, zero, bits=bits, group_size=group_size, order=order)


def _sizes(parts: Mapping[str, Tensor], bits: int) -> tuple[int, int]:
    """(K, N) of qweight."""
    qweight = part(parts, "qweight", dtypes=(torch.int32,))
    if qweight.ndim != 2 or not qweight.numel():
        raise ValueError(f"qweight must be (K * {bits} / 32, N), got shape {tuple(qweight.shape)}")
    rows, out_features = qweight.shape
    if rows % (least := 1 if bits in ONES else bits):
        raise ValueError(f"qweight of {bits} bits must have a multiple of {least} rows, got {rows}")
    if out_features % (least := 32 // bits if bits in ONES else 32):
        raise ValueError(f"qweight of {bits} bits must have a multiple of {least} columns, got {out_features}")
    return rows * 32 // bits, out_features


def _zeros(qzeros: Tensor, settings: _Settings, form: str) -> Tensor:
    """Zeros (G, N) of a module."""
    bits, center = settings.bits, 2 ** (settings.bits - 1)
    stored = _unpack(qzeros, bits, form == "gptq_p")
    if form != "gptq" or (settings.sym and bool((stored == center).all())):
        return stored
    if bits not in ONES:
        return (stored + 1) & (2**bits - 1)
    return _unpack((qzeros.to(torch.int64) + ONES[bits]).to(torch.int32), bits, planar=False)


def _unpack(words: Tensor, bits: int, planar: bool) -> Tensor:
    """Codes (rows, codes) uint8 of words (rows, words) int32."""
    rows, count = words.shape[0], words.shape[1] * 32 // bits
    if not planar or bits in ONES:
        return base.unpack_stream(words, bits, count)
    blocks = words.reshape(-1, bits)  # of 32 codes
    code = torch.zeros((blocks.shape[0], 32), dtype=torch.uint8)
    shift = 0  # bits of a code, and words of a block, that the planes before take
    for plane in packing.PLANES[bits]:
        code |= base.unpack_stream(blocks[:, shift : shift + plane], plane, 32) << shift
        shift += plane
    return code.reshape(rows, count)
