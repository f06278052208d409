"""What a pruned denoiser needs to load in plain diffusers: the stand-ins, and the loader that puts them in place.

This file is constant. ldpruner uses it, and copies it unchanged beside the weights of every model that it saves in the
portable form; what was removed is not written here but in the model's config.json, under "quantization_config", which
diffusers hands to a loader before it reads the weights. It imports torch and diffusers, nothing else.

Apache-2.0, https://pypi.org/project/ldpruner
"""

from __future__ import annotations

import logging
from enum import Enum
from types import MethodType
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

FORMAT_VERSION = 1

log = logging.getLogger("ldpruner")


def __getattr__(name: str) -> Any:
    """Any class of diffusers under its own name: model_index.json names this file as the library of the denoiser."""
    return getattr(diffusers, name)


class StandIn(nn.Module):
    """Takes the place of an operator: any arguments in, the operator's own output structure out.

    `options` is JSON. An input is named as `[position, keyword]`, since callers pass it either way.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.options.items())

    @staticmethod
    def pick(source: list[Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument that `source` names; None where the operator gave None."""
        if source is None:
            return None
        position, keyword = source
        return kwargs[keyword] if keyword in kwargs else args[position]


class Identity(StandIn):
    """Returns its input. Options: `returns`, one source, or a list of sources for an operator that gives a tuple.

    With `correction`, a number of channels, the one input times a scale plus a shift, both per channel.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        if "correction" in options:
            self.scale = nn.Parameter(torch.ones(options["correction"]))
            self.shift = nn.Parameter(torch.zeros(options["correction"]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        returns = self.options["returns"]
        if self.options["many"]:
            return tuple(self.pick(source, args, kwargs) for source in returns)
        inputs = self.pick(returns[0], args, kwargs)
        if "correction" not in self.options:
            return inputs
        axis = channel_axis(inputs.ndim, self.options)
        return torch.addcmul(along(axis, self.shift, inputs.ndim), inputs, along(axis, self.scale, inputs.ndim))


class Zero(StandIn):
    """Returns zeros. Options: `returns`, per output a source and a shape made from the source's.

    With `correction`, a number of channels, the one output is a constant per channel instead.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        if "correction" in options:
            self.shift = nn.Parameter(torch.zeros(options["correction"]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        zeros = tuple(self._zeros(self.pick(piece["source"], args, kwargs), piece["shape"]) for piece in self.options["returns"])
        if "correction" in self.options:
            return zeros[0] + along(channel_axis(zeros[0].ndim, self.options), self.shift, zeros[0].ndim)
        return zeros if self.options["many"] else zeros[0]

    @staticmethod
    def _zeros(like: Tensor, shape: list[Any]) -> Tensor:
        """A dimension is a number, or `[dimension of the input, numerator, denominator]`."""
        sizes = [size if isinstance(size, int) else like.shape[size[0]] * size[1] // size[2] for size in shape]
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()  # of indices, as an embedding is given
        return torch.zeros(sizes, dtype=dtype, device=like.device)  # in memory whole, as the code around may want another view


class Shortcut(StandIn):
    """Keeps one child of a block, the one on its skip path. Options: `source`, `child` (its name), `scale`.

    A `correction` per channel is part of the child's own weights.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = self.get_submodule(self.options["child"])(self.pick(self.options["source"], args, kwargs))
        return kept if self.options["scale"] == 1.0 else kept * self.options["scale"]


class Pointwise(StandIn):
    """A linear map over channels at every position, on a resampled grid. Options: `source`, `channels`, `grid`.

    `channels` is `[in, out]`; `grid` is None where the operator keeps its grid, else the scale per spatial dimension as
    `[numerator, denominator]`. For channels see `channel_axis`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.map = Map(*options["channels"])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs: Tensor = resample(self.pick(self.options["source"], args, kwargs), self.options["grid"])
        axis = channel_axis(inputs.ndim, self.options)
        if getattr(self.map, "any_axis", False):  # no class is asked for: diffusers runs this file anew for each model it loads
            mapped: Tensor = self.map(inputs, axis)
            return mapped
        adapted: Tensor = self.map(inputs.movedim(axis, -1))  # by what was put around it, and knows linear maps only
        return adapted.movedim(-1, axis)


class Map(nn.Linear):
    """A linear map over any one dimension, by a convolution where that is not the last; what hooks into linear maps works."""

    any_axis = True

    def forward(self, input: Tensor, axis: int = -1) -> Tensor:
        if axis in (-1, input.ndim - 1):
            return super().forward(input)
        if hasattr(self.weight, "__tensor_flatten__"):  # a quantized weight, which is no kernel
            return super().forward(input.movedim(axis, -1)).movedim(-1, axis)
        kernel = self.weight.view(*self.weight.shape, *(1,) * (input.ndim - 2))
        convolved: Tensor = _CONVOLVE[input.ndim - 3](input, kernel, self.bias)
        return convolved


class Narrow(StandIn):
    """Keeps the first channels of its input, on a resampled grid, and so leaves out what was concatenated behind them.

    Options: `source`, `channels`, how many are kept, and `grid`, see `Pointwise`. It has no weights.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs: Tensor = resample(self.pick(self.options["source"], args, kwargs), self.options["grid"])
        return inputs.narrow(channel_axis(inputs.ndim, self.options), 0, self.options["channels"])


def channel_axis(ndim: int, options: dict[str, Any]) -> int:
    """Which dimension holds channels: the second from rank 4 on, else the last, or what `axis` among the options says."""
    axis: int = options.get("axis", 1 if ndim > 3 else -1)
    return axis % ndim


def along(axis: int, values: Tensor, ndim: int) -> Tensor:
    """Values per channel in a shape that spreads over a tensor of `ndim` dimensions."""
    return values.view(-1, *(1,) * (ndim - 1 - axis))


_POOL: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_CONVOLVE: Any = (F.conv1d, F.conv2d, F.conv3d)


def resample(inputs: Tensor, grid: list[list[int]] | None) -> Tensor:
    """Bring the spatial dimensions of `(n, channels, ...)` to `size * numerator / denominator` each."""
    if grid is None:
        return inputs
    sizes: Any = [size * up // down for size, (up, down) in zip(inputs.shape[2:], grid, strict=True)]
    if all(new <= old for new, old in zip(sizes, inputs.shape[2:], strict=True)):
        pooled: Tensor = _POOL[inputs.ndim - 3](inputs, sizes)
        return pooled
    return F.interpolate(inputs, sizes, mode="nearest")


STAND_INS: dict[str, type[StandIn]] = {
    "identity": Identity,
    "zero": Zero,
    "shortcut": Shortcut,
    "pointwise": Pointwise,
    "narrow": Narrow,
}


class Seat(nn.Module):
    """Keeps the place of an attention that is gone, and lets no processor in.

    diffusers numbers a model's attentions in their order, and an IP-Adapter's weights go by these numbers: without the place,
    they would end up in other attentions than those that they were made for.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.__dict__["processor"] = processor  # as it was; not a part of this model, even where it has weights

    def get_processor(self, *_: Any, **__: Any) -> Any:
        return self.processor

    def set_processor(self, *_: Any, **__: Any) -> None:
        pass


def build(replacement: str, options: dict[str, Any], original: nn.Module) -> StandIn:
    """The stand-in for `original`; a shortcut takes the child that it keeps from there."""
    stand_in = STAND_INS[replacement](options)
    if isinstance(stand_in, Shortcut):
        stand_in.add_module(options["child"], original.get_submodule(options["child"]))
    for path, module in original.named_modules(remove_duplicate=False):
        if hasattr(module, "get_processor") and path.split(".")[0] != options.get("child"):
            _seat(stand_in, path, module.get_processor())
    return stand_in


def _seat(stand_in: Any, path: str, processor: Any) -> None:
    """Put a seat at the path of an attention in the operator; without a path, the stand-in is one itself."""
    seat, parent = Seat(processor), stand_in
    if not path:
        stand_in.get_processor, stand_in.set_processor = seat.get_processor, seat.set_processor
        return
    *parts, name = path.split(".")
    for part in parts:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]
    parent.add_module(name, seat)


def install(model: nn.Module, operators: dict[str, dict[str, Any]]) -> None:
    """Put the stand-ins of `{dotted path: {"replacement": name, "options": {...}}}` into `model`, in place."""
    for path, entry in operators.items():
        original = model.get_submodule(path)
        stand_in = build(entry["replacement"], entry["options"], original)
        parameter = next(original.parameters(), None)
        if parameter is not None and not isinstance(stand_in, Shortcut):
            stand_in.to(device=parameter.device, dtype=parameter.dtype)
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = stand_in.train(original.training)


def leave_out_of_lora(model: Any) -> None:
    """Let LoRAs made for the original be loaded into `model`, pruned and signed: what they hold for operators that are gone is
    left out with a warning, where PEFT would refuse the whole for each stand-in in the place of a single layer.
    """
    if hasattr(type(model), "load_lora_adapter"):
        model.load_lora_adapter = MethodType(_load_lora_adapter, model)


def _load_lora_adapter(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
    """As diffusers has it, for the weights that this model has a place for."""
    if isinstance(weights, dict):
        lead, lost, kept = f"{kwargs.get('prefix', 'transformer')}.", *_lost_and_kept(self)
        named = convert_unet_state_dict_to_peft({key.removeprefix(lead): key for key in weights})  # each by its layer's path
        gone = {key for name, key in named.items() if name.startswith(lost) and not name.startswith(kept)}
        if gone:
            log.warning(
                "%d of %d tensors of this LoRA are for operators that were removed from this model, first %s: they are left out.",
                *(len(gone), len(weights), min(gone)),
            )
        weights = {key: tensor for key, tensor in weights.items() if key not in gone}
    return type(self).load_lora_adapter(self, weights, *args, **kwargs)


def _lost_and_kept(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How the names of weights begin that went with operators, and of those among them that stand-ins have of their own."""
    paths = tuple(model.config["quantization_config"]["operators"])
    children = ((path, *child) for path in paths for child in model.get_submodule(path).named_children())
    kept = tuple(f"{path}.{name}." for path, name, part in children if next(part.parameters(), None) is not None)
    return tuple(f"{path}." for path in paths), kept


class Method(str, Enum):
    """The name under which diffusers finds the loader; it asks for an enumeration.

    Where the loader is missing, diffusers prints this name in its error, so the name says what to do.
    """

    LDPRUNER = "ldpruner (pip install ldpruner, then import ldpruner before loading)"


class LDPrunerConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The part of config.json that says what was removed."""

    def __init__(self, operators: dict[str, Any], format_version: int, quant_method: str = Method.LDPRUNER.value) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this model was pruned with ldpruner's format {format_version}, and this loader reads {FORMAT_VERSION}: "
                "update with `pip install --upgrade ldpruner`"
            )
        self.quant_method: Any = Method(quant_method)
        self.format_version = format_version
        self.operators = operators

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method.value, "format_version": self.format_version, "operators": self.operators}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class LDPrunerQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Edits the empty model before diffusers fills in the weights; no weight is quantized."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: LDPrunerConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: set[str] = set()  # names of the tensors in the weights files

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            install(model, self.quantization_config.operators)
        model.register_to_config(quantization_config=self.quantization_config.to_dict())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        surplus = self._stored - model.state_dict().keys()
        if surplus:
            raise ValueError(
                f"ldpruner: the weights of this pruned model hold {len(surplus)} tensors too many, first {min(surplus)}: "
                "its config.json and its weights do not belong together"
            )
        leave_out_of_lora(model)
        model.is_quantized = False  # else diffusers refuses .to(dtype) and .half()
        return model

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """No parameter is; but here every version of diffusers shows what a weights file holds; of a surplus it warns only."""
        self._stored.update(state_dict)
        return False

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if missing_keys:
            raise ValueError(
                f"ldpruner: the weights of this pruned model lack {len(missing_keys)} tensors, first {min(missing_keys)}: "
                "its config.json and its weights do not belong together"
            )
        return missing_keys

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


auto.AUTO_QUANTIZER_MAPPING[Method.LDPRUNER.value] = LDPrunerQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.LDPRUNER.value] = LDPrunerConfig
