"""`qkernels report`: a file that qkernels wrote, against a language model or a file of plain weights."""

from __future__ import annotations

import argparse
import copy
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qkernels import checkpoint
from qkernels.formats import native
from qkernels.reporting.measure import report
from qkernels.reporting.table import QualityReport

WINDOWS = 8


def run(options: argparse.Namespace) -> None:
    """Carry out `qkernels report`; cli.py says what the options are."""
    if options.out is not None:
        if options.out.exists() and not options.out.is_dir():
            raise NotADirectoryError(f"--out {options.out} is not a folder")
        _need("matplotlib", "--out draws pictures")
    quantized = _one_file(options.quantized)
    if not options.reference.exists():
        raise FileNotFoundError(f"--reference {options.reference}: there is no such file or folder")
    if options.reference.is_file() and options.reference.suffix != ".gguf":
        if given := [name for name in ("text", "windows") if getattr(options, name) is not None]:
            raise ValueError(
                f"--{given[0]} needs a language model: a GGUF file or a folder; --reference is {options.reference}"
            )
        found = _weights_only(quantized, options.reference)
    else:
        found = _language_model(quantized, options)
    print(found)
    if options.out is not None:
        names = [path.name for path in found.save(options.out)]
        print(f"\nsaved {', '.join(names[:-1])} and {names[-1]} in {options.out}")


def _one_file(path: pathlib.Path) -> pathlib.Path:
    """The file itself, or the one safetensors file in a folder."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path} must hold one safetensors file, found {len(files)}: name the one that is meant")
    return files[0]


def _weights_only(quantized: pathlib.Path, reference: pathlib.Path) -> QualityReport:
    with _opened(reference) as weights:
        return report(native.read(quantized), weights)


@contextmanager
def _opened(path: pathlib.Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of a safetensors file, each read when it is asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            if "qkernels" in (file.metadata() or {}):
                raise native.FormatError(f"--reference {path} is quantized itself: give the file it was made from")
            yield _Lazy(file)
    except SafetensorError as error:
        raise native.FormatError(f"{path}: not a whole safetensors file: {error}") from None


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, file: Any):
        self.file, self.names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _language_model(quantized: pathlib.Path, options: argparse.Namespace) -> QualityReport:
    from tqdm import tqdm

    _need("transformers", "a language model as --reference")
    if options.reference.is_file():
        _need("gguf", "a GGUF file")
    from qkernels.demo import fetch, language_model

    with open(quantized, "rb"):  # before a model is loaded for nothing
        pass
    if options.text is None:
        try:
            text_path = fetch.fetch(fetch.LCET10)
        except fetch.FetchError as error:
            raise RuntimeError(f"{str(error).splitlines()[0]}; give --text FILE") from None
    else:
        text_path = options.text
    text = text_path.read_text(encoding="utf-8", errors="replace")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference, tokenizer = language_model.load(options.reference, device)
    windows = language_model.windows(text, tokenizer, options.windows or WINDOWS)
    model = _quantized_copy(quantized, reference)
    print(f"{len(windows)} windows of {windows.shape[1]} tokens of {text_path.name}, on {device}\n")
    batches = ({"input_ids": window[None], "use_cache": False} for window in windows)
    return report(model, reference, tqdm(batches, total=len(windows), desc="predicting", unit="window", leave=False))


def _quantized_copy(path: pathlib.Path, reference: Any) -> Any:
    """The file's model, in the reference's modules: parameters come from the file, so none are copied."""
    parameter = next(iter(reference.parameters()))
    empty: dict[int, Tensor] = {id(p): nn.Parameter(p.detach().to("meta")) for p in reference.parameters()}
    empty |= {id(buffer): buffer.clone() for buffer in reference.buffers()}  # a file may hold others
    model = copy.deepcopy(reference, empty)
    # Scales stay as they are; norms and the like get the reference's dtype.
    return checkpoint.load(path, model).to(parameter.device, parameter.dtype).eval()


def _need(package: str, what: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(f"{what} needs {error.name or package}: pip install 'qkernels[demo]'") from None
