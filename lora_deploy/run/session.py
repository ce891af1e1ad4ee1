"""An onnxruntime session with a key-value cache, and adapters, that stay on their device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.graph_check import metadata_of, read_graph
from lora_deploy.manifest import Manifest
from lora_deploy.run.context import check_context, read_context_length
from lora_deploy.run.interface import check_cache_input, check_logits, first_line
from lora_deploy.run.threads import usable_threads

__all__ = ["Cache", "OnnxSession", "host_ortvalue", "import_onnxruntime", "numpy_dtype", "numpy_of"]

# Keys and values of all layers, by the name of the input that takes them.
Cache = dict[str, Any]
# How the weights that the export keeps as codes are run.
Weights = Literal["stored", "expand", "native"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_LOG_FATAL_ONLY = 4


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


def check_weights(weights: str) -> None:
    """Make sure that there is such a way to run weights.

    Raises:
        UsageError: There is none.
    """
    if weights not in get_args(Weights):
        raise UsageError("weights cannot run this way", found=weights, expected=", ".join(get_args(Weights)))


class OnnxSession:
    """A causal language model or a classifier in onnxruntime.

    Args:
        model: The `model.onnx` file, or the directory that holds it.
        provider: "cpu" or "cuda".
        weights: How weights that are kept as codes run: "stored", as the graph has them; "expand", dequantized when the
            model is opened, which takes the memory of a float model and has its speed; "native", by lora-deploy's own
            kernel, on the CPU.
        exact_activations: Run "stored" int8 and int4 products on the activations as they are (MatMulNBits at accuracy
            level 0), whatever the graph says: to tell what the rounding of activations does from all else.
        threads: How many share one operator; None for as many as this process may run at once.

    Attributes:
        provider: The provider in use.
        has_position_ids: Whether the graph takes position ids.
        has_token_type_ids: Whether the graph tells two texts of a pair apart.
        optional_inputs: onnxruntime's types of the inputs that may be left out, by name.
        manifest: What the graph says of itself; None where lora-deploy did not make it.
        context_length: How many tokens a row may have, past and new; None where the configuration does not say.
        writes_in_place: Whether the graph can write new tokens into a cache that has room for them.

    Raises:
        CheckpointError: There is no model, or onnxruntime cannot open it.
        UsageError: onnxruntime or the provider is not installed, or the weights cannot run that way.
    """

    def __init__(
        self,
        model: str | Path,
        provider: Literal["cpu", "cuda"] = "cpu",
        weights: Weights = "stored",
        *,
        exact_activations: bool = False,
        threads: int | None = None,
    ) -> None:
        self._onnxruntime = import_onnxruntime()
        file = Path(model) / "model.onnx" if Path(model).is_dir() else Path(model)
        metadata = metadata_of(read_graph(file), file)
        if provider not in _PROVIDERS or _PROVIDERS[provider] not in self._onnxruntime.get_available_providers():
            raise UsageError(
                "onnxruntime does not have this provider here",
                found=", ".join(self._onnxruntime.get_available_providers()),
                expected=_PROVIDERS.get(provider, " or ".join(_PROVIDERS)),
                remedy='for cuda: pip uninstall onnxruntime, then pip install "lora-deploy[gpu]"',
            )
        check_weights(weights)
        if weights == "native" and provider != "cpu":
            raise UsageError("the native kernel is for the CPU", found=provider, remedy="take stored or expand weights")
        if provider == "cuda" and hasattr(self._onnxruntime, "preload_dlls"):
            self._onnxruntime.preload_dlls()  # finds the CUDA libraries that torch's packages bring
        self.provider = provider
        options = self._onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_threads() if threads is None else threads
        options.log_severity_level = _LOG_FATAL_ONLY  # it warns of every optional input, and errors are raised as well
        try:
            self.session = self._open(file, options, weights, exact_activations)
        except (CheckpointError, UsageError):
            raise
        except Exception as error:  # onnxruntime's own classes have no common base
            raise CheckpointError("onnxruntime cannot open the model", file=file, found=first_line(error)) from error
        if _PROVIDERS[provider] not in self.session.get_providers():  # onnxruntime goes on without it, and only warns
            raise UsageError(
                "onnxruntime could not start the provider",
                found=", ".join(self.session.get_providers()),
                expected=_PROVIDERS[provider],
                remedy="check the GPU, its driver, and that onnxruntime-gpu finds the CUDA libraries it was built for",
            )
        self.manifest = Manifest.read(metadata, file) if "lora_deploy.precision" in metadata else None
        inputs = self.session.get_inputs()
        self.has_position_ids = any(node.name == "position_ids" for node in inputs)
        self.has_token_type_ids = any(node.name == "token_type_ids" for node in inputs)
        self.optional_inputs = {node.name: node.type for node in self.session.get_overridable_initializers()}
        self.writes_in_place = metadata.get("lora_deploy.cache") == "in place"
        self.context_length = read_context_length(file.parent)
        self._past = [node for node in inputs if node.name.startswith("past_key_values.")]
        for node in self._past:
            check_cache_input(file, node)
        self._file = file
        self._outputs = [node.name for node in self.session.get_outputs()]

    def _open(self, file: Path, options: Any, weights: Weights, exact_activations: bool) -> Any:
        # Without a GPU onnxruntime falls back to the CPU, which is told afterwards; on a CPU it would only try again.
        how: dict[str, Any] = {"providers": [_PROVIDERS[self.provider]], "enable_fallback": int(self.provider != "cpu")}
        if weights == "stored" and not exact_activations:
            return self._onnxruntime.InferenceSession(str(file), options, **how)
        # The graph comes from memory, the weights that are as they were from its folder.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        if weights == "native":
            from lora_deploy.run.native_weights import NativeWeights

            # Kept with the session: onnxruntime has no share in the memory of what it is given.
            self._weights: Any = NativeWeights(file, options)
            return self._onnxruntime.InferenceSession(self._weights.graph, options, **how)
        from lora_deploy.run.weights import ExpandedWeights, graph_at_level_0

        if weights == "stored":
            return self._onnxruntime.InferenceSession(graph_at_level_0(file), options, **how)
        self._weights = ExpandedWeights(file, options)
        session = self._onnxruntime.InferenceSession(self._weights.graph, options, **how)
        self._weights.release(session)
        return session

    def empty_cache(self, batch: int, room: int = 0) -> Cache:
        """A cache without tokens for a batch.

        Args:
            batch: Rows.
            room: Tokens a row. Up to so many are written into this cache, where the graph `writes_in_place`, instead
                of into a copy of it at every step; whoever needs an older state of it must begin anew.
        """
        cache = {}
        for node in self._past:
            shape = [size if isinstance(size, int) else room * self.writes_in_place for size in node.shape]
            shape[0] = batch
            if node.type == "tensor(bfloat16)":
                cache[node.name] = host_ortvalue(np.zeros(shape, numpy_dtype("bf16")))
            else:
                cache[node.name] = self.upload(np.zeros(shape, _NUMPY_TYPES[node.type]))
        return cache

    def upload(self, array: NDArray[Any]) -> Any:
        """Copy an array to the device, once, as something that `forward` takes. On the CPU it stays where it is."""
        ortvalue = self._onnxruntime.OrtValue
        array = np.ascontiguousarray(array)
        if self.provider == "cpu":
            return host_ortvalue(array)
        if array.dtype.name != "bfloat16":
            return ortvalue.ortvalue_from_numpy(array, self.provider, 0)
        host = host_ortvalue(array)
        device = ortvalue.ortvalue_from_shape_and_type(list(array.shape), _ONNX_BFLOAT16, self.provider, 0)
        self._onnxruntime.copy_tensors([host], [device])
        return device

    def forward(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        cache: Cache | None = None,
        adapter: Mapping[str, Any] | None = None,
        token_type_ids: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], Cache]:
        """Run new tokens through the model.

        Args:
            input_ids: (batch, new).
            attention_mask: (batch, past + new), 1 for tokens and 0 for padding on either side.
            cache: What the last call returned; None to begin, or an empty one with room.
            adapter: Optional inputs: A and B of the slots, or the adapters' ids of a pooled graph, uploaded. They are
                bound as inputs, for onnxruntime ignores the active adapters of a run that has bindings.
            token_type_ids: (batch, new), which text of a pair each token is of, where the graph asks for it; None for
                the first.

        Returns:
            Logits, float32 (batch, new, vocabulary), and the cache with the new tokens. The cache stays on the device;
            rows of padding hold logits without meaning. A classifier's logits are (batch, labels) or, of
            tokens, (batch, new, labels), and its cache is empty.

        Raises:
            UsageError: A row has more tokens than the language model has positions for.
            CheckpointError: onnxruntime cannot run the model, or it does not give logits.
        """
        is_causal = self.manifest is not None and self.manifest.task == "causal-lm"
        if is_causal and self.context_length is not None:
            check_context(self.context_length, attention_mask, in_place=self.writes_in_place)
        batch, new = input_ids.shape
        feeds: dict[str, Any] = {"input_ids": self.upload(input_ids), "attention_mask": self.upload(attention_mask)}
        if self.has_position_ids:
            positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -new:]
            feeds["position_ids"] = self.upload(positions.astype(np.int64))
        if self.has_token_type_ids:
            types = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            feeds["token_type_ids"] = self.upload(types)
        feeds |= cache if cache is not None else self.empty_cache(batch)
        in_place = cache if self.writes_in_place and cache and _room(cache) >= attention_mask.shape[1] else None
        outputs = self._run({**feeds, **(adapter or {})}, on_host=("logits",), in_place=in_place)
        logits = outputs.pop("logits", None)
        check_logits(self._file, logits, batch, new)
        logits = numpy_of(logits).astype(np.float32, copy=False)
        if in_place is not None:  # the OrtValues given: only they keep the memory
            return logits, in_place
        return logits, {name.replace("present.", "past_key_values.", 1): value for name, value in outputs.items()}

    def run(
        self, inputs: Mapping[str, NDArray[Any]], adapter: Mapping[str, Any] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run a graph of any inputs and outputs, such as that of a torch module.

        Args:
            inputs: Every input, by name.
            adapter: As `forward` takes it.

        Returns:
            Every output, by name.
        """
        feeds = {name: self.upload(values) for name, values in inputs.items()}
        outputs = self._run({**feeds, **(adapter or {})}, on_host=self._outputs)
        return {name: numpy_of(value) for name, value in outputs.items()}

    def _run(self, feeds: Mapping[str, Any], on_host: Sequence[str], in_place: Cache | None = None) -> dict[str, Any]:
        """The outputs as OrtValues: those that are named on the CPU, the others on the device, or in a cache."""
        binding = self.session.io_binding()
        try:
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                place = (in_place or {}).get(name.replace("present.", "past_key_values.", 1))
                if place is not None:
                    binding.bind_ortvalue_output(name, place)
                else:
                    binding.bind_output(name, "cpu" if name in on_host else self.provider)
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own classes have no common base
            raise CheckpointError(
                "onnxruntime cannot run the model", file=self._file, found=first_line(error)
            ) from error
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))


def _room(cache: Cache) -> int:
    """Tokens a row that a cache can hold."""
    return int(next(iter(cache.values())).shape()[2])


def host_ortvalue(array: NDArray[Any]) -> Any:
    """An OrtValue on the CPU that shares the array's memory; also in bfloat16, which numpy itself does not know."""
    ortvalue = import_onnxruntime().OrtValue
    if array.dtype.name == "bfloat16":
        return ortvalue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    return ortvalue.ortvalue_from_numpy(array)


def numpy_dtype(compute_dtype: str) -> np.dtype[Any]:
    """numpy's type for "fp32", "fp16" or "bf16"."""
    if compute_dtype == "bf16":
        import ml_dtypes

        return cast("np.dtype[Any]", np.dtype(ml_dtypes.bfloat16))
    return np.dtype(np.float16 if compute_dtype == "fp16" else np.float32)


def numpy_of(value: Any) -> NDArray[Any]:
    """The values of an OrtValue, on the CPU, also in bfloat16, which onnxruntime itself does not turn into an array."""
    if value.data_type() == "tensor(bfloat16)":
        from torch.utils import dlpack

        return dlpack.from_dlpack(value).float().cpu().numpy().astype(numpy_dtype("bf16"))
    return np.asarray(value.numpy())
