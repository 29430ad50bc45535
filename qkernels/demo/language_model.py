"""Load a language model and a text, and cut the text into windows."""

from __future__ import annotations

import contextlib
import logging as standard_logging
import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WINDOW = 512  # tokens


class ModelError(RuntimeError):
    """A model or a text cannot be used; the message says why."""


def load(path: pathlib.Path, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) from a GGUF file or a folder in Hugging Face's layout; float32 on CPU, bfloat16 on GPU."""
    if not path.exists():
        raise ModelError(f"--model {path}: there is no such file or folder")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with _quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"{path} does not load as a causal language model: {error}") from error
    return model, tokenizer


def windows(text: str, tokenizer: Any, count: int) -> Tensor:
    """(windows, WINDOW) tokens from the start of a text, its lines unwrapped; at most `count` of them."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    unwrapped = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    with _quiet():
        tokens = tokenizer(unwrapped, add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = min(count, tokens.numel() // WINDOW)
    if not count:
        raise ModelError(f"the text has {tokens.numel()} tokens; at least {WINDOW} are needed")
    return tokens[: count * WINDOW].view(count, WINDOW)


def answer(model: Any, tokenizer: Any, question: str, tokens: int) -> int:
    """Print the model's greedy answer as it comes; how many tokens came."""
    from transformers import TextStreamer

    with _quiet():
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(question, return_tensors="pt")
        inputs = inputs.to(model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            found = model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer, pad_token_id=tokenizer.eos_token_id
            )
    return int(found.shape[1] - inputs["input_ids"].shape[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and advice: the demo has its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # local files only
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")  # before the import: in a notebook that warns of missing widgets
        off = standard_logging.root.manager.disable
        standard_logging.disable(standard_logging.WARNING)  # of what transformers imports, whose handlers hold stderr
        try:
            from transformers.utils import logging

            level = logging.get_verbosity()
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            yield
            logging.set_verbosity(level)
        finally:
            standard_logging.disable(off)
