"""Generate and score several samples per prompt."""

from typing import Any

import pytest

from gkd_lab.config import ConfigError
from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.cell import Evaluation
from gkd_lab.encoding.batches import encode_rows
from gkd_lab.evaluation import decoding
from gkd_lab.evaluation.decoding import generate_predictions
from gkd_lab.metrics.scored_predictions import Prediction, score_predictions
from gkd_lab.models.packing import Pack
from gkd_lab.tasks import Row

from ..config.stub import make_cell
from ..models.tiny import FAMILIES, tiny_examples, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = [
    Row(TOKENIZER.decode(example.prompt_ids), "a", (f"reference {n}",))
    for n, example in enumerate(tiny_examples(9))
]


def sampled(
    samples: int | None, temperature: float = 1.0, metrics: tuple[str, ...] = ("rouge1",)
) -> Evaluation:
    return Evaluation(
        decoding="sample",
        temperature=temperature,
        seed=3,
        split="test",
        max_output_tokens=8,
        samples=samples,
        metrics=metrics,
    )


def predict(
    evaluation: Evaluation, family: Family = "decoder-only", cells: int = 1
) -> list[list[Prediction]]:
    pack = Pack.build([tiny_model(family, seed) for seed in range(cells)])
    texts = [(row.prompt, row.target) for row in ROWS]
    examples, _ = encode_rows(
        TOKENIZER,
        texts,
        is_encoder_decoder=family == "encoder-decoder",
        max_input_tokens=16,
        max_output_tokens=8,
    )
    return generate_predictions(pack, TOKENIZER, ROWS, examples, evaluation)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_follow_their_prompt_and_equal_those_of_single_models(family: Family) -> None:
    together = predict(sampled(4), family, cells=2)
    for predictions in together:
        assert [p.prompt for p in predictions] == [row.prompt for row in ROWS for _ in range(4)]
        assert [p.references for p in predictions] == [row.references for row in ROWS for _ in range(4)]
        assert [p.sample for p in predictions] == [0, 1, 2, 3] * len(ROWS)
    assert together[0] == predict(sampled(4), family)[0]
    assert len({p.text for p in together[0][:8]}) > 2


def test_texts_do_not_depend_on_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    (predictions,) = predict(sampled(3))
    for size in (1, 7):
        monkeypatch.setattr(decoding, "MAX_BATCH_SEQUENCES", size)
        assert predict(sampled(3)) == [predictions]


def test_self_bleu_falls_with_the_temperature() -> None:
    cold, warm = (
        score_predictions(["self_bleu"], predict(sampled(4, temperature))[0])[0]["self_bleu"]
        for temperature in (0.05, 3.0)
    )
    assert warm["value"] < cold["value"]
    assert "|samples:4|" in warm["signature"]


def test_progress_counts_prompts() -> None:
    heard: list[int] = []
    texts = [(row.prompt, row.target) for row in ROWS]
    examples, _ = encode_rows(
        TOKENIZER, texts, is_encoder_decoder=False, max_input_tokens=16, max_output_tokens=8
    )
    pack = Pack.build_single(tiny_model("decoder-only", 0))
    generate_predictions(pack, TOKENIZER, ROWS, examples, sampled(5), heard.append)
    assert sum(heard) == len(ROWS)


def test_a_calculator_needs_a_tokenizer_with_the_marks() -> None:
    evaluation_with_calculator = sampled(None).model_copy(update={"calculator": True})
    with pytest.raises(ValueError, match="<< = >>"):
        predict(evaluation_with_calculator)


def evaluation(**fields: Any) -> Evaluation:
    return make_cell(evaluations=[fields]).evaluations[0]


def test_new_fields_do_not_change_older_evaluations() -> None:
    plain = evaluation(decoding="sample", temperature=0.5)
    assert evaluation(decoding="sample", temperature=0.5, samples=1, calculator=False) == plain
    assert "samples" not in plain.canonical_json and "calculator" not in plain.canonical_json
    several = evaluation(decoding="sample", temperature=0.5, samples=8)
    assisted = evaluation(decoding="sample", temperature=0.5, calculator=True)
    assert len({e.fingerprint for e in (plain, several, assisted)}) == 3
    assert [e.name for e in (plain, several, assisted)] == [
        "sample0.5",
        "sample0.5x8",
        "sample0.5+calculator",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoding": "greedy", "samples": 8}, "samples: greedy decoding"),
        ({"decoding": "beam", "samples": 2}, "samples: beam decoding"),
        ({"decoding": "sample", "metrics": ["self_bleu"]}, "self_bleu .*samples: 8"),
        ({"decoding": "beam", "calculator": True}, "calculator: beam"),
    ],
)
def test_invalid_evaluations_are_refused_before_a_run(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluation(**fields)
