"""LoRA on embeddings, rows of single tokens and ties, through PEFT's files both ways; live PEFT is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_deploy.adapter import adapter_of, load_adapter, read_adapter, save_adapter, write_adapter
from lora_deploy.adapter.model import apply_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import AdapterError, ConfigError
from lora_deploy.layers import count_parameters, get_lora_model
from lora_deploy.layers.embedding import LoraEmbedding, TiedLoraHead
from lora_deploy.quantization import load_base_model
from tests import conftest
from tests.adapted_tables import CASES, QUIET, TIED, TOKENS, UNTIED, Case, peft_model, without_tables
from tests.conftest import CheckpointFactory, tiny_model

pytestmark = QUIET
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
WEIGHTS = "adapter_model.safetensors"
# A head that is tied to an embedding has a row of zeros for the padding, whose magnitude is 0 / 0, in PEFT too.
TRAINED = {name: case for name, case in CASES.items() if name != "DoRA on both, tied"}
IDS = torch.tensor([[130, 5, 77, 2, 9, 1, 4], [8, 130, 3, 77, 5, 5, 90]])


def logits(model: Any) -> torch.Tensor:
    """Of texts in which the tokens whose rows are trained occur."""
    return conftest.logits(model, IDS)


def _base(case: Case) -> Any:
    return tiny_model(case.family, **case.base)


def _tables(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What embedding and head multiply with, found from outside."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, dim = embedding.weight.shape
    with torch.no_grad():
        return embedding(torch.arange(rows)[None])[0], head(torch.eye(dim)).t()


@ALL
def test_both_read_what_the_other_wrote(case: Case, tmp_path: Path) -> None:
    before = logits(_base(case))
    theirs = peft_model(_base(case), case.config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    ours = load_adapter(_base(case), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(_base(case), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    found, wanted = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert found.keys() == {name for name in wanted if not name.endswith(".base_layer.weight")}
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    write_adapter(read_adapter(tmp_path / "theirs", lazy=True), tmp_path / "copied")
    assert load_file(tmp_path / "copied" / WEIGHTS).keys() == wanted.keys()
    assert (expected - before).abs().max() > 0.05
    without_tables(theirs)
    assert (expected - logits(theirs)).abs().max() > 0.05


@ALL
def test_embedding_and_head_are_what_live_peft_makes_of_them(case: Case, tmp_path: Path) -> None:
    theirs = peft_model(_base(case), case.config)
    theirs.save_pretrained(tmp_path)
    base, found = _base(case), _tables(load_adapter(_base(case), tmp_path))
    for one, other in zip(found, _tables(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found[1], _tables(base)[1]) != case.head
    assert torch.allclose(*found, atol=1e-5) == case.alike


@pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED)
def test_training_begins_at_the_base_and_gradients_reach_what_is_trained(case: Case, tmp_path: Path) -> None:
    base = logits(_base(case))
    model = get_lora_model(_base(case), LoraConfig(r=4, lora_alpha=10, **case.config))
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
    theirs = peft.get_peft_model(_base(case), peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **case.config))
    save_adapter(model, tmp_path)
    peft.PeftModel.from_pretrained(_base(case), tmp_path)  # would name what is missing
    if not case.alike and not case.config.get("ensure_weight_tying"):  # PEFT counts what is shared twice
        assert count_parameters(model).trainable == theirs.get_nb_trainable_parameters()[0]
    optimizer = torch.optim.SGD([values for values in model.parameters() if values.requires_grad], lr=1.0)
    for _ in range(2):  # A is zero at first, or B is
        model(input_ids=torch.tensor([[130, 5, 77, 2, 9, 1]])).logits.square().mean().backward()
        optimizer.step()
    assert all(bool(values.grad.any()) for values in model.parameters() if values.requires_grad)
    trained = logits(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(_base(case), tmp_path)), trained, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["LoRA, tied", "DoRA, untied", "tokens, untied", "tokens of both, tied"])
def test_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = peft_model(_base(case), case.config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(_base(case), tmp_path)
    found = {}
    for model in (theirs, ours):
        model(input_ids=torch.tensor([[130, 5, 77, 2, 9, 1, 0]])).logits.square().mean().backward()
        named = {key: values.grad for key, values in model.named_parameters() if values.grad is not None}
        found[model is ours] = {
            key.replace("base_model.model.", "").replace("token_adapter.", ""): grad for key, grad in named.items()
        }
    theirs_by_name = {
        key.replace(".default", "").replace("_vector.weight", "_vector"): grad for key, grad in found[False].items()
    }
    assert theirs_by_name.keys() == found[True].keys()
    for key, grad in theirs_by_name.items():
        torch.testing.assert_close(found[True][key], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_beside_a_quantized_base_the_table_is_dense(
    method: str, checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    base = str(checkpoint_dir("llama", method, **TIED))
    for name in ("LoRA, kept tied", "tokens, tied"):
        theirs = peft_model(load_base_model(base, method), CASES[name].config)
        theirs.save_pretrained(tmp_path / name)
        ours = load_adapter(load_base_model(base, method), tmp_path / name).eval()
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_the_first_values_are_distributed_as_pefts(init: bool | str) -> None:
    config: dict[str, Any] = {"r": 8, "target_modules": ["embed_tokens"], "init_lora_weights": init}
    ours = get_lora_model(tiny_model("llama"), LoraConfig(**config)).get_submodule("model.embed_tokens")
    theirs: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**config)).get_submodule(
        "base_model.model.model.embed_tokens"
    )
    assert isinstance(ours, LoraEmbedding)
    for one, other in (
        (ours.lora_embedding_A, theirs.lora_embedding_A),
        (ours.lora_embedding_B, theirs.lora_embedding_B),
    ):
        assert one.shape == other["default"].shape
        assert float(one.detach().std()) == pytest.approx(float(other["default"].detach().std()), abs=0.2)


def test_a_tied_head_holds_the_embeddings_own_parameters() -> None:
    model = get_lora_model(
        tiny_model("llama", **TIED), LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, TiedLoraHead)
    assert head.lora_embedding_A is embedding.lora_embedding_A
    trained = [values for values in model.parameters() if values.requires_grad]
    assert len(trained) == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two ways": ({"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "trained in two ways"),
    "saved and rows": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]},
        "trained in two ways",
    ),
    "the head itself": ({"target_modules": ["lm_head"], "trainable_token_indices": [1]}, "changed itself"),
    "a bias": ({"target_modules": ["embed_tokens"], "lora_bias": True}, "no bias of B"),
    "no such table": ({"target_modules": ["q_proj"], "trainable_token_indices": {"wte": [1]}}, "not in the model"),
    "no such token": ({"target_modules": ["q_proj"], "trainable_token_indices": [131]}, "rows cannot be trained"),
    "apart and tied": (
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]},
            "ensure_weight_tying": True,
        },
        "other tokens each",
    ),
    "a DoRA that is tied": (
        {"target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True},
        "cannot be tied",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(name: str) -> None:
    config, message = REFUSED[name]
    model = tiny_model("llama", **TIED)
    with pytest.raises(ConfigError, match=message) as caught:
        get_lora_model(model, LoraConfig(**config))
    assert caught.value.details["tensor"]


def test_a_tie_that_peft_would_lose_is_refused() -> None:
    with pytest.raises(ConfigError, match="PEFT ties no embedding of this name"):
        get_lora_model(tiny_model("gpt2"), LoraConfig(target_modules=["wte"], ensure_weight_tying=True))


def test_a_tie_that_peft_did_not_make_is_not_made_here(tmp_path: Path) -> None:
    theirs = peft_model(tiny_model("gpt2"), {"target_modules": ["wte"], "ensure_weight_tying": True})
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tiny_model("gpt2"), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    assert torch.equal(_tables(model)[1], _tables(tiny_model("gpt2"))[1])


@pytest.mark.parametrize(
    ("name", "said"), [("LoRA, tied", "tied no longer"), ("LoRA, kept tied", "stay one"), ("tokens, tied", "stay one")]
)
def test_the_log_says_what_becomes_of_a_tie(name: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        get_lora_model(_base(CASES[name]), LoraConfig(**CASES[name].config))
    assert said in caplog.text


@pytest.mark.parametrize("tokens", [[3, 3], [-1], {"embed_tokens": [2, 2]}])
def test_tokens_twice_and_below_zero_are_refused(tokens: Any) -> None:
    with pytest.raises(ValueError, match="token_indices"):
        LoraConfig(trainable_token_indices=tokens)


def _saved(name: str, directory: Path) -> Path:
    peft_model(_base(CASES[name]), CASES[name].config).save_pretrained(directory)
    return directory


def _edit(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_rows_for_other_tokens_than_the_configuration_names(tmp_path: Path) -> None:
    _edit(_saved("tokens, untied", tmp_path), trainable_token_indices=[1, 2])
    with pytest.raises(AdapterError, match="rows for other tokens") as caught:
        read_adapter(tmp_path)
    assert "model.embed_tokens" in str(caught.value.details["tensor"])


def test_rows_that_are_missing(tmp_path: Path) -> None:
    _edit(_saved("LoRA, untied", tmp_path), trainable_token_indices=TOKENS)
    with pytest.raises(AdapterError, match="lacks the rows"):
        read_adapter(tmp_path)


def test_half_an_update(tmp_path: Path) -> None:
    file = _saved("LoRA, untied", tmp_path) / WEIGHTS
    tensors = load_file(file)
    del tensors["base_model.model.model.embed_tokens.lora_embedding_B"]
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="another update than its configuration says"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["LoRA, untied", "tokens, untied"])
def test_a_base_with_another_vocabulary(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="table of tokens that the base does not have") as caught:
        load_adapter(tiny_model("llama", vocab_size=125, **UNTIED), _saved(name, tmp_path))
    assert caught.value.details["tensor"] == "model.embed_tokens"


def test_a_base_with_another_table(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="another table of tokens than the base's"):
        load_adapter(tiny_model("llama", seed=5, **UNTIED), _saved("LoRA, untied", tmp_path))


def test_updates_that_are_said_to_be_tied_and_differ(tmp_path: Path) -> None:
    adapter = read_adapter(_saved("LoRA on both, tied", tmp_path))
    adapter.config.ensure_weight_tying = True
    with pytest.raises(AdapterError, match="their updates differ"):
        apply_adapter(tiny_model("llama", **TIED), adapter)


def test_another_adapter_of_the_same_kind_takes_its_place(tmp_path: Path) -> None:
    model = load_adapter(tiny_model("llama", **TIED), _saved("tokens, tied", tmp_path / "one"))
    torch.manual_seed(9)
    other = peft_model(tiny_model("llama", **TIED), CASES["tokens, tied"].config)
    other.save_pretrained(tmp_path / "two")
    torch.testing.assert_close(
        logits(load_adapter(model, tmp_path / "two").eval()), logits(other), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(AdapterError, match="trains other parameters"):
        load_adapter(model, _saved("LoRA, tied", tmp_path / "three"))
    assert adapter_of(model).tables.keys() == {"model.embed_tokens"}
