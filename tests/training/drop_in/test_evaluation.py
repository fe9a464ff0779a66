"""Evaluation and metrics as a user of TRL's GKDTrainer knows them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    EvalPrediction,
)

from gkd_lab import GKDTrainer

from ...training.scripts import chat, conversations, llama, logged, t5, trainer, weights
from .common import HALF, OFF, ON, ROUNDING, Make, assert_same

# ---- evaluation ----


def test_evaluation_data_may_be_given_at_once_under_names_or_later(tmp_path: Path) -> None:
    rows = Dataset.from_list(conversations(4))
    at_once = trainer(tmp_path, eval_dataset=rows)
    named = trainer(tmp_path, eval_dataset={"one": rows, "two": conversations(2)})
    later = trainer(tmp_path)
    expected = at_once.evaluate()["eval_loss"]
    assert expected > 0
    assert named.evaluate()["eval_one_loss"] == expected
    assert named.evaluate()["eval_two_loss"] != expected
    assert later.evaluate(eval_dataset=rows)["eval_loss"] == expected
    assert later.evaluate(eval_dataset={"one": rows})["eval_one_loss"] == expected
    assert later.evaluate(eval_dataset=rows.to_iterable_dataset())["eval_loss"] == expected
    assert later.evaluate(eval_dataset=rows, metric_key_prefix="test")["test_loss"] == expected
    assert later.predict(rows).metrics["test_loss"] == expected
    with pytest.raises(ValueError, match="eval_dataset"):
        later.evaluate()


@pytest.mark.parametrize("model", [llama, t5])
def test_training_evaluates_as_it_goes_and_is_not_moved_by_it(tmp_path: Path, model: Make) -> None:
    results = []
    for eval_dataset in (None, {"one": conversations(3), "two": conversations(5)}):
        made = trainer(
            tmp_path,
            model=model(0, dropout=0.1),
            teacher=model(1),
            eval_dataset=eval_dataset,
            arguments={
                **HALF,
                "max_steps": 4,
                "disable_dropout": False,
                "eval_strategy": "steps" if eval_dataset else "no",
                "eval_steps": 1,
            },
        )
        made.train()
        results.append(weights(made.model))
    assert_same(*results)
    for name in ("one", "two"):
        assert len(set(logged(made, f"eval_{name}_loss"))) == 4


def test_rows_without_a_target_leave_the_evaluation_of_the_others_as_it_is(tmp_path: Path) -> None:
    prompts = [{"messages": chat("one plus two ?")}] * 2
    made = trainer(tmp_path, arguments={**ON, "eval_on_policy": True, "per_device_eval_batch_size": 4})
    mixed = made.evaluate(eval_dataset=[*conversations(2), *prompts])
    expected = made.evaluate(eval_dataset=conversations(2))["eval_loss"]
    assert mixed["eval_loss"] == pytest.approx(expected, rel=ROUNDING)
    in_two = made.evaluate(eval_dataset=[*conversations(4), *prompts])
    assert in_two["eval_loss"] == pytest.approx(
        made.evaluate(eval_dataset=conversations(4))["eval_loss"], rel=ROUNDING
    )
    alone = made.evaluate(eval_dataset=prompts)
    assert math.isnan(alone["eval_loss"]) and alone["eval_on_policy_loss"] > 0


def accuracy_of_ids(found: EvalPrediction, *, shift: int) -> dict[str, float]:
    """From ids that `preprocess_logits_for_metrics` chose."""
    ids = found.predictions[:, : found.predictions.shape[1] - shift]
    labels = found.label_ids[:, shift:]
    mask = labels != -100
    return {"accuracy": float((ids == labels)[mask].mean()), "tokens": int(mask.sum())}


def right_by_hand(made: GKDTrainer, rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Tokens that the student would have written, row by row and without padding, and how many there are."""
    right = count = 0
    model = made.model.eval()
    for row in rows:
        example = made.encode_row(row)
        prompt, completion = torch.tensor([example.prompt_ids]), torch.tensor([example.completion_ids])
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                logits = model(input_ids=prompt, labels=completion).logits
            else:
                ids = torch.cat([prompt, completion], 1)
                logits = model(input_ids=ids).logits[:, prompt.shape[1] - 1 : -1]
        right += int((logits.argmax(-1) == completion).sum())
        count += completion.numel()
    return right, count


@pytest.mark.parametrize(("model", "shift"), [(llama, 1), (t5, 0)])
def test_a_users_token_accuracy_equals_a_count_by_hand(tmp_path: Path, model: Make, shift: int) -> None:
    rows = conversations(7)
    made = trainer(
        tmp_path,
        model=model(0),
        teacher=model(1),
        eval_dataset=rows,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda predictions: accuracy_of_ids(predictions, shift=shift),
        arguments={"per_device_eval_batch_size": 2, "max_steps": 8, "learning_rate": 1e-2, **OFF},
    )
    made.train()
    right, count = right_by_hand(made, rows)
    metrics = made.evaluate()
    assert 0 < right < count
    assert metrics["eval_tokens"] == count
    assert metrics["eval_accuracy"] == pytest.approx(right / count)


@pytest.mark.parametrize("model", [llama, t5])
def test_metrics_may_ask_for_the_inputs_and_the_losses(tmp_path: Path, model: Make) -> None:
    predictions: list[EvalPrediction] = []

    def note(found: EvalPrediction) -> dict[str, float]:
        predictions.append(found)
        return {}

    made = trainer(
        tmp_path,
        model=model(0),
        teacher=model(1),
        eval_dataset=conversations(4),
        compute_metrics=note,
        arguments={"include_for_metrics": ["inputs", "loss"]},
    )
    loss = made.evaluate()["eval_loss"]
    assert predictions[0].inputs.shape[0] == 4
    assert np.mean(predictions[0].losses) == pytest.approx(loss)


@pytest.mark.parametrize("model", [llama, t5])
def test_metrics_may_be_gathered_batch_by_batch(tmp_path: Path, model: Make) -> None:
    counted: list[int] = []

    def count(found: EvalPrediction, compute_result: bool) -> dict[str, float]:
        counted.append(int((found.label_ids != -100).sum()))
        return {"tokens": sum(counted)} if compute_result else {}

    made = trainer(
        tmp_path,
        model=model(0),
        teacher=model(1),
        eval_dataset=conversations(4),
        compute_metrics=count,
        arguments={"batch_eval_metrics": True, "per_device_eval_batch_size": 2},
    )
    expected = sum(len(made.encode_row(row).completion_ids) for row in conversations(4))
    assert made.evaluate()["eval_tokens"] == expected


def test_the_losses_weights_move_in_evaluations_too(tmp_path: Path) -> None:
    """A term whose weight ends at 0 is whole before the first step, and gone after the last."""
    moving = [{"type": "cross_entropy"}, {"beta": 0, "weight": 1.0, "final_weight": 0.0}]
    arguments = {"lmbda": 0.0, "learning_rate": 0.0, "objectives": moving}
    made = trainer(tmp_path, arguments=arguments, eval_dataset=conversations(4))
    first = made.evaluate()["eval_loss"]
    made.train()
    last = made.evaluate()["eval_loss"]
    expected = []
    for terms in ([{"type": "cross_entropy"}, {"beta": 0}], [{"type": "cross_entropy"}]):
        fixed = trainer(tmp_path, arguments={**arguments, "objectives": terms}, eval_dataset=conversations(4))
        expected.append(fixed.evaluate()["eval_loss"])
    assert [first, last] == pytest.approx(expected)


def test_a_beta_that_objectives_state_cannot_be_set_beside_them(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments={"objectives": [{"beta": 0.1}]})
    with pytest.raises(ValueError, match="set `objectives` instead"):
        made.beta = 0.5
    plain = trainer(tmp_path)
    plain.beta = 0.25
    assert plain.cells[0].beta == 0.25
