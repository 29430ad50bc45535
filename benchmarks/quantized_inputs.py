"""What it costs to quantize inputs of layers, too, to 8 bits: on the models and texts of benchmarks.accuracy.

    python -m benchmarks.quantized_inputs

One result file holds one entry per model and row of the table, and is written after each. The same command, run again,
measures only what is missing. Weights of 8 bits are rounded to nearest, so that rows differ by their inputs alone.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import accuracy, harness
from benchmarks.subjects import SUBJECTS, Encoder, LanguageModel, Subject
from qkernels import reference_int8
from qkernels.calibrate.batches import CalibrationError
from qkernels.model import quantize_model
from qkernels.nn import QuantLinear
from qkernels.replace import places
from qkernels.scheme import Scheme

RESULT = harness.RESULTS / "accuracy/quantized_inputs.json"
KIND = "quantized-inputs"
TORCHAO = "torchao"  # Int8DynamicActivationInt8WeightConfig: one scale for each token, and for each row of weights

# (scheme, what else is done) -> options of quantize_model; a scheme without activations is what they are held against
ROWS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("w8cs", ""): {"method": "rtn"},
    ("w8cs-a8s", ""): {"method": "rtn"},
    ("w8cs-a8s", "smoothquant"): {"method": "rtn", "smooth": "smoothquant"},
    ("w8cs-a8s", "fallback 0.05"): {"method": "rtn", "fallback": 0.05},
    ("w8cs-a8s", TORCHAO): {},
    ("w8cs-a8", ""): {"method": "rtn"},
    ("w8cs-a8ts", "minmax"): {"method": "rtn", "ranges": "minmax"},
    ("w8cs-a8ts", "percentile"): {"method": "rtn", "ranges": "percentile"},
    ("w8cs-a8ts", "mse"): {"method": "rtn", "ranges": "mse"},
    ("w8cs-a8ts", "mse, smoothquant"): {"method": "rtn", "ranges": "mse", "smooth": "smoothquant"},
    ("w8cs-a8ts", "mse, fallback 0.05"): {"method": "rtn", "ranges": "mse", "fallback": 0.05},
    ("w8cs-a8ts", "mse, smoothquant, fallback 0.05"): {
        "method": "rtn", "ranges": "mse", "smooth": "smoothquant", "fallback": 0.05,
    },
    ("w8cs-a8t", "mse"): {"method": "rtn", "ranges": "mse"},
    ("w4g128", ""): {"method": "search"},
    ("w4g128-a8s", ""): {"method": "search"},
}  # fmt: skip


class QuantizedInput(nn.Module):
    """A layer's product, in float32, with what codes of inputs and weights stand for: no codes are multiplied.

    That is what a QuantLinear gives but for float32's rounding of sums, in the time of a float product.
    """

    def __init__(self, layer: QuantLinear):
        super().__init__()
        q = layer.qweight
        self.weight, self.bias, self.how, self.static = q.dequantize(), layer.bias, q.scheme.activations, q.activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) float32 -> (..., out_features)."""
        if self.how is not None:
            code = reference_int8.quantize_activations(x.reshape(-1, x.shape[-1]), self.how, self.static)
            x = reference_int8.dequantize_activations(*code).reshape(x.shape)
        return nn.functional.linear(x, self.weight, self.bias)


def replace_layers(model: nn.Module) -> None:
    """Put a QuantizedInput in the place of each QuantLinear."""
    where = places(model)
    for layer in [m for m in model.modules() if isinstance(m, QuantLinear)]:
        for parent, name in where[layer]:
            setattr(parent, name, QuantizedInput(layer))


def measure(subject: Subject, scheme: str, how: str) -> harness.Record:
    """Quantize a copy, and score it."""
    model = copy.deepcopy(subject.model)
    start = time.perf_counter()
    if how == TORCHAO:
        if importlib.util.find_spec("torchao") is None:
            return {"skipped": "not installed"}
        layers = inputs = len(set(_by_torchao(model)))
        static = 0
    else:
        options = dict(ROWS[scheme, how])
        if options["method"] != "rtn" or len(options) > 1:
            options["calibration"] = subject.calibration
        try:
            report = quantize_model(model, scheme, progress=False, **options)
        except CalibrationError as error:
            return {"skipped": str(error)}
        schemes = [Scheme.parse(layer.scheme) for layer in report.layers]
        layers, inputs = len(schemes), sum(s.activations is not None for s in schemes)
        static = sum(s.is_static for s in schemes)
        replace_layers(model)
    seconds = time.perf_counter() - start
    counts = {"layers": layers, "quantized_inputs": inputs, "static_inputs": static}
    return {"seconds": round(seconds, 1), **counts, **subject.score(model)}


def _by_torchao(model: nn.Module) -> Sequence[str]:
    """Quantize in place what quantize_model takes; names of layers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    names = [name for name, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in name]
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in names)
    return names


def run(path: pathlib.Path, found: Sequence[Subject], rows: Sequence[tuple[str, str]]) -> harness.Record:
    """Measure what is missing in the file, and write it after each; returns the record.

    Raises:
        ValueError: the file holds scores over other windows or sentences, which do not compare.
    """
    machine = {**harness.machine(), "torchao": harness.version("torchao")}
    record = {"models": {}, "entries": [], **harness.header(KIND, "all", machine, None)}
    if path.exists():
        record |= json.loads(path.read_text())
    for subject in found:
        known = record["models"].setdefault(subject.name, {"about": subject.about, **subject.score(subject.model)})
        if known["about"] != subject.about:
            raise ValueError(
                f"{path} holds {subject.name} over {known['about']}, not {subject.about}: name another file"
            )
    for scheme, how in rows:
        for subject in found:
            key = {"model": subject.name, "scheme": scheme, "how": how}
            if any(key.items() <= entry.items() for entry in record["entries"]):
                continue
            entry = {
                **key,
                **measure(subject, scheme, how),
                "threads": torch.get_num_threads(),
                "date": harness.today(),
            }
            record["entries"].append(entry | {"commit": harness.commit()})
            record |= {"date": harness.today(), "machine": machine}
            harness.write(path, record)
            print(line(entry), flush=True)
    return record


def line(entry: harness.Record) -> str:
    """One entry for a terminal."""
    start = f"{entry['model']} {entry['scheme']} {entry['how']}: "
    if "skipped" in entry:
        return start + str(entry["skipped"])
    figures = (
        f"{heading} {accuracy.with_error(entry, key)}" for key, heading in SUBJECTS[entry["model"]].metrics.items()
    )
    counts = (
        f"{entry['quantized_inputs']} of {entry['layers']} layers quantized, {entry['static_inputs']} of them static"
    )
    return f"{start}{', '.join(figures)}; inputs of {counts}, {entry['seconds']} s"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized_inputs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--windows", type=int, default=16, help="of the language model's text")
    parser.add_argument("--sentences", type=int, default=600, help="of the encoder's text")
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, help="the result file")
    options = parser.parse_args(arguments)
    # Fewer to learn from than in benchmarks.accuracy: ranges need less than second moments do.
    makers: Mapping[str, Callable[[], Subject]] = {
        LanguageModel.name: lambda: LanguageModel(options.windows, 12),
        Encoder.name: lambda: Encoder(options.sentences, 480),
    }
    try:
        run(options.out, [makers[name]() for name in options.models], list(ROWS))
    except ValueError as error:
        parser.error(str(error))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
