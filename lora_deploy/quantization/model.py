"""Quantize the linear layers of a model, and read a quantized weight back out of a module."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_deploy.checkpoint import resolve_model
from lora_deploy.errors import CheckpointError
from lora_deploy.inputs.configuration import check_configuration
from lora_deploy.inputs.json_files import read_json
from lora_deploy.quantization.bnb import bitsandbytes as bnb
from lora_deploy.quantization.quantize import expand_absmax
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.quantization.weight import Blockwise4BitWeight, DenseWeight, Int8Weight, QuantizedWeight
from lora_deploy.task import Task, auto_class, find_task

__all__ = [
    "head_modules",
    "is_linear",
    "keep_codes",
    "linear_modules",
    "load_base_model",
    "quantize_model",
    "quantized_weight",
]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that an adapter can sit on: Linear (plain or bitsandbytes') or Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))  # bitsandbytes' layers are subclasses of nn.Linear


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of a model but its output head, by full dotted name, in the order of the model."""
    heads = head_modules(model)
    return {name: module for name, module in model.named_modules() if is_linear(module) and name not in heads}


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model's output head, by full dotted name, in the order of the model.

    That of a language model is one layer. That of a classifier is what lies outside of the inner model (RoBERTa's
    `classifier.dense` and `classifier.out_proj`): it is trained whole, so it is not quantized and gets no adapter.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is not None:
        return {name: module for name, module in model.named_modules() if module is head and is_linear(module)}
    inner = model.base_model if isinstance(model, PreTrainedModel) else model
    inside = {id(module) for module in inner.modules()}
    return {name: module for name, module in model.named_modules() if is_linear(module) and id(module) not in inside}


def quantized_weight(module: nn.Module) -> QuantizedWeight:
    """The weight of a linear layer as (out, in), as it is stored; nothing is copied or rounded.

    Args:
        module: nn.Linear, Conv1D, Linear4bit or Linear8bitLt.

    Raises:
        TypeError: Another kind of module, or a bitsandbytes layer whose weight is not quantized yet.
    """
    if isinstance(module, bnb.nn.Linear4bit):
        return _from_linear4bit(module)
    if isinstance(module, bnb.nn.Linear8bitLt):
        codes = module.weight.CB if module.weight.CB is not None else module.state.CB
        scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        if codes is None or scale is None:
            raise TypeError("this Linear8bitLt is not quantized yet: move it to its device first")
        return Int8Weight(codes, scale)
    if isinstance(module, Conv1D):
        return DenseWeight(module.weight.detach().t())
    if isinstance(module, nn.Linear):
        return DenseWeight(module.weight.detach())
    raise TypeError(f"no linear layer: {type(module).__name__}")


def _from_linear4bit(module: bnb.nn.Linear4bit) -> QuantizedWeight:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise TypeError("this Linear4bit is not quantized yet: move it to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise CheckpointError(
            "bitsandbytes has repacked this weight for an AVX512-BF16 processor, which rounds its absmax to bfloat16",
            found="a layer that has run in eval mode on a CPU",
            remedy="load the model anew, or call keep_codes(model) before its first forward in eval mode",
        )
    absmax = state.absmax
    if state.nested:
        nested = state.state2
        absmax = expand_absmax(state.absmax, nested.code, nested.absmax, state.offset, nested.blocksize)
    return Blockwise4BitWeight(
        codes=module.weight.data.reshape(-1).view(torch.uint8),
        absmax=absmax.float(),
        shape=(int(state.shape[0]), int(state.shape[1])),
        scheme=state.quant_type,
        blocksize=state.blocksize,
    )


def keep_codes(model: nn.Module) -> None:
    """Make bitsandbytes' 4-bit layers compute, on a CPU, what their codes stand for, and leave the codes alone.

    On processors with AVX512-BF16 the first forward in eval mode rewrites a Linear4bit in place: other nibble order,
    absmax rounded to bfloat16, an assertion on odd shapes. A base that is to be exported must keep what it was
    trained with. And on processors with AVX512 the kernel of bitsandbytes 0.50 takes the wrong absmax where a block
    crosses from one row into the next; such layers become `ExactLinear4bit`.
    """
    for module in model.modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        state = getattr(module.weight, "quant_state", None)
        plain = type(module) in (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4)
        if plain and state is not None and state.shape[1] % state.blocksize:
            module.__class__ = ExactLinear4bit


class ExactLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A Linear4bit that, on a CPU, multiplies with the values that `quantized_weight` gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer: x (..., in) -> (..., out), of the input's type."""
        if x.device.type != "cpu":
            return cast(torch.Tensor, super().forward(x))
        compute_dtype = self.compute_dtype or x.dtype
        result: torch.Tensor = _DequantizedMatMul.apply(x.to(compute_dtype), self)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            result = result + self.bias.to(compute_dtype)
        return result.to(x.dtype)


class _DequantizedMatMul(torch.autograd.Function):
    """x @ W.T of a frozen 4-bit weight, which is dequantized again for the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: bnb.nn.Linear4bit) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, quantized_weight(layer).dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ quantized_weight(ctx.layer).dequantize(grad.dtype), None


def quantize_model(
    model: nn.Module, scheme: QuantizationScheme | str, device: torch.device | str | None = None
) -> nn.Module:
    """Replace the linear layers of a full-precision model by bitsandbytes' quantized ones, in place.

    The output head is left as it is, as are the scheme's `skip_modules`. A Conv1D becomes a quantized linear layer
    with the transposed weight.

    Args:
        model: The model; its weights are in full precision.
        scheme: What to quantize to; a name ("nf4", "fp4", "int8", "none") stands for the scheme's defaults.
        device: Where to quantize and leave the layers; None for where they are.

    Returns:
        The same model.
    """
    scheme = QuantizationScheme(method=scheme) if isinstance(scheme, str) else scheme  # type: ignore[arg-type]
    for name, module in linear_modules(model).items():
        if not scheme.applies_to(name):
            continue
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            raise CheckpointError("the model is quantized already", tensor=name, found=type(module).__name__)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _quantized_linear(module, scheme, device))
    return model


def _quantized_linear(module: nn.Module, scheme: QuantizationScheme, device: torch.device | str | None) -> nn.Module:
    weight = cast(DenseWeight, quantized_weight(module)).values
    bias = cast("torch.Tensor | None", module.bias)
    device = torch.device(device) if device is not None else weight.device
    if scheme.weight_dtype is not None:
        weight = weight.to(getattr(torch, scheme.weight_dtype))
    if device.type == "cpu":
        # The type given here is the one bitsandbytes dequantizes to in its backward; the codes do not depend on it.
        weight = weight.float()
    out_features, in_features = weight.shape
    new: Any
    if scheme.method == "int8":
        new = bnb.nn.Linear8bitLt(in_features, out_features, bias is not None, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(in_features, out_features, bias is not None, quant_type=scheme.method, device="meta")
        new.weight = bnb.nn.Params4bit(
            weight.contiguous(),
            requires_grad=False,
            blocksize=scheme.blocksize,
            compress_statistics=scheme.double_quant,
            quant_type=scheme.method,
            module=new,
        )
    new.weight = new.weight._quantize(device)
    keep_codes(new)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
    new.train(module.training)
    return cast(nn.Module, new)


def load_base_model(
    model: str,
    quantization: QuantizationScheme | str | None = None,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    task: Task | None = None,
    num_labels: int | None = None,
) -> PreTrainedModel:
    """Load a causal language model or a classifier and quantize its linear layers, in one call.

    A checkpoint that bitsandbytes quantized is loaded as it is; `quantization` may then not be another scheme.

    Args:
        model: A local directory or a hub id.
        quantization: The scheme, or a name for its defaults; None for nf4, or for what the checkpoint is.
        device: Where the model goes.
        compute_dtype: Type of everything that is not quantized; None for float32 on a CPU and bfloat16 elsewhere.
        task: What the model is for; None for what its configuration says.
        num_labels: How many classes a classifier tells apart; None for what its configuration says.

    Returns:
        The model, in training mode, with every parameter frozen.

    Raises:
        CheckpointError: There is no such model, or it is quantized by another scheme.
    """
    if compute_dtype is None:
        compute_dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    directory = resolve_model(model)
    if isinstance(quantization, str):
        quantization = QuantizationScheme(method=quantization)  # type: ignore[arg-type]
    config = read_json(directory / "config.json")
    check_configuration(config, directory / "config.json")
    stored = QuantizationScheme.from_model_config(config, directory / "config.json")
    if stored is not None and quantization is not None and quantization.method not in ("none", stored.method):
        raise CheckpointError(
            "the checkpoint is quantized already, by another scheme than the one asked for",
            file=directory / "config.json",
            found=stored,
            expected=quantization,
        )
    options = {} if num_labels is None else {"num_labels": num_labels}
    task = task or find_task(config.get("architectures"))
    loaded = auto_class(task).from_pretrained(
        directory, dtype="auto", use_safetensors=True, trust_remote_code=False, **options
    )
    if stored is None:
        quantize_model(loaded, quantization or QuantizationScheme(method="nf4"), device)
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point() and not isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params)):
            parameter.data = parameter.data.to(compute_dtype)
    for module in loaded.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes' backward rounds the weight to this type, which a checkpoint may have left at bfloat16.
            module.weight.quant_state.dtype = compute_dtype
    keep_codes(loaded)
    nn.Module.to(loaded, device)
    loaded.config.dtype = compute_dtype
    return cast(PreTrainedModel, loaded.train())
