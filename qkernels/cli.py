"""The command line: demo, quantize, convert, inspect, report, tune."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from qkernels import fit

# Names that hold 2-D weights which are not Linears, or which suffer most.
SKIPPED_NAMES = ("*embed*", "*lm_head*", "*wte*", "*wpe*", "*norm*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `qkernels`; the exit status is 0, 2 with one line on stderr, or 130 where interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # whoever reads what is printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"qkernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qkernels: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qkernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"qkernels {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="quantize a real language model, see what each scheme loses and saves, and let one answer"
    )
    demo.add_argument("--quick", action="store_true", help="three schemes, two windows: under a minute")
    demo.add_argument("--model", type=pathlib.Path, metavar="PATH", help="your own: a GGUF file or a model's folder")
    demo.add_argument("--text", type=pathlib.Path, metavar="FILE", help="your own text to predict, UTF-8")
    demo.add_argument("--schemes", nargs="+", metavar="SCHEME", help="such as w4g128 w3g64 w8cs")
    demo.add_argument("--windows", type=positive_int, metavar="N", help="how many windows of 512 tokens to predict")
    demo.add_argument("--tokens", type=positive_int, metavar="N", help="longest answer (default 48, quick 24)")
    demo.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    demo.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("qkernels-demo"), metavar="DIR", help="for figures and plots"
    )
    demo.set_defaults(run=_demo)

    quantize = commands.add_parser(
        "quantize",
        help="quantize the 2-D weights of a safetensors file",
        description="Quantize every 2-D floating tensor whose name ends in 'weight', or those of a plan; others are "
        "copied.",
    )
    quantize.add_argument("input", type=pathlib.Path, help="a safetensors file")
    quantize.add_argument("output", type=pathlib.Path, help="the file to write")
    which = quantize.add_mutually_exclusive_group(required=True)
    which.add_argument("--scheme", help="such as w4g128, or w8a8, whose activations are quantized as they come")
    which.add_argument(
        "--plan", type=pathlib.Path, metavar="FILE", help="a scheme for each layer: what Plan.save wrote"
    )
    quantize.add_argument(
        "--method", choices=fit.METHODS, default="rtn",
        help="rtn rounds to nearest (default); search tries ranges, zeros and scales, which pays at 3 bits and below; "
        "hqq moves zeros",
    )  # fmt: skip
    quantize.add_argument(
        "--skip", action="append", metavar="PATTERN",
        help=f"names of tensors to leave alone; may be repeated (default: {' '.join(SKIPPED_NAMES)})",
    )  # fmt: skip
    quantize.set_defaults(run=_quantize)

    convert = commands.add_parser(
        "convert",
        help="make files of quantized weights of other packages our own, with the same values",
        description="Write what another package quantized, or a GGUF file, as what qkernels writes. Nothing is "
        "quantized again. A folder in Hugging Face's layout becomes a folder, a file a file.",
    )
    convert.add_argument("input", type=pathlib.Path, help="a folder, or a safetensors or GGUF file")
    convert.add_argument("output", type=pathlib.Path, help="the folder or file to write; a folder must be new or empty")
    convert.add_argument(
        "--max-shard-size", type=byte_count, default="2GB", metavar="SIZE",
        help="of tensors in a file of a folder, such as 500MB; so much memory is used (default 2GB)",
    )  # fmt: skip
    convert.set_defaults(run=_convert)

    inspect = commands.add_parser(
        "inspect", help="list what a file or folder of quantized weights holds, also GGUF, and check it"
    )
    inspect.add_argument("file", type=pathlib.Path, metavar="PATH")
    inspect.set_defaults(run=_inspect)

    report = commands.add_parser(
        "report",
        help="what quantizing cost: layer by layer, and, for a language model, its predictions",
        description="Compare what qkernels wrote with the model it came from: against a safetensors file weights "
        "alone, against a language model also outputs of layers on a text, perplexity and KL.",
    )
    report.add_argument("quantized", type=pathlib.Path, metavar="DIR", help="a file that qkernels wrote, or its folder")
    report.add_argument(
        "--reference", type=pathlib.Path, metavar="PATH", required=True,
        help="unquantized: a safetensors file, a GGUF file or a language model's folder",
    )  # fmt: skip
    report.add_argument("--text", type=pathlib.Path, metavar="FILE", help="to predict, UTF-8 (default: the demo's)")
    report.add_argument("--windows", type=positive_int, metavar="N", help="how many of 512 tokens (default 8)")
    report.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="for report.csv, report.html and pictures")
    report.set_defaults(run=_report)

    tune = commands.add_parser(
        "tune",
        help="find the fastest configurations on this GPU, and keep them",
        description="Time configurations of the matmul kernel on this machine's GPU, each proved exact first, and "
        "write the best to a table that every later product on such a GPU looks into.",
    )
    tune.add_argument("--models", nargs="+", metavar="NAME", help="whose layers (default Llama-3-8B, if no --shapes)")
    tune.add_argument("--shapes", nargs="+", metavar="NxK", default=[], help="of weights, such as 4096x14336")
    tune.add_argument("--schemes", nargs="+", default=["w4g128"], metavar="SCHEME", help="default: w4g128")
    tune.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16"], help="of x; default bfloat16"
    )
    tune.add_argument(
        "--tokens", nargs="+", type=positive_int, metavar="M",
        help="default: powers of two up to 1024, up to 8192 where activations are quantized",
    )  # fmt: skip
    tune.add_argument("--minutes", type=float, default=30, help="begin no new problem after; default 30")
    tune.add_argument(
        "--out", type=pathlib.Path, metavar="FILE", help="the table (default: the one that is looked into)"
    )
    tune.set_defaults(run=_tune)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("qkernels")
    except importlib.metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


def positive_int(text: str) -> int:
    """An argument type; argparse shows its name."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def byte_count(text: str) -> int:
    """An argument type, such as 500MB; argparse shows its name."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([kKMGT]?)B?", text)
    count = 0 if match is None else int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be bytes, such as 2GB or 500MB, got {text!r}")
    return count


def _demo(options: argparse.Namespace) -> None:
    try:
        import gguf  # noqa: F401
        import matplotlib  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the demo needs {error.name}: pip install 'qkernels[demo]'") from None
    from qkernels.demo import story

    story.run(options)


def _quantize(options: argparse.Namespace) -> None:
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm

    from qkernels import tables
    from qkernels.checks import DTYPES
    from qkernels.formats import native
    from qkernels.planning.result import Plan
    from qkernels.scheme import Scheme
    from qkernels.tensor import QTensor, quantize

    if options.plan is not None and options.skip:
        raise ValueError("--skip is for --scheme: a plan names the layers that it quantizes")
    plan = None if options.plan is None else Plan.load(options.plan)
    scheme = None if plan is not None else Scheme.parse(options.scheme)
    for asked in (scheme,) if plan is None else (layer.scheme for layer in plan.layers):
        if asked is not None and asked.is_static:
            raise ValueError(
                f"{asked} has static activations, whose scale calibration finds, which a file of weights cannot be run "
                "for: use qkernels.quantize_model(model, ..., calibration=...), or take dynamic ones, such as w8a8"
            )
    if options.output.exists() and options.output.samefile(options.input):
        raise ValueError(f"{options.output} is the input itself: choose another name")
    native.check_writable(options.output)
    tensors: dict[str, Any] = {}
    before = after = 0
    try:
        with open(options.input, "rb"), safe_open(options.input, framework="pt") as file:
            if "qkernels" in (file.metadata() or {}):
                raise native.FormatError(f"{options.input}: already quantized; see qkernels inspect")
            names = list(file.keys())
            for pattern in options.skip or ():
                if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"--skip {pattern} fits no tensor in {options.input}")
            planned = {} if plan is None else {f"{layer.name}.weight": layer for layer in plan.layers}
            if missing := planned.keys() - set(names):
                raise ValueError(f"{options.input} holds no {min(missing)}, which {options.plan} names")
            for name in tqdm(names, desc="quantizing", unit="tensor", leave=False):
                tensor = file.get_tensor(name)
                skipped = any(fnmatch.fnmatchcase(name, pattern) for pattern in options.skip or SKIPPED_NAMES)
                fits = tensor.ndim == 2 and tensor.dtype in DTYPES and name.endswith("weight") and not skipped
                chosen = planned[name].scheme if name in planned else scheme if fits else None
                if chosen is None:
                    tensors[name] = tensor
                    continue
                try:
                    if plan is not None:
                        plan.check({planned[name].name: tuple(tensor.shape)})
                    tensors[name] = quantize(tensor, chosen, method=options.method)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{name}: {error}") from None
                before += tensor.nbytes
                after += tensors[name].nbytes
    except SafetensorError as error:
        raise native.FormatError(f"{options.input}: not a whole safetensors file: {error}") from None
    if not before:
        raise ValueError(f"{options.input} holds no 2-D float16, bfloat16 or float32 weight that --skip leaves")
    native.write(options.output, tensors)
    count = sum(isinstance(t, QTensor) for t in tensors.values())
    print(
        f"{count} of {len(tensors)} tensors to {scheme or options.plan}: {tables.size(before)} -> {tables.size(after)}"
    )


def _convert(options: argparse.Namespace) -> None:
    from qkernels import tables
    from qkernels.convert import convert

    done = convert(options.input, options.output, options.max_shard_size)
    sizes = f"{tables.size(done.bytes_before)} -> {tables.size(done.bytes_after)}"
    left = f"; not copied: {', '.join(done.left)}" if done.left else ""
    print(f"{done.tensors} tensors, {done.quantized} of them quantized: {sizes}{left}")


def _inspect(options: argparse.Namespace) -> None:
    from qkernels import formats, tables
    from qkernels.tensor import QTensor

    rows: list[tuple[str, ...]] = []
    total = 0
    for name, tensor in formats.stream(options.file):
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        if isinstance(tensor, QTensor):
            rows.append((name, str(tensor.scheme), shape, tables.size(tensor.nbytes), f"{tensor.bits_per_weight:.2f}"))
        else:
            dtype = str(tensor.dtype).removeprefix("torch.")
            rows.append((name, dtype, shape, tables.size(tensor.nbytes), f"{8 * tensor.element_size():.2f}"))
        total += tensor.nbytes
        del tensor  # before the next is read
    columns = ("tensor", "scheme or dtype", "shape", "size", "bits/weight")
    title = f"{options.file}: {len(rows)} tensors, {tables.size(total)}, every field checked"
    print(tables.text(title, columns, rows, text_columns=2))


def _report(options: argparse.Namespace) -> None:
    from qkernels.reporting import command

    command.run(options)


def _tune(options: argparse.Namespace) -> None:
    from qkernels import tune
    from qkernels.tuning.problems import MODELS

    shapes = [_shape(text) for text in options.shapes]
    for name in options.models or ([] if shapes else ["Llama-3-8B"]):
        if name not in MODELS:
            raise ValueError(f"--models {name!r} is not one of {', '.join(MODELS)}")
        shapes += [(layer.N, layer.K) for layer in MODELS[name]]
    wanted = tune.problems(shapes, options.schemes, options.dtypes, options.tokens)
    tune.run(list(wanted), options.out, options.minutes * 60, print)


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not match:
        raise ValueError(f"--shapes takes NxK, such as 4096x14336, got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
