"""An onnxruntime session with a key-value cache that stays on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import CheckpointError, UsageError

__all__ = ["Cache", "OnnxSession"]

# Keys and values of all layers, by the name of the input that takes them.
Cache = dict[str, Any]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_LOG_ERRORS_ONLY = 3


def import_onnxruntime() -> Any:
    """Import onnxruntime, which neither extra may bring by itself.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            "onnxruntime is not installed",
            remedy='pip install "lora-deploy[cpu]", or "lora-deploy[gpu]" for NVIDIA GPUs (one of the two, not both)',
        ) from None
    return onnxruntime


class OnnxSession:
    """A causal language model in onnxruntime.

    Args:
        model: The `model.onnx` file, or the directory that holds it.
        provider: "cpu" or "cuda".

    Attributes:
        provider: The provider in use.
        has_position_ids: Whether the graph takes position ids.

    Raises:
        CheckpointError: There is no model, or onnxruntime cannot open it.
        UsageError: onnxruntime or the provider is not installed.
    """

    def __init__(self, model: str | Path, provider: Literal["cpu", "cuda"] = "cpu") -> None:
        onnxruntime = import_onnxruntime()
        file = Path(model) / "model.onnx" if Path(model).is_dir() else Path(model)
        if not file.is_file():
            raise CheckpointError("there is no exported model", file=file, remedy="make one with lora-deploy export")
        if provider not in _PROVIDERS or _PROVIDERS[provider] not in onnxruntime.get_available_providers():
            raise UsageError(
                "onnxruntime does not have this provider here",
                found=", ".join(onnxruntime.get_available_providers()),
                expected=_PROVIDERS.get(provider, " or ".join(_PROVIDERS)),
                remedy='for cuda: pip uninstall onnxruntime, then pip install "lora-deploy[gpu]"',
            )
        if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds the CUDA libraries that torch's packages bring
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS_ONLY
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=[_PROVIDERS[provider]])
        except Exception as error:  # onnxruntime's own classes have no common base
            raise CheckpointError(
                "onnxruntime cannot open the model", file=file, found=str(error).splitlines()[0][:300]
            ) from error
        self.provider = provider
        self._ortvalue = onnxruntime.OrtValue
        inputs = self.session.get_inputs()
        self.has_position_ids = any(node.name == "position_ids" for node in inputs)
        self._past = [node for node in inputs if node.name.startswith("past_key_values.")]
        self._outputs = [node.name for node in self.session.get_outputs()]

    def empty_cache(self, batch: int) -> Cache:
        """A cache of length 0 for a batch."""
        cache = {}
        for node in self._past:
            shape = [size if isinstance(size, int) else 0 for size in node.shape]
            shape[0] = batch
            if node.type == "tensor(bfloat16)":
                empty = np.zeros(shape, np.uint16)
                cache[node.name] = self._ortvalue.ortvalue_from_numpy_with_onnx_type(empty, _ONNX_BFLOAT16)
            else:
                cache[node.name] = self._to_device(np.zeros(shape, _NUMPY_TYPES[node.type]))
        return cache

    def _to_device(self, array: NDArray[Any]) -> Any:
        return self._ortvalue.ortvalue_from_numpy(np.ascontiguousarray(array), self.provider, 0)

    def forward(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], cache: Cache | None = None
    ) -> tuple[NDArray[np.float32], Cache]:
        """Run new tokens through the model.

        Args:
            input_ids: (batch, new).
            attention_mask: (batch, past + new), 1 for tokens and 0 for padding on either side.
            cache: What the last call returned; None to begin.

        Returns:
            Logits, float32 (batch, new, vocabulary), and the cache with the new tokens. The cache stays on the device;
            rows of padding hold logits without meaning.
        """
        batch, new = input_ids.shape
        feeds = {"input_ids": self._to_device(input_ids), "attention_mask": self._to_device(attention_mask)}
        if self.has_position_ids:
            positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -new:]
            feeds["position_ids"] = self._to_device(positions.astype(np.int64))
        feeds |= cache if cache is not None else self.empty_cache(batch)
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self.provider)
        self.session.run_with_iobinding(binding)
        outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        present = {name.replace("present.", "past_key_values.", 1): value for name, value in outputs.items()}
        return _as_float32(present.pop("logits")), present


def _as_float32(value: Any) -> NDArray[np.float32]:
    if value.data_type() == "tensor(bfloat16)":
        from torch.utils import dlpack

        return dlpack.from_dlpack(value).float().numpy()
    return np.asarray(value.numpy(), np.float32)
