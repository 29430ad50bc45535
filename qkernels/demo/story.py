"""The demo itself: quantize, predict, compare, answer, draw."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pathlib
import platform
import time
from typing import Any

import torch
from torch import Tensor

from qkernels import plots, tables
from qkernels.demo import fetch, language_model
from qkernels.model import quantize_model
from qkernels.quality import PredictionScore
from qkernels.scheme import Scheme
from qkernels.summary import QuantizationReport

# Each row adds one idea: scales per tensor, per channel, per group; zero points; fewer bits.
SCHEMES = ("w8ts", "w8cs", "w4ts", "w4cs", "w4g128s", "w4g128", "w4g64", "w4g32f", "w3g64", "w2g64")
QUICK_SCHEMES = ("w8cs", "w4g128", "w2g64")
WINDOWS, QUICK_WINDOWS = 8, 2
TOKENS, QUICK_TOKENS = 48, 24
COLUMNS = ("scheme", "size", "bits/weight", "SNR dB", "perplexity", "KL", "seconds")
QUESTION = "What is the capital of France, and what is it known for?"


@dataclasses.dataclass
class _Variant:
    """The model under one scheme; embeddings and norms are shared with the original."""

    model: Any
    report: QuantizationReport
    score: PredictionScore = dataclasses.field(default_factory=PredictionScore)
    seconds: float = 0.0


def run(options: argparse.Namespace) -> None:
    """Carry out `qkernels demo`; cli.py says what the options are."""
    from rich.console import Console

    console = Console(highlight=False)
    device = _device(options.device)
    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {options.out} is not a folder")
    schemes = [Scheme.parse(s) for s in options.schemes or (QUICK_SCHEMES if options.quick else SCHEMES)]
    with console.status("fetching model and text (once, about 100 MB)"):
        text_path = options.text or fetch.fetch(fetch.LCET10)
        model_path = options.model or fetch.fetch(fetch.SMOLLM2)
    text = pathlib.Path(text_path).read_text(encoding="utf-8", errors="replace")
    with console.status(f"loading {model_path}"):
        model, tokenizer = language_model.load(model_path, device)
        windows = language_model.windows(
            text, tokenizer, options.windows or (QUICK_WINDOWS if options.quick else WINDOWS)
        )
    name = model_path.stem if model_path.is_file() else model_path.resolve().name
    console.print(f"{name} on {device}; {windows.shape[0]} windows of {windows.shape[1]} tokens of {text_path.name}")

    variants = {str(scheme): _quantized_copy(model, scheme) for scheme in schemes}
    original = _predict_all(model, variants, windows.to(device))
    record = _record(name, str(text_path.name), device, windows, original, variants)
    console.print()
    title = f"{record['layers']} linear layers, {record['weights'] / 1e6:.0f} M weights"
    console.print(tables.text(title, COLUMNS, rows(record)) + "\n", markup=False, soft_wrap=True)

    chosen = next((name for name in ("w4g64", "w4g128") if name in variants), str(schemes[0]))
    console.print(f"[bold]{chosen}[/bold] answers, its layers multiplying packed codes:")
    console.print(f"> {QUESTION}")
    start = time.perf_counter()
    longest = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    tokens = language_model.answer(variants[chosen].model, tokenizer, QUESTION, longest)
    seconds = time.perf_counter() - start
    console.print(f"({tokens} tokens, {tokens / seconds:.1f} per second)\n")

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    plots.perplexity_against_size(
        options.out / "perplexity.png",
        title=f"{name}: what bits and scales buy",
        original=(record["original"]["nbytes"], original.perplexity),
        points=[(r["scheme"], r["nbytes"], r["perplexity"]) for r in record["results"]],
    )
    layer, row = plots.row_with_largest_outlier(model)
    plots.outlier_row(options.out / "outlier.png", layer, dict(model.named_modules())[layer].weight, row)
    console.print(f"saved demo.json, perplexity.png and outlier.png in {options.out}", soft_wrap=True)


def _device(wanted: str | None) -> str:
    """ "cuda" or "cpu", as wanted or as there is."""
    has_gpu = torch.cuda.is_available()
    if wanted is None:
        return "cuda" if has_gpu else "cpu"
    if torch.device(wanted).type not in ("cpu", "cuda") or (wanted.startswith("cuda") and not has_gpu):
        raise ValueError(f"--device must be cpu{' or cuda' if has_gpu else ', as torch finds no GPU'}, got {wanted!r}")
    return wanted


def _quantized_copy(model: Any, scheme: Scheme) -> _Variant:
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    variant = copy.deepcopy(model, shared)  # modules are copied, tensors are not
    return _Variant(variant, quantize_model(variant, scheme, method="rtn"))


def _predict_all(model: Any, variants: dict[str, _Variant], windows: Tensor) -> PredictionScore:
    """Score every variant, and the original, on every window. Window by window: no logits are kept."""
    from tqdm import tqdm

    original = PredictionScore()
    with torch.inference_mode(), tqdm(total=len(windows) * (1 + len(variants)), desc="predicting", unit="run") as bar:
        for window in windows:
            targets = window[1:]
            reference = _log_probabilities(model, window)
            original.add(reference, targets)
            bar.update()
            for variant in variants.values():
                start = time.perf_counter()
                variant.score.add(_log_probabilities(variant.model, window), targets, reference)
                variant.seconds += time.perf_counter() - start
                bar.update()
    return original


def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    logits = model(window[None], use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _record(
    model: str, text: str, device: str, windows: Tensor, original: PredictionScore, variants: dict[str, _Variant]
) -> dict[str, Any]:
    """Everything that was measured, for demo.json; sizes count the quantized layers only, padding included."""
    layers = next(iter(variants.values())).report.layers
    return {
        "model": model,
        "text": text,
        "windows": list(windows.shape),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "layers": len(layers),
        "weights": sum(layer.weights for layer in layers),
        "original": {"nbytes": sum(layer.original_bytes for layer in layers), "perplexity": original.perplexity},
        "results": [
            {
                "scheme": name,
                "nbytes": variant.report.nbytes,
                "bits_per_weight": variant.report.bits_per_weight,
                "snr_db": variant.report.error.snr_db if variant.report.error.noise else None,  # nothing was lost
                "perplexity": variant.score.perplexity,
                "kl": variant.score.kl,
                "seconds": variant.report.seconds + variant.seconds,
            }
            for name, variant in variants.items()
        ],
    }


def rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a record, a row per scheme under COLUMNS; the unquantized model comes first."""
    original = record["original"]
    bits = 8 * original["nbytes"] / record["weights"]
    first = ("none", tables.size(original["nbytes"]), f"{bits:.2f}", "", number(original["perplexity"]), "0", "")
    return [
        first,
        *(
            (
                r["scheme"],
                tables.size(r["nbytes"]),
                f"{r['bits_per_weight']:.2f}",
                "lossless" if r["snr_db"] is None else f"{r['snr_db']:.1f}",
                number(r["perplexity"]),
                number(r["kl"]),
                f"{r['seconds']:.1f}",
            )
            for r in record["results"]
        ),
    ]


def number(value: float) -> str:
    """Four significant digits, without an exponent below a million."""
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
