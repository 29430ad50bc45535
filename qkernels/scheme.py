"""What was chosen: how many bits, which weights share a scale, and how a code becomes a weight.

Two value maps cover every blockwise affine format:

    symmetric, affine    w = scale * (code - zero)      zero is an integer; for symmetric it is 2**(bits - 1)
    offset               w = scale * code + offset      offset is a float

A scheme is written as a short string, which is also what files and ops carry:

    w4g128        4 bits, groups of 128 along K, affine with an integer zero
    w8cs          8 bits, one scale per output channel (row of the weight), symmetric (absmax)
    w8ts          8 bits, one scale for the whole tensor, symmetric
    w3g64f        3 bits, groups of 64, affine with a float offset
    w4g128-bf16   scales stored in bfloat16 instead of float16

Where inputs of a layer are quantized, too, so that codes meet codes on integer tensor cores, the string goes on:

    w8cs-a8s      8-bit activations, each token with a scale of its own, found as it comes (dynamic), symmetric
    w4g128-a8     the same, affine: each token has an integer zero, too
    w8cs-a8ts     one scale for all tokens, found beforehand from calibration (static), symmetric

and two of these have names of their own: "w8a8" is w8cs-a8s and "w4a8" is w4g128-a8s.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import torch

ValueMap = Literal["symmetric", "affine", "offset"]
GroupSize = int | Literal["channel", "tensor"]

# One step of a 16-bit tensor-core product covers 16 values of k, so a group is a whole number of them.
GROUP_MULTIPLE = 16

_MAP_SUFFIX: dict[ValueMap, str] = {"affine": "", "symmetric": "s", "offset": "f"}
_DTYPE_SUFFIX = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_PATTERN = re.compile(
    r"w(?P<bits>[0-9]+)(?:(?P<unit>[ct])|g(?P<group>[0-9]+))(?P<map>[sf]?)(?:-(?P<dtype>fp16|bf16|fp32))?"
    r"(?P<activations>-a8(?P<static>t?)(?P<symmetric>s?))?"
)
_NAMED = {"w8a8": "w8cs-a8s", "w4a8": "w4g128-a8s"}
ACTIVATION_BITS = (4, 8)  # of weights that quantized activations can meet

ACCEPTED = (
    "'w<bits 1..8>', then 't' (one scale per tensor), 'c' (per output channel) or 'g<size>' (per group of <size> "
    f"along K, a multiple of {GROUP_MULTIPLE}), then nothing (affine, integer zero), 's' (symmetric absmax, bits 2..8) "
    "or 'f' (affine, float offset), then nothing or '-fp16', '-bf16', '-fp32' (dtype of the scales, default fp16), "
    "then nothing or '-a8' (8-bit activations; 't' after it: one static scale per tensor, else one per token; 's': "
    "symmetric, else affine); for example 'w4g128', 'w8cs', 'w3g64f', 'w4g128-bf16', 'w8cs-a8s'; or 'w8a8' or 'w4a8'"
)


@dataclasses.dataclass(frozen=True)
class Activations:
    """How the inputs of a layer are quantized, to 8 bits.

    Args:
        static: whether one scale, found beforehand, serves all tokens; else each token gets its own as it comes.
        symmetric: absmax, without a zero; else an integer zero goes with each scale.
    """

    static: bool = False
    symmetric: bool = True

    @property
    def levels(self) -> float:
        """Steps of a scale from zero (symmetric), or from the middle (affine), to the end of a range: codes of int8."""
        return 127.0 if self.symmetric else 127.5

    def __str__(self) -> str:
        return "a8" + ("t" if self.static else "") + ("s" if self.symmetric else "")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How weights are quantized; hashable, and equal when every field is equal.

    Args:
        bits: bits per code, 1 to 8.
        group_size: how many consecutive weights along K share a scale (a multiple of 16; the last group of a row may
            be shorter), or "channel" for one scale per row, or "tensor" for one scale in all.
        value_map: "affine" (integer zero), "symmetric" (absmax, no stored zero) or "offset" (float offset).
        scale_dtype: storage dtype of scales and offsets: torch.float16, torch.bfloat16 or torch.float32.
        activations: how inputs of the layer are quantized, for weights of 4 or 8 bits with integer zeros; None: not.

    Raises:
        TypeError, ValueError: a field is not one of the above; the message lists what is accepted.
    """

    bits: int
    group_size: GroupSize
    value_map: ValueMap = "affine"
    scale_dtype: torch.dtype = torch.float16
    activations: Activations | None = None
    _text: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool):
            raise TypeError(f"bits must be an int from 1 to 8, got {self.bits!r}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, got {self.bits}")
        if self.value_map not in _MAP_SUFFIX:
            raise ValueError(f"value_map must be one of {', '.join(map(repr, _MAP_SUFFIX))}, got {self.value_map!r}")
        if self.value_map == "symmetric" and self.bits == 1:
            raise ValueError(
                "a symmetric scheme needs bits from 2 to 8: one bit has no level on both sides of zero; "
                "'f' (float offset) gives two levels per group"
            )
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, (int, str)):
            raise TypeError(f"group_size must be an int, 'channel' or 'tensor', got {self.group_size!r}")
        if isinstance(self.group_size, str):
            if self.group_size not in ("channel", "tensor"):
                raise ValueError(f"group_size must be an int, 'channel' or 'tensor', got {self.group_size!r}")
        elif self.group_size < GROUP_MULTIPLE or self.group_size % GROUP_MULTIPLE:
            raise ValueError(f"group_size must be a positive multiple of {GROUP_MULTIPLE}, got {self.group_size}")
        if self.scale_dtype not in _DTYPE_SUFFIX:
            raise ValueError(
                f"scale_dtype must be one of {', '.join(map(str, _DTYPE_SUFFIX))}, got {self.scale_dtype!r}"
            )
        if self.activations is not None:
            if not isinstance(self.activations, Activations):
                raise TypeError(f"activations must be qkernels.Activations or None, got {self.activations!r}")
            if self.bits not in ACTIVATION_BITS or self.value_map == "offset":
                raise ValueError(
                    "quantized activations meet weights of 4 or 8 bits that are symmetric or have integer zeros, got "
                    f"{self.bits} bits, {self.value_map}"
                )
        group = self.group_size[0] if isinstance(self.group_size, str) else f"g{self.group_size}"
        dtype = "" if self.scale_dtype is torch.float16 else f"-{_DTYPE_SUFFIX[self.scale_dtype]}"
        # Once, not in __str__: every matmul asks for it, and torch.compile cannot format symbolic sizes.
        inputs = "" if self.activations is None else f"-{self.activations}"
        object.__setattr__(self, "_text", f"w{self.bits}{group}{_MAP_SUFFIX[self.value_map]}{dtype}{inputs}")

    @staticmethod
    def parse(text: str) -> Scheme:
        """Read a scheme string; `str(scheme)` writes it back.

        >>> Scheme.parse("w4g128")
        Scheme(bits=4, group_size=128, value_map='affine', scale_dtype=torch.float16, activations=None)
        >>> str(Scheme.parse("w8a8"))
        'w8cs-a8s'
        """
        if not isinstance(text, str):
            raise TypeError(f"a scheme string is a str, got {type(text).__name__}; accepted: {ACCEPTED}")
        found = _parsed.get(text)
        if found is None:
            if len(_parsed) >= _MOST_PARSED:
                _parsed.clear()
            found = _parsed[text] = _parse(text)
        return found

    def __str__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)  # Python keeps a string's hash: every matmul looks up its configuration

    # What follows from the fields; no other module works these out for itself.

    @property
    def code_min(self) -> int:
        """Lowest code that quantizing gives. Symmetric leaves code 0 unused, so that +absmax and -absmax both fit."""
        return 1 if self.value_map == "symmetric" else 0

    @property
    def code_max(self) -> int:
        """Highest code."""
        return 2**self.bits - 1

    @property
    def center(self) -> int:
        """The code in the middle, 2**(bits - 1): the zero of a symmetric scheme."""
        return 2 ** (self.bits - 1)

    @property
    def weight_only(self) -> Scheme:
        """The same for weights, with activations left as they are."""
        return dataclasses.replace(self, activations=None) if self.activations is not None else self

    @property
    def dynamic(self) -> Scheme:
        """The same, but each token with a scale of its own, where activations have static ones."""
        if self.activations is None or not self.activations.static:
            return self
        return dataclasses.replace(self, activations=dataclasses.replace(self.activations, static=False))

    @property
    def is_static(self) -> bool:
        """Whether activations are quantized by one scale for all tokens, which a weight then carries along."""
        return self.activations is not None and self.activations.static

    @property
    def zero_dtype(self) -> torch.dtype | None:
        """Storage dtype of the tensor that goes with the scales: integer zeros, float offsets, or none (symmetric)."""
        return {"symmetric": None, "affine": torch.uint8, "offset": self.scale_dtype}[self.value_map]

    def group_length(self, in_features: int) -> int:
        """Weights along K that share a scale: group_size, or all of K for "channel" and "tensor"."""
        return self.group_size if isinstance(self.group_size, int) else in_features

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(groups along K, N); (1, 1) per tensor. K = 0 has no groups.

        Groups come first, so that the scales of neighbouring rows lie side by side for a kernel's tile of rows.
        """
        if in_features == 0:
            return 0, 1 if self.group_size == "tensor" else out_features
        if self.group_size == "tensor":
            return 1, 1
        return -(-in_features // self.group_length(in_features)), out_features


# Not functools.lru_cache: torch.compile finds a scheme here, where that would make it trace the parsing.
_parsed: dict[str, Scheme] = {}
_MOST_PARSED = 1024


def _parse(text: str) -> Scheme:
    match = _PATTERN.fullmatch(_NAMED.get(text, text))
    if not match:
        raise ValueError(f"{text!r} is not a scheme; accepted: {ACCEPTED}")
    units: dict[str, GroupSize] = {"c": "channel", "t": "tensor"}
    try:
        return Scheme(
            bits=int(match["bits"]),
            group_size=units[match["unit"]] if match["unit"] else int(match["group"]),
            value_map=next(value_map for value_map, suffix in _MAP_SUFFIX.items() if suffix == match["map"]),
            scale_dtype=next((d for d, s in _DTYPE_SUFFIX.items() if s == match["dtype"]), torch.float16),
            activations=Activations(bool(match["static"]), bool(match["symmetric"])) if match["activations"] else None,
        )
    except ValueError as error:
        raise ValueError(f"{text!r} is not a scheme: {error}; accepted: {ACCEPTED}") from None


def as_scheme(scheme: str | Scheme) -> Scheme:
    """A Scheme from a Scheme or its string."""
    return scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
