"""Tables of configurations that were measured best on a GPU: which there are, and what they say of a problem.

`qkernels tune` writes them; see tune.py. A table that the user made on this machine comes before the one in the
package. A file is one JSON object:

    device     as the driver names it; the file is named after it
    measured   {what: value}: date, versions, settings
    entries    a list of {scheme, dtype, out_features, in_features, tokens, kind, config, us, default_us, dense_us}:
               config holds the fields of MatmulConfig (kind "fused") or DenseConfig (kind "dense"), us is its time,
               default_us that of what would have been launched without a table, and dense_us, null where it was not
               measured, that of cuBLAS with a weight of x's dtype
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qkernels.files import cache_directory, replacing
from qkernels.scheme import Scheme
from qkernels.tuning.configs import DenseConfig, MatmulConfig
from qkernels.tuning.devices import Device

SHIPPED = pathlib.Path(__file__).parent / "data"
_KINDS: dict[str, type[MatmulConfig] | type[DenseConfig]] = {"fused": MatmulConfig, "dense": DenseConfig}
_FARTHEST = math.log(2)  # a shape is like another one if neither side is more than twice as long


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was best for one problem, and the microseconds it took; see the module for the fields."""

    scheme: str
    dtype: str
    out_features: int
    in_features: int
    tokens: int
    config: MatmulConfig | DenseConfig
    us: float
    default_us: float
    dense_us: float | None = None


def user_path(device: Device) -> pathlib.Path:
    """Where `qkernels tune` writes: in $QKERNELS_CACHE, else in qkernels in the user's cache directory."""
    return cache_directory() / "tuning" / f"{device.slug}.json"


def lookup(
    tokens: int, out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype, device: Device
) -> MatmulConfig | DenseConfig | None:
    """The entry of the same scheme and dtype whose shape is nearest, and whose tokens are the next not below.

    None where no table of this GPU has a shape like it, or one with so many tokens.
    """
    entries = _by_kind(device).get((_kind(scheme), dtype))
    if not entries:
        return None
    # a shape beyond _FARTHEST, or fewer tokens than asked for, is no guide
    shape, distance = min(
        ((shape, _distance(shape, (out_features, in_features))) for shape in entries), key=lambda pair: pair[1]
    )
    if distance > _FARTHEST:
        return None
    config = next((config for most, config in entries[shape] if tokens <= most), None)
    return config if config is not None and fits(config, scheme, dtype, tokens, in_features) else None


def read(path: pathlib.Path) -> list[Entry]:
    """The entries of a table.

    Raises:
        ValueError: the file is no such table; the message names it and says what is wrong.
    """
    try:
        found = []
        for raw in json.loads(path.read_text())["entries"]:
            fields = {field: raw[field] for field in raw if field not in ("kind", "config")}
            entry = Entry(**fields, config=_KINDS[raw["kind"]](**raw["config"]))
            if not isinstance(getattr(torch, entry.dtype), torch.dtype) or entry.tokens < 1:
                raise ValueError(f"dtype {entry.dtype!r} or tokens {entry.tokens!r}")
            check(entry.config)
            Scheme.parse(entry.scheme)
            found.append(entry)
        return found
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of configurations: {type(error).__name__}: {error}") from None


def check(config: MatmulConfig | DenseConfig) -> None:
    """THE statement of which configurations are possible at all.

    Raises:
        ValueError: a field is out of its range.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "scale_weights" and isinstance(value, bool):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{field.name} must be a positive int, got {value!r}")
    if isinstance(config, MatmulConfig):
        for name in ("block_m", "block_n", "blocks", "num_warps"):
            if getattr(config, name) & (getattr(config, name) - 1):
                raise ValueError(f"{name} must be a power of two, got {getattr(config, name)}")
        if config.block_m < 8 or config.block_n < 16:
            raise ValueError(f"block_m must be at least 8 and block_n 16, got {config.block_m} and {config.block_n}")
        if not 24 <= config.max_registers <= 255:
            raise ValueError(f"max_registers must be from 24 to 255, got {config.max_registers}")


def fits(config: MatmulConfig | DenseConfig, scheme: Scheme, dtype: torch.dtype, tokens: int, in_features: int) -> bool:
    """Whether a configuration can serve a product.

    Scaling weights needs scales of x's own 16-bit dtype, groups to have different ones, no offsets, and x as it is.
    Where activations are quantized a dense product is torch._int_mm's: of symmetric codes of 8 bits with one scale for
    a row, more than 16 tokens, and whole blocks of k.
    """
    if isinstance(config, DenseConfig):
        if scheme.activations is None:
            return True
        symmetric = scheme.value_map == "symmetric" and scheme.activations.symmetric
        one_group = scheme.group_length(in_features) >= in_features
        return scheme.bits == 8 and symmetric and one_group and tokens > 16 and in_features % 64 == 0
    if not config.scale_weights:
        return True
    if scheme.activations is not None:
        return False
    grouped = isinstance(scheme.group_size, int) and scheme.value_map != "offset"
    return grouped and scheme.scale_dtype is dtype and dtype is not torch.float32


def write(path: pathlib.Path, device: Device, measured: Mapping[str, Any], entries: Iterable[Entry]) -> None:
    """Write a table; a file that is there is replaced in one step."""
    records = []
    for entry in entries:
        record = dataclasses.asdict(entry)
        record["kind"] = next(kind for kind, cls in _KINDS.items() if isinstance(entry.config, cls))
        records.append(record)
    text = json.dumps({"device": device.name, "measured": dict(measured), "entries": records}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text)
    forget()


def forget() -> None:
    """Read tables again when next asked."""
    _by_kind.cache_clear()


Shape = tuple[int, int]


@functools.cache
def _by_kind(device: Device) -> dict[tuple[Any, ...], dict[Shape, list[tuple[int, MatmulConfig | DenseConfig]]]]:
    """{(kind of scheme, dtype): {(out_features, in_features): [(most tokens, config), ...], fewest first}}."""
    found: dict[tuple[Any, ...], dict[Shape, list[tuple[int, MatmulConfig | DenseConfig]]]] = {}
    for path in (user_path(device), SHIPPED / f"{device.slug}.json"):
        if not path.is_file():
            continue
        own: dict[tuple[Any, ...], dict[Shape, list[tuple[int, MatmulConfig | DenseConfig]]]] = {}
        for entry in read(path):
            key = _kind(Scheme.parse(entry.scheme)), getattr(torch, entry.dtype)
            rows = own.setdefault(key, {}).setdefault((entry.out_features, entry.in_features), [])
            rows.append((entry.tokens, entry.config))
        for key, shapes in own.items():
            for shape, rows in shapes.items():
                found.setdefault(key, {}).setdefault(shape, sorted(rows, key=lambda row: row[0]))
    return found


def _kind(scheme: Scheme) -> tuple[int, str | int, str, bool | None]:
    """What of a scheme decides which configuration is best: one scale for a channel or for all costs the same."""
    group = "channel" if isinstance(scheme.group_size, str) else scheme.group_size
    return scheme.bits, group, scheme.value_map, None if scheme.activations is None else scheme.activations.symmetric


def _distance(a: Shape, b: Shape) -> float:
    return max(abs(math.log(p / q)) for p, q in zip(a, b, strict=True))
