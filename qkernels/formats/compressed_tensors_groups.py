"""What a compressed-tensors configuration says of the weight, and of the inputs, of each module.

config_groups names groups of modules that are quantized alike. Which one a module is of says its name: a target that is
the name; else a target that is a pattern ("re:", see pattern.py), the first in the order of the alphabet, as in the
package; else the class of the module, which a file does not tell: "Linear", or the only class that is targeted. So a
module of another class is taken for a Linear one, and refused where its tensors do not fit. Where all groups say the
same of both, targets are not looked at. `ignore` never is: what it names has no scales.

Source    the package compressed-tensors: QuantizationConfig, QuantizationScheme, QuantizationArgs and match_targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qkernels.formats.pattern import Pattern
from qkernels.formats.reader import field
from qkernels.scheme import ACTIVATION_BITS, Activations, GroupSize

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "naive-quantized")
MOST_PATTERN_CHARACTERS = 4096  # of all patterns together: each module is held against each

# Fields that do not change what weights are.
_FREE = {"ignore", "quantization_status", "global_compression_ratio", "version"} | {
    "run_compressed",
    "dequantize",
    "use_optimized_inference",
}
_CALIBRATION = {"observer", "observer_kwargs"}
_DTYPES = {"scale_dtype", "zp_dtype"}  # that tensors have


@dataclasses.dataclass(frozen=True)
class Group:
    """How weights, and the inputs that they meet, are quantized.

    Attributes:
        packed: their format is "pack-quantized", not one of int8 tensors.
        bits: 1 to 8.
        group_size: along K, or "channel" or "tensor".
        symmetric: there are no zeros.
        reordered: weight_g_idx may say which group an input feature is of.
        activations: how inputs are quantized; None: not.
    """

    packed: bool
    bits: int
    group_size: GroupSize
    symmetric: bool
    reordered: bool
    activations: Activations | None

    @property
    def center(self) -> int:
        """What a code has more than q."""
        return 2 ** (self.bits - 1)


class Groups:
    """The groups of a configuration.

    Raises:
        ValueError: it has a field that is not known, or a value that is not supported; named.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        known = {"quant_method", "format", "config_groups"} | _FREE
        sparsity, transforms = config.get("sparsity_config"), config.get("transform_config")
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") == "dense":
            known |= {"sparsity_config"}
        if isinstance(transforms, Mapping) and not transforms.get("config_groups"):
            known |= {"transform_config"}
        _refuse_others(config, known, "quantization_config")
        entries = config.get("config_groups")
        if not isinstance(entries, Mapping) or not entries:
            raise ValueError(f"quantization_config's config_groups must be an object of groups, got {entries!r:.100}")
        self._targets: dict[str, Group] = {}
        for name, entry in entries.items():
            targets, group = _entry(name, entry, config)
            self._targets.update(dict.fromkeys(targets, group))
        self._only = next(iter(self._targets.values())) if len(set(self._targets.values())) == 1 else None
        texts = [] if self._only else sorted(target for target in self._targets if target.startswith("re:"))
        if (total := sum(map(len, texts))) > MOST_PATTERN_CHARACTERS:
            raise ValueError(f"config_groups: patterns have {total} characters, more than {MOST_PATTERN_CHARACTERS}")
        self._patterns = [(Pattern(text.removeprefix("re:")), self._targets[text]) for text in texts]
        classes = {t: group for t, group in self._targets.items() if t.isidentifier() and t[0].isupper()}
        self._class = classes.get("Linear") or (next(iter(classes.values())) if len(classes) == 1 else None)

    def of(self, module: str) -> Group:
        """The group of a module; ValueError where no target is for it."""
        group = self._only or self._targets.get(module)
        group = group or next((group for pattern, group in self._patterns if pattern.matches(module)), self._class)
        if group is None:
            raise ValueError(f"config_groups: no target is for this module; there are {', '.join(self._targets):.200}")
        return group


def _refuse_others(config: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raise ValueError for a field that is not known and not null."""
    for name, value in config.items():
        if name not in known and value is not None:
            raise ValueError(f"{what} has {name!r:.100}: {value!r:.100}, which is not supported")


def _entry(name: str, entry: Any, config: Mapping[str, Any]) -> tuple[list[str], Group]:
    """(targets, group) of an entry of config_groups."""
    try:
        if not isinstance(entry, Mapping):
            raise ValueError(f"a group must be an object, got {entry!r:.100}")
        targets = entry.get("targets")
        if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"targets must be a list of strings, got {targets!r:.100}")
        return targets, _group(entry, config)
    except ValueError as error:
        raise ValueError(f"config_groups {name!r:.100}: {error}") from None


def _group(entry: Mapping[str, Any], config: Mapping[str, Any]) -> Group:
    _refuse_others(entry, {"targets", "weights", "input_activations", "format"}, "it")
    weights = entry.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"weights must be an object, got {weights!r:.100}")
    own = entry if entry.get("format") is not None else config
    packed = field(own, "format", (PACKED, *PLAIN)) == PACKED
    known = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder"} | _CALIBRATION | _DTYPES
    _refuse_others(weights, known, "weights")
    field(weights, "type", ("int",), "int")
    field(weights, "dynamic", (False,), False)
    actorder = field(weights, "actorder", (None, False, True, "weight", "static", "group", "dynamic"), None)
    bits = field(weights, "num_bits", tuple(range(1, 9)))
    return Group(
        packed,
        bits,
        _group_size(weights),
        field(weights, "symmetric", (True, False), True),
        actorder in (True, "group", "dynamic"),
        _activations(entry.get("input_activations"), bits),
    )


def _activations(given: Any, weight_bits: int) -> Activations | None:
    """Of input_activations, which meet weights of so many bits."""
    if given is None:
        return None
    try:
        if not isinstance(given, Mapping):
            raise ValueError(f"they must be an object, got {given!r:.100}")
        field(given, "num_bits", (8,))
        field(given, "type", ("int",), "int")
        dynamic = field(given, "dynamic", (True, False), False)
        named = given if given.get("strategy") is not None else {}  # else the package's default
        field(named, "strategy", ("token",) if dynamic else ("tensor",), "tensor")
        symmetric = field(given, "symmetric", (True, False), True)
        # Of a dynamic scale and zero, which no tensor holds, dtypes would say what they are rounded to.
        free = _DTYPES if not dynamic else {"zp_dtype"} if given.get("zp_dtype") == "torch.int8" else set()
        known = {"num_bits", "type", "symmetric", "strategy", "dynamic"} | _CALIBRATION | free
        _refuse_others(given, known, "it")
        if weight_bits not in ACTIVATION_BITS:
            raise ValueError(f"they meet weights of {weight_bits} bits")
    except ValueError as error:
        raise ValueError(
            f"input_activations: {error}; read are integers of 8 bits, dynamic with strategy 'token' or static with "
            "strategy 'tensor', that meet weights of 4 or 8 bits"
        ) from None
    return Activations(static=not dynamic, symmetric=symmetric)


def _group_size(weights: Mapping[str, Any]) -> GroupSize:
    """Of weights; a strategy that is not given is that of the size."""
    size = weights.get("group_size")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise ValueError(f"group_size must be a number of weights, -1 or null, got {size!r:.100}")
    given = weights if weights.get("strategy") is not None else {}
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(field(given, "strategy", ("group", "channel", "tensor"), default))
    if (strategy == "group") != (size is not None and size > 0):
        raise ValueError(f"group_size {size} does not go with strategy {strategy!r}")
    if strategy == "group":
        return int(weights["group_size"])
    return "channel" if strategy == "channel" else "tensor"
