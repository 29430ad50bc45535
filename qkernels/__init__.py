"""Blockwise affine quantization and fused dequantize-matmul: Triton kernels as torch ops, with a plain-torch oracle.

q = qkernels.quantize(w, "w4g128")     # QTensor: packed codes, scales, zeros
y = F.linear(x, q)                     # runs on the packed codes, CPU or GPU
report = qkernels.quantize_model(model, "w4g128")
model = qkernels.load("model.gguf")    # or a folder: GPTQ, AWQ, compressed-tensors, ...
"""

from typing import Any

from qkernels.activations import QuantizedActivations, quantize_activations
from qkernels.checkpoint import save
from qkernels.formats.native import FormatError
from qkernels.loading import load
from qkernels.merge import merge_siblings
from qkernels.model import quantize_model
from qkernels.nn import QuantEmbedding, QuantExperts, QuantLinear
from qkernels.planning.plan import plan
from qkernels.planning.result import Plan
from qkernels.reporting.measure import report
from qkernels.reporting.table import QualityReport
from qkernels.scheme import Activations, Scheme
from qkernels.siblings import MergedLinear
from qkernels.summary import QuantizationReport
from qkernels.tensor import QTensor, QuantizationError, quantize

__all__ = [
    "Activations",
    "FormatError",
    "MergedLinear",
    "Plan",
    "QKernelsConfig",
    "QTensor",
    "QualityReport",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantizationError",
    "QuantizationReport",
    "QuantizedActivations",
    "Scheme",
    "load",
    "merge_siblings",
    "plan",
    "quantize",
    "quantize_activations",
    "quantize_model",
    "report",
    "save",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What needs transformers, imported when it is first asked for."""
    if name == "QKernelsConfig":
        from qkernels.integrations.transformers import QKernelsConfig

        return QKernelsConfig
    raise AttributeError(f"module 'qkernels' has no attribute {name!r}")
