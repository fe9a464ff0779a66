"""What cells of classifiers may ask for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gkd_lab import experiments
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.loss_terms import SquaredErrorConfig


def loaded(folder: Path, **fields: Any) -> Any:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"description": "d", "task": "classification", **fields}))
    return experiments.load(str(path), outputs=folder)


def test_a_classifier_is_distilled_on_the_data_by_default(tmp_path: Path) -> None:
    (cell,) = loaded(tmp_path).cells
    assert (cell.lmbda, cell.training.start.family) == (0, "sequence-classification")
    assert cell.training.start.sft is None and cell.training.teacher.sft is not None
    (number,) = loaded(tmp_path, task="scoring").cells
    assert number.training.objectives == (SquaredErrorConfig(),)
    assert "squared_error" in number.folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lmbda": 0.5}, r"lmbda 0.5 .* models of classification .* set lmbda to 0"),
        ({"source": "teacher"}, "source teacher: models of classification"),
        ({"teacher_scores": "full"}, "teacher_scores: models of classification"),
        ({"student": "org/some-model"}, "models of classification are made from scratch|revision"),
        (
            {"objectives": [{"beta": 0}, {"type": "hidden_states"}]},
            "hidden_states needs a language model",
        ),
        (
            {"objectives": [{"type": "squared_error", "against": "labels"}]},
            "for classes choose cross_entropy",
        ),
        ({"task": "scoring", "objectives": [{"type": "cross_entropy"}]}, "a regression predicts a number"),
        ({"task": "scoring", "objectives": [{"beta": 0}]}, "divergence compares distributions"),
        ({"evaluations": [{"decoding": "sample"}]}, "decoding sample"),
        (
            {
                "task": "arithmetic",
                "lmbda": 0,
                "objectives": [{"type": "squared_error", "against": "labels"}],
            },
            "squared_error against labels is for a regression",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, **fields)


def test_the_logits_of_a_language_model_can_be_matched(tmp_path: Path) -> None:
    (cell,) = loaded(tmp_path, task="arithmetic", objectives=[{"type": "squared_error"}]).cells
    assert cell.training.objectives == (SquaredErrorConfig(against="teacher"),)
