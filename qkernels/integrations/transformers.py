"""transformers: from_pretrained that quantizes, or that loads what is quantized, and save_pretrained.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QKernelsConfig("w4g128"))
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

Importing this module tells transformers of the method "qkernels". Works with transformers 5.0 and later.

A weight is quantized as it is loaded, so that no more than one is there as floats; embeddings, experts and, with
calibration, everything are quantized by quantize_model once the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkernels.calibrate.linears import method_for
from qkernels.formats.native import VERSION, Entry, FormatError, parse_entry, quantization_config
from qkernels.integrations.experts import renaming
from qkernels.model import check_method, quantize_extras, quantize_model
from qkernels.nn import PARTS, QuantEmbedding, QuantModule
from qkernels.pretrained import describe
from qkernels.replace import counterpart, is_conv1d, linears_for_conv1d, places, put, slot
from qkernels.scheme import Scheme, as_scheme
from qkernels.selection import DEFAULT_SKIP, Extra, check_weight, select
from qkernels.tensor import quantize


@register_quantization_config("qkernels")
class QKernelsConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes a model.

    Args:
        scheme: such as "w4g128", for layers that no pattern names.
        skip, schemes, embeddings: as of quantize_model.
        method: how codes are chosen; None or "rtn", "search", "hqq", and with calibration "gptq".
        calibration: batches, "written" or "random", as of quantize_model. Without it nothing is known of inputs: codes
            are those of quantize_model where it has no calibration.
        options: further arguments of quantize_model (smooth, distill, merge, ...), where there is calibration.
        weights: {name: entry} of a model that is quantized already, as its config.json has it.
        version: of that.

    Raises:
        ValueError, TypeError: neither or both of scheme and weights are given, a scheme or a method is none, or an
            argument is not known.
    """

    def __init__(
        self,
        scheme: str | Scheme | None = None,
        *,
        skip: Sequence[str] = DEFAULT_SKIP,
        schemes: Mapping[str, str | Scheme | None] | None = None,
        embeddings: str | Scheme | None = None,
        method: str | None = None,
        calibration: Iterable[Any] | str | None = None,
        options: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
        version: str = VERSION,
        **unknown: Any,
    ):
        self.quant_method = "qkernels"
        unknown.pop("quant_method", None)
        if unknown:
            raise TypeError(f"QKernelsConfig has no argument {next(iter(unknown))!r}")
        if (scheme is None) == (weights is None):
            raise ValueError("QKernelsConfig needs a scheme, such as 'w4g128', or the weights of a quantized model")
        if version != VERSION:
            raise FormatError(f"quantization_config's version must be {VERSION!r}, got {version!r}")
        self.scheme = None if scheme is None else as_scheme(scheme)
        self.skip = skip
        self.schemes = {pattern: None if s is None else as_scheme(s) for pattern, s in (schemes or {}).items()}
        self.embeddings = None if embeddings is None else as_scheme(embeddings)
        self.method, self.calibration, self.options = method, calibration, dict(options or {})
        if weights is None:
            self._check_activations()
            if method != "gptq" or calibration is None:
                check_method(method, None)
            if self.options and calibration is None:
                raise ValueError(f"options ({', '.join(self.options)}) need calibration")
        elif not isinstance(weights, Mapping):
            raise FormatError(f"quantization_config's weights must be an object, got {type(weights).__name__}")
        self.weights = None
        if weights is not None:
            self.weights = {name: parse_entry(name, entry) for name, entry in weights.items()}

    def _check_activations(self) -> None:
        """Raise ValueError for activations that no calibration would find, or that an embedding does not have."""
        if self.embeddings is not None and self.embeddings.activations is not None:
            raise ValueError(f"embeddings={str(self.embeddings)!r}: an embedding has no activations to quantize")
        static = (s for s in [self.scheme, *self.schemes.values()] if s is not None and s.is_static)
        if self.calibration is None and (found := next(static, None)) is not None:
            raise ValueError(
                f"scheme {str(found)!r} has static activations, whose scale calibration finds: give calibration= "
                "batches, 'written' or 'random'; or take dynamic ones, such as 'w8a8'"
            )

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: of a quantized model its weights, else the schemes asked for."""
        if self.weights is not None:
            return quantization_config(self.weights)
        return {
            "quant_method": "qkernels",
            "scheme": str(self.scheme),
            "skip": list(self.skip),
            "schemes": {pattern: None if s is None else str(s) for pattern, s in self.schemes.items()},
            "embeddings": None if self.embeddings is None else str(self.embeddings),
            "method": self.method,
        }


class _Quantize(ConversionOps):
    """A float weight that was loaded -> the parts of a quantized one, whose layer takes the place of the float one."""

    def __init__(self, hf_quantizer: QKernelsHfQuantizer):
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Tensor]:
        """{name of the weight: tensor} -> {names of its parts: tensors}."""
        (value,) = input_dict.values()
        return self.hf_quantizer.quantize_weight(full_layer_name, value[0] if isinstance(value, list) else value)


@register_quantizer("qkernels")
class QKernelsHfQuantizer(HfQuantizer):
    """What transformers asks while it loads a model."""

    quantization_config: QKernelsConfig
    is_compileable = True
    is_trainable = False

    def __init__(self, quantization_config: QKernelsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.weights is not None
        self._model: Any = None
        self._schemes: dict[str, Scheme] = {}  # of layers still to be quantized, by name
        self._failed: list[Exception] = []
        self._shapes: dict[str, torch.Size] = {}  # of what a quantized checkpoint is loaded into
        self._extras: dict[str, Extra] = {}  # weights to be quantized when the model is loaded
        self._held: list[Any] = []  # what tensor parallelism must leave to us
        self._is_cut = False  # whether each process has a part of the weights

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        device_map = kwargs.get("device_map")
        offloaded = isinstance(device_map, Mapping) and "disk" in device_map.values()
        if config.weights is not None:
            self._put_empty(model, config.weights)
            self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        elif offloaded:
            raise ValueError("device_map: what goes to a disk cannot be quantized; save a quantized model first")
        elif config.calibration is None:
            with linears_for_conv1d(model):
                chosen = select(model, config.scheme, config.skip, config.schemes, config.embeddings)
            self._extras = chosen.extras
            self._schemes = {name: scheme for name, (_, scheme) in chosen.linears.items()}
            self._model = model
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from qkernels.integrations.tensor_parallel import hold

            self._held = hold(model, self._schemes, self._extras, calibrated=config.calibration is not None)
        return model

    def _put_empty(self, model: Any, weights: Mapping[str, Entry]) -> None:
        """Quantized layers without values, for what a checkpoint stores quantized."""
        prefix = f"{model.base_model_prefix}."
        where = places(model)
        names = {}
        rename = renaming(model)  # a checkpoint of another package has names that transformers changes
        for name, entry in weights.items():
            # of a base model, or a model with a head
            spellings = [name, prefix + name, name.removeprefix(prefix), rename(name)]
            found = next(((s, place) for s in spellings if (place := slot(model, s)) is not None), None)
            if found is None:
                continue  # another head's: transformers tells of tensors that it has no use for
            if found[1].shape != entry.shape:
                raise FormatError(f"quantization_config: {name} is {entry.shape}, the model's {found[1].shape}")
            if why_not := found[1].why_not(entry.scheme, entry.ordered):
                raise FormatError(f"quantization_config: {name} {why_not}")
            found[1].put(entry.on_meta(), where.get(found[1].module, ()))
            names[found[0]] = entry
        for target, source in dict(model.all_tied_weights_keys).items():
            place = slot(model, target)
            if source in names and place is not None and names.get(target, names[source]) == names[source]:
                if target not in names:  # as where other packages stored the embedding alone
                    place.put(names[source].on_meta(), where.get(place.module, ()))
                for part in names[source].parts("") - {""}:
                    model.all_tied_weights_keys[target + part] = source + part
            elif target in names:  # it has codes of its own
                del model.all_tied_weights_keys[target]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight is to be quantized as it is loaded."""
        name, _, attribute = param_name.rpartition(".")
        return attribute == "weight" and name in self._schemes

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes a weight."""
        return _Quantize(self)

    def quantize_weight(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a weight that was loaded, and put its layer into the model; {names: parts}.

        One that cannot be quantized is left as it is, and told once the model is loaded: what is raised while
        transformers loads is put into a table of its own.
        """
        layer_name = name.removesuffix(".weight")
        try:
            layer = self._quantized(layer_name, weight)
        except (ValueError, TypeError) as error:
            self._failed.append(error)
            return {name: weight}
        return {f"{layer_name}.{part}": p for part in PARTS if (p := layer._parameters[part]) is not None}

    def _quantized(self, name: str, weight: Tensor) -> QuantModule:
        """The quantized layer of a weight, in the place of the float one."""
        scheme = self._schemes.pop(name)
        module = self._model.get_submodule(name)
        weight = weight.T.contiguous() if is_conv1d(module) else weight
        check_weight(name, weight, scheme)
        method, _ = method_for(self.quantization_config.method, scheme, weighted=False)
        layer = counterpart(module, quantize(weight, scheme, method=method))
        put(layer, places(self._model)[module])
        return layer

    def _whole(self, weight: Tensor) -> Tensor:
        """A weight that may be spread over processes."""
        return weight.full_tensor() if self._held and hasattr(weight, "full_tensor") else weight

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self._failed:
            raise self._failed[0]
        for name, tensor in model.state_dict().items() if self._shapes else ():  # up to 5.22 nobody else looks
            if tensor.shape != self._shapes.get(name, tensor.shape):
                raise FormatError(f"the tensor for {name} has another shape than the model's: {tuple(tensor.shape)}")
        if config.weights is None and self._held:
            from qkernels.integrations.tensor_parallel import check_loaded_whole

            check_loaded_whole(self._held, model.all_tied_weights_keys)
        if config.weights is None:
            if config.calibration is None:
                for name in list(self._schemes):  # no weight of the checkpoint, but tied to one
                    self._quantized(name, self._whole(model.get_submodule(name).weight.detach()))
                quantize_extras(self._extras, config.method)
            else:
                quantize_model(
                    model,
                    cast(Scheme, config.scheme),
                    method=config.method,
                    calibration=config.calibration,
                    skip=config.skip,
                    schemes=config.schemes,
                    embeddings=config.embeddings,
                    **config.options,
                )
        self._model, self._schemes, self._extras = None, {}, {}
        describe(model)
        # A new one: the user's may be asked for another model.
        self.quantization_config = QKernelsConfig(**model.config.quantization_config)
        model.config.quantization_config = self.quantization_config
        layers = [module for module in model.modules() if isinstance(module, QuantModule)]
        for layer in layers:
            if isinstance(layer, QuantEmbedding) and not layer.weight.is_meta:
                layer.like.data = layer.like.to(layer.weight.device)
            for name in PARTS:  # the loader takes every floating parameter for one to be trained
                if (parameter := layer._parameters.get(name)) is not None:
                    parameter.requires_grad_(False)
        if self._held:
            from qkernels.integrations.tensor_parallel import cut

            self._is_cut, self._held = cut(model, self._held), []
        return model

    def is_serializable(self) -> bool:
        """Whether save_pretrained works."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """What save_pretrained writes: whole weights, wherever they are. None stands for a state_dict."""
        if not self._is_cut:
            return None, {}
        from qkernels.integrations.tensor_parallel import whole_state_dict

        return whole_state_dict(model), {}


def check_all_loaded(path: object, model: Any, info: Mapping[str, Any]) -> None:
    """Raise FormatError if from_pretrained found less, more or something else than a model wants.

    Args:
        path: of the checkpoint, for the message.
        model: what came of it.
        info: what from_pretrained(output_loading_info=True) says.
    """
    for what, message in (
        ("missing_keys", "there is no tensor for {}"),
        ("mismatched_keys", "the tensor for {} has another shape than the model's"),
        ("unexpected_keys", "the model has no place for {}"),
    ):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(what) or ())
        if names:
            raise FormatError(f"{path}: {message.format(names[0])} ({len(names)} such tensors)")
