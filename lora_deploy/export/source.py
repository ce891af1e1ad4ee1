"""Where the graph of a causal language model comes from: the one place that decides.

mobius' graphs are built in a second, read well and run fast; for some models they compute something else than
transformers does, without a word. Which ones was found out by comparing tiny random models (`tests/families.py`), field
by field of their configurations. A configuration that differs from its class's defaults only in fields that were seen
to be carried over is built by mobius; everything else is traced from transformers' own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.export.corrections import layer_windows
from lora_deploy.task import Task

__all__ = ["GraphSource", "SourceChoice", "check_graph", "choose_source"]

GraphSource = Literal["auto", "mobius", "traced"]

# Of no effect on the logits of a model that is not trained.
_INERT = (
    "_name_or_path architectures chunk_size_feed_forward dtype id2label label2id output_attentions "
    "output_hidden_states problem_type return_dict transformers_version bos_token_id eos_token_id pad_token_id "
    "use_cache initializer_range init_std attention_dropout attn_pdrop embd_pdrop resid_pdrop dropout "
    "layerdrop hidden_dropout residual_dropout embedding_dropout classifier_dropout summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn "
    "pretraining_tp is_decoder"
)
_SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
_ROPE = f"{_SIZES} num_key_value_heads head_dim hidden_act rms_norm_eps tie_word_embeddings rope_parameters"
_WINDOW = "sliding_window layer_types use_sliding_window max_window_layers"
_GEMMA = f"{_ROPE} {_WINDOW} hidden_activation query_pre_attn_scalar _sliding_window_pattern"
# By model type: the fields that reach mobius' graph, or that `correct_graph` puts right. tests/test_families.py varies
# each of them. Falcon is not here: mobius knows only names of weights that no Falcon has.
_CARRIED: dict[str, frozenset[str]] = {
    kind: frozenset(fields.split())
    for kind, fields in {
        "llama": f"{_ROPE} attention_bias",
        "mistral": f"{_ROPE} sliding_window",
        "qwen2": f"{_ROPE} {_WINDOW}",
        "qwen3": f"{_ROPE} {_WINDOW} attention_bias",
        "gemma2": f"{_GEMMA} attn_logit_softcapping final_logit_softcapping",
        "gemma3_text": _GEMMA,
        "phi3": f"{_SIZES} num_key_value_heads hidden_act rms_norm_eps tie_word_embeddings rope_parameters "
        "sliding_window original_max_position_embeddings",
        "gpt2": "vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon "
        "tie_word_embeddings",
        "gpt_neox": f"{_SIZES} hidden_act layer_norm_eps rope_parameters attention_bias",
        "opt": "vocab_size hidden_size num_hidden_layers ffn_dim max_position_embeddings word_embed_proj_dim "
        "num_attention_heads activation_function",
        "starcoder2": f"{_SIZES} num_key_value_heads hidden_act norm_epsilon rope_parameters sliding_window use_bias "
        "tie_word_embeddings",
    }.items()
}
# What a configuration may hold beside its class's own fields, and transformers' code may read.
_MEANINGFUL = frozenset().union(*_CARRIED.values())
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "quick_gelu")
# Where only a part of each head may be rotated.
_PARTIAL = ("phi3", "gpt_neox")
# By type of rotary embedding: the parameters that reach mobius' tables.
_ROPE_CARRIED = {
    "default": {"rope_theta", "partial_rotary_factor"},
    "linear": {"rope_theta", "partial_rotary_factor", "factor"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings"},
    "longrope": {
        "rope_theta",
        "partial_rotary_factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class SourceChoice:
    """Where a graph comes from.

    Attributes:
        source: "mobius" or "traced".
        reason: Why, for people.
    """

    source: Literal["mobius", "traced"]
    reason: str


def check_graph(graph: str) -> GraphSource:
    """Make sure that there is such a source of graphs.

    Raises:
        UsageError: There is none.
    """
    for known in get_args(GraphSource):
        if graph == known:
            return known  # type: ignore[no-any-return]
    raise UsageError("there is no such source of graphs", found=graph, expected=", ".join(get_args(GraphSource)))


def choose_source(asked: GraphSource, config: PreTrainedConfig, task: Task, file: str | Path) -> SourceChoice:
    """Decide where the graph of a model comes from.

    Args:
        asked: "auto" decides; the others are taken at their word, unless what they build is known to be wrong.
        config: Of the transformers model, without quantization.
        task: What it is for.
        file: The configuration's file, for messages.

    Raises:
        UsageError: mobius is asked for a task of which it has no graphs.
        CheckpointError: mobius is asked for a model that it is known to get wrong.
    """
    if task != "causal-lm":
        if asked == "mobius":
            raise UsageError(
                "mobius has no heads for this task", found=f"--graph mobius, {task}", remedy="leave --graph out"
            )
        return SourceChoice("traced", "mobius has no heads for this task")
    if asked == "traced":
        return SourceChoice("traced", "asked for")
    fault = _fault(config)
    if asked == "auto":
        if config.model_type not in _CARRIED:
            return SourceChoice("traced", f"mobius' graph of {config.model_type} was not verified")
        if fault is None:
            return SourceChoice("mobius", f"its graph of {config.model_type} was verified")
        return SourceChoice("traced", f"mobius' graph was not verified with {fault[0]} {fault[1]}")
    if fault is not None:
        raise CheckpointError(
            "mobius is not known to build the right graph for this model",
            file=file,
            tensor=fault[0],
            found=fault[1],
            remedy="take --graph auto, or leave it out",
        )
    return SourceChoice("mobius", "asked for")


def _fault(config: PreTrainedConfig) -> tuple[str, object] | None:
    """The first field that mobius leaves out, or may leave out, and its value."""
    carried = _CARRIED.get(config.model_type)
    if carried is None:  # asked for by name: the parity check is the judge, but it never sees a long text
        window = min((one for one in layer_windows(config) if one), default=None)
        longest = getattr(config, "max_position_embeddings", None)
        return ("sliding_window", window) if window and (longest is None or window < longest) else None
    inert = frozenset(_INERT.split())
    defaults, values = type(config)().to_dict(), config.to_dict()
    for name, default in defaults.items():
        if name not in carried | inert and values.get(name, default) != default:
            return name, values[name]
    others = values.keys() & _MEANINGFUL - carried - defaults.keys()
    if "hidden_act" in defaults:  # where both read it; StarCoder2's checkpoints hold another name of it too
        others -= {"activation_function"}
    for name in sorted(others):
        if values[name]:  # None and False are said of what a model does not have
            return name, values[name]
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if values.get(name, "silu") not in _ACTIVATIONS:
            return name, values[name]
    if "hidden_activation" in values and values.get("hidden_act") not in (None, values["hidden_activation"]):
        return "hidden_act", values["hidden_act"]  # transformers reads the one, mobius the other
    if config.model_type == "opt" and config.word_embed_proj_dim != config.hidden_size:
        return "word_embed_proj_dim", config.word_embed_proj_dim
    rope = values.get("rope_parameters") or {}
    if config.model_type not in _PARTIAL and rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor", rope["partial_rotary_factor"]
    return _rope_fault(rope)


def _rope_fault(parameters: Mapping[str, Any]) -> tuple[str, object] | None:
    nested = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if nested:  # one for each kind of layer: of all but the layers without a window, mobius reads the base only
        for name, one in nested.items():
            known = ("default", "linear") if name == "full_attention" else ("default",)
            kind = one.get("rope_type", "default")
            if kind not in known or set(one) - {"rope_type"} - _ROPE_CARRIED[kind] or "partial_rotary_factor" in one:
                return "rope_parameters", {name: dict(one)}
        return None
    kind = parameters.get("rope_type", "default")
    unknown = set(parameters) - {"rope_type", "type"} - _ROPE_CARRIED.get(kind, set())
    if kind not in _ROPE_CARRIED or unknown:
        return "rope_parameters", {"rope_type": kind} | {name: parameters[name] for name in sorted(unknown)}
    return None
