"""`OnnxClassifier` and `lora-deploy run` on a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from lora_deploy.bench import BenchOptions
from lora_deploy.bench.measure import measure
from lora_deploy.errors import UsageError
from lora_deploy.export import export_onnx
from lora_deploy.run import OnnxClassifier, OnnxModel, OnnxTokenClassifier
from lora_deploy.run.classify import _choose_squash
from tests.classifiers import (
    LABELS,
    ClassifierFactory,
    classifier_dir,
    load_theirs,
    peft_adapter,
    remembered_traces,
    save_classifier,
    train_with_peft,
)
from tests.commands import Command, assert_one_message
from tests.run.conftest import talking_export

__all__ = ["classifier_dir", "peft_adapter", "remembered_traces", "talking_export"]

TEXTS = ["a good film", "no", "rain again, all day"]
PAIRS = ["yes", "a longer text", "?"]


@pytest.fixture(scope="module")
def exported(
    classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("moods") / "out"
    export_onnx(classifier_dir("bert"), peft_adapter("bert"), output=output, quantization="none", verify=False)
    return output


@torch.no_grad()
def _expected(base: Path, adapter: Path, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(load_theirs(base, "none"), adapter).eval()
    encoded = AutoTokenizer.from_pretrained(base)(texts, pairs, padding=True, return_tensors="pt")
    if pairs is not None:  # the tokenizer of bytes does not say which text a token is of
        starts = [len(text.encode()) for text in texts]
        positions = torch.arange(encoded["input_ids"].shape[1])
        encoded["token_type_ids"] = torch.stack([(positions >= start).long() for start in starts])
    return model(**encoded).logits.softmax(-1)


def test_texts_are_padded_and_get_the_probabilities_of_transformers(
    exported: Path, classifier_dir: ClassifierFactory, peft_adapter: ClassifierFactory
) -> None:
    classifier = OnnxClassifier(exported)
    expected = _expected(classifier_dir("bert"), peft_adapter("bert"), TEXTS)
    assert classifier.labels == list(LABELS.values())
    found = classifier.classify(TEXTS)
    for one, row in zip(found, expected, strict=True):
        assert list(one.probabilities) == list(LABELS.values())
        assert list(one.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert one.label == LABELS[int(row.argmax())]
    alone = classifier.classify(TEXTS[1:2])[0]
    assert alone.probabilities == pytest.approx(found[1].probabilities, abs=1e-5)


def test_the_second_text_of_a_pair_is_told_apart(
    exported: Path,
    classifier_dir: ClassifierFactory,
    peft_adapter: ClassifierFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = OnnxClassifier(exported)
    texts = ["abcde", "fghij", "klmno"]
    pairs = ["fghij", "12345", "-----"]
    plain = classifier.classify([one + two for one, two in zip(texts, pairs, strict=True)])
    encode = classifier.tokenizer

    def with_types(*arguments: object, **options: object) -> dict[str, object]:
        encoded = dict(encode(*arguments, **options))
        encoded["token_type_ids"] = encoded["input_ids"] * 0
        encoded["token_type_ids"][:, 5:] = 1
        return encoded

    with_types.pad_token_id = encode.pad_token_id  # type: ignore[attr-defined]
    monkeypatch.setattr(classifier, "tokenizer", with_types)
    found = classifier.classify(texts, pairs)
    expected = _expected(classifier_dir("bert"), peft_adapter("bert"), texts, pairs)
    assert [list(one.probabilities.values()) for one in found] == [
        pytest.approx(row.tolist(), abs=1e-5) for row in expected
    ]
    assert [one.probabilities for one in found] != [one.probabilities for one in plain]


def test_the_command_prints_the_class_and_all_probabilities(exported: Path, command: Command) -> None:
    expected = OnnxClassifier(exported).classify(["a good film"])[0]
    ended = command("run", exported, "--prompt", "a good film")
    assert ended.code == 0, ended.err
    first, *rest = ended.out.splitlines()
    assert first == expected.label
    assert sorted(line.split()[1] for line in rest) == sorted(LABELS.values())
    assert rest[0].split() == [f"{expected.probabilities[first]:.4f}", first]
    ended = command("run", exported, "--prompt", "a good film", "--json")
    assert json.loads(ended.out) == {"label": expected.label, "probabilities": expected.probabilities}


@pytest.mark.parametrize("option", [("--temperature", "0"), ("--max-new-tokens", "256"), ("--no-chat-template",)])
def test_options_of_generation_are_refused(option: tuple[str, ...], exported: Path, command: Command) -> None:
    """Also where the value is the default."""
    assert_one_message(command("run", exported, "--prompt", "x", *option), 2, "is a classifier", option[0])


def test_what_cannot_be_classified_is_refused(exported: Path, command: Command) -> None:
    classifier = OnnxClassifier(exported)
    for texts, pairs in (([], None), ("a text", None), (["a", "b"], ["c"])):
        with pytest.raises(UsageError, match="takes a list of texts"):
            classifier.classify(texts, pairs)
    assert classifier.context_length == 26
    with pytest.raises(UsageError, match="longer than the model's context"):
        classifier.classify(["x" * 27])
    assert len(classifier.classify(["x" * 26])) == 1
    assert_one_message(command("run", exported, "--prompt", "x", "--adapter", "mood"), 2)


def test_each_class_of_model_is_opened_by_its_own(exported: Path, talking_export: object) -> None:
    with pytest.raises(UsageError, match="is a classifier"):
        OnnxModel(exported)
    _, talks = talking_export()  # type: ignore[operator]
    with pytest.raises(UsageError, match="is no classifier"):
        OnnxClassifier(talks)


def test_several_labels_a_text_are_probabilities_of_their_own() -> None:
    logits = torch.tensor([[0.0, 2.0]], dtype=torch.float64).numpy()
    several = _choose_squash({"problem_type": "multi_label_classification"}, 2)(logits)
    assert several[0].tolist() == pytest.approx([0.5, 0.8807970779])
    assert _choose_squash({"problem_type": "regression"}, 1)(logits) is logits
    assert _choose_squash({}, 2)(logits).sum() == pytest.approx(1.0)


def test_texts_get_a_class_for_each_token_on_the_command_line_too(tmp_path: Path, command: Command) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_classifier("distilbert", base, kind=AutoModelForTokenClassification)
    train_with_peft(base, adapter, ["q_lin", "v_lin"], task_type="TOKEN_CLS")
    export_onnx(base, adapter, output=output, quantization="none", verify=False)
    texts = ["Ada met Bob", "no"]
    found = OnnxTokenClassifier(output).classify(texts)
    model = peft.PeftModel.from_pretrained(load_theirs(base, "none"), adapter).eval()
    encoded = AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits.softmax(-1)
    for number, row in enumerate(found):
        kept = encoded["attention_mask"][number].bool()
        best = expected[number][kept].max(-1)
        assert [one.label for one in row] == [LABELS[index] for index in best.indices.tolist()]
        assert [one.probability for one in row] == pytest.approx(best.values.tolist(), abs=1e-5)
    ended = command("run", output, "--prompt", texts[0])
    assert ended.code == 0, ended.err
    assert [line.split()[1] for line in ended.out.splitlines()] == [one.label for one in found[0]]
    printed = json.loads(command("run", output, "--prompt", texts[0], "--json").out)["tokens"]
    assert [one["token"] for one in printed] == [one.token for one in found[0]]
    with pytest.raises(UsageError, match="is no classifier") as caught:
        OnnxClassifier(output)
    assert caught.value.details["remedy"] == "open it with OnnxTokenClassifier"
    with pytest.raises(UsageError, match="is a classifier"):
        OnnxModel(output)
    with pytest.raises(UsageError, match="takes a list of texts"):
        OnnxTokenClassifier(output).classify([])


def test_bench_measures_texts(exported: Path, command: Command) -> None:
    sample = measure(BenchOptions(directory=exported))
    assert sample.bursts.keys() == {"open", "first_text", "texts", "texts_in_batch"}
    assert (sample.task, sample.prompt_tokens, sample.tokens) == ("sequence-classification", 26, 0)
    assert [sample.bursts[name].count for name in ("first_text", "texts", "texts_in_batch")] == [1, 8, 8]
    assert all(burst.seconds > 0 for burst in sample.bursts.values())
    assert_one_message(command("bench", exported, "--tokens", 3, "--quiet"), 2, "classifier", "--tokens")
