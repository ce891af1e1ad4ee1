"""The course of a training: from our log, from transformers' Trainer, and from somebody who means harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_deploy.errors import AdapterError
from lora_deploy.pages.curves import draw_training
from lora_deploy.pages.training_log import read_curve
from lora_deploy.train.progress import LOG_NAME, write_log

ENTRIES = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "epoch": 0.1}, {"step": 2, "eval_loss": 1.75}]


def test_our_own_log_is_read_and_also_the_state_of_the_trainer(tmp_path: Path) -> None:
    assert read_curve(tmp_path) is None
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": ENTRIES, "best_metric": None}))
    curve = read_curve(tmp_path)
    assert curve is not None
    assert curve.loss == ((1, 2.5), (2, 1.5))
    assert curve.eval_loss == ((2, 1.75),)
    write_log(tmp_path / LOG_NAME, [*ENTRIES, {"step": 3, "loss": 1.0}])
    again = read_curve(tmp_path)
    assert again is not None
    assert again.loss[-1] == (3, 1.0)  # ours comes first


def test_a_training_that_was_killed_leaves_half_a_line(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text(json.dumps(ENTRIES[0]) + '\n{"step": 2, "lo')
    curve = read_curve(tmp_path)
    assert curve is not None
    assert curve.loss == ((1, 2.5),)


def test_whole_numbers_are_losses_and_an_empty_log_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text('{"step": 1, "message": "no loss"}\n')
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2}, {"step": 2, "loss": 1.5}]}')
    curve = read_curve(tmp_path)
    assert curve is not None
    assert curve.loss == ((1, 2.0), (2, 1.5))


def test_what_is_no_loss_is_left_out(tmp_path: Path) -> None:
    lines = [
        *('{"step": 1, "loss": NaN}', '{"step": 2, "loss": Infinity}', '{"step": 3, "loss": 1e999}', "[]", "7"),
        *('{"step": -1, "loss": 1.0}', '{"step": "4", "loss": 1.0}', '{"step": true, "loss": 1.0}', '{"loss": 1.0}'),
        *(
            '{"step": 5, "loss": "<script>"}',
            '{"step": 1' + "0" * 30 + ', "loss": 1.0}',
            '{"step": 6, "loss": 0.5}',
            "",
        ),
    ]
    (tmp_path / LOG_NAME).write_text("\n".join(lines))
    curve = read_curve(tmp_path)
    assert curve is not None
    assert curve.loss == ((6, 0.5),)


@pytest.mark.parametrize("name", [LOG_NAME, "trainer_state.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"not json\n{}",
        b"[" * 100_000 + b"\n",
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b"\xff\xfe\n",
        b'{"a": 1}' + b"," * 11_000_000,
        b'{"log_history": 3}' * 2,
    ],
    ids=["no json", "deep", "a long number", "no text", "large", "no log"],
)
def test_a_log_that_cannot_be_read_is_an_error_of_ours_and_a_note_on_the_page(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content + b"\n")
    with pytest.raises(AdapterError):
        read_curve(tmp_path)
    training = draw_training({"mine": tmp_path})
    assert training.chart is None
    (note,) = training.notes
    assert "mine" in note
    assert str(tmp_path) not in note


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    write_log(tmp_path / "elsewhere.jsonl", ENTRIES)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / LOG_NAME).symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(AdapterError, match="leads out"):
        read_curve(tmp_path / "adapter")


def test_a_long_log_is_drawn_as_means(tmp_path: Path) -> None:
    write_log(tmp_path / LOG_NAME, [{"step": step, "loss": float(step % 2)} for step in range(1, 1001)])
    training = draw_training({"mine": tmp_path})
    assert training.chart is not None
    assert "the mean of 3 logged ones" in training.notes[0]
    (line,) = [shape for shape in training.chart.shapes if shape.style.startswith("curve")]
    assert len(line.points.split()) == 334


def test_several_adapters_have_a_line_each_and_their_names(tmp_path: Path) -> None:
    for name in ("one", "two", "none"):
        (tmp_path / name).mkdir()
    for name in ("one", "two"):
        write_log(tmp_path / name / LOG_NAME, ENTRIES)
    training = draw_training({name: tmp_path / name for name in ("one", "two", "none")})
    assert [words for _, words in training.legend] == ["one", "two"]
    assert draw_training({"none": tmp_path / "none", "empty": ""}).chart is None
