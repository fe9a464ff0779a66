"""Several texts a prompt: how an evaluation asks for them, how they are written and judged."""

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


def predicted(
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
def test_each_prompt_gets_its_texts_in_a_row_and_a_pack_gets_what_each_model_gets(family: Family) -> None:
    together = predicted(sampled(4), family, cells=2)
    for found in together:
        assert [one.prompt for one in found] == [row.prompt for row in ROWS for _ in range(4)]
        assert [one.references for one in found] == [row.references for row in ROWS for _ in range(4)]
        assert [one.sample for one in found] == [0, 1, 2, 3] * len(ROWS)
    assert together[0] == predicted(sampled(4), family)[0]
    assert len({one.text for one in together[0][:8]}) > 2


def test_texts_do_not_depend_on_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = predicted(sampled(3))
    for size in (1, 7):
        monkeypatch.setattr(decoding, "MAX_BATCH_SEQUENCES", size)
        assert predicted(sampled(3)) == [found]


def test_self_bleu_is_lower_the_higher_the_temperature() -> None:
    cold, warm = (
        score_predictions(["self_bleu"], predicted(sampled(4, temperature))[0])[0]["self_bleu"]
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


def test_a_calculator_is_asked_for_by_the_evaluation_and_needs_the_marks() -> None:
    asked = sampled(None).model_copy(update={"calculator": True})
    with pytest.raises(ValueError, match="needs a tokenizer that can write << = >>"):
        predicted(asked)


def evaluation(**fields: Any) -> Evaluation:
    return make_cell(evaluations=[fields]).evaluations[0]


def test_new_fields_leave_older_evaluations_what_they_were() -> None:
    plain = evaluation(decoding="sample", temperature=0.5)
    assert evaluation(decoding="sample", temperature=0.5, samples=1, calculator=False) == plain
    assert "samples" not in plain.canonical_json and "calculator" not in plain.canonical_json
    several = evaluation(decoding="sample", temperature=0.5, samples=8)
    assisted = evaluation(decoding="sample", temperature=0.5, calculator=True)
    assert len({one.fingerprint for one in (plain, several, assisted)}) == 3
    assert [one.name for one in (plain, several, assisted)] == [
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
def test_what_cannot_be_is_refused_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluation(**fields)
