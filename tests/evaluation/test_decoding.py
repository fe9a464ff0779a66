"""Compare the predictions of a pack with those of single models, in the order of the rows."""

import pytest
import torch

from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.cell import Evaluation
from gkd_lab.config.fingerprint import replace_fields
from gkd_lab.encoding.batches import encode_rows
from gkd_lab.evaluation import decoding
from gkd_lab.evaluation.decoding import generate_predictions
from gkd_lab.metrics.scored_predictions import Prediction
from gkd_lab.models.packing import Pack
from gkd_lab.tasks import Row

from ..models.tiny import FAMILIES, tiny_examples, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WAYS = {
    "greedy": Evaluation(decoding="greedy", split="test", max_output_tokens=8, metrics=("accuracy",)),
    "sample": Evaluation(
        decoding="sample",
        temperature=0.7,
        seed=3,
        split="test",
        max_output_tokens=8,
        metrics=("accuracy",),
    ),
    "beam": Evaluation(
        decoding="beam",
        num_beams=3,
        length_penalty=0.6,
        split="test",
        max_output_tokens=8,
        metrics=("accuracy",),
    ),
}
WAYS["beam of T5X"] = replace_fields(WAYS["beam"], length_penalty=1, length_penalty_form="wu")


def rows(count: int = 12) -> list[Row]:
    """Make short and long rows in turn; each prompt identifies its row."""
    texts = [TOKENIZER.decode(example.prompt_ids) for example in tiny_examples(count)]
    return [Row(text, "a", (f"reference {n}",)) for n, text in enumerate(texts)]


def predict(pack: Pack, family: Family, way: str, dataset_rows: list[Row]) -> list[list[Prediction]]:
    examples, _ = encode_rows(
        TOKENIZER,
        [(row.prompt, row.target) for row in dataset_rows],
        is_encoder_decoder=family == "encoder-decoder",
        max_input_tokens=16,
        max_output_tokens=8,
    )
    return generate_predictions(pack, TOKENIZER, dataset_rows, examples, WAYS[way])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_pack_predicts_what_each_model_predicts_alone(family: Family, way: str) -> None:
    models, dataset_rows = [tiny_model(family, seed) for seed in range(3)], rows()
    together = predict(Pack.build(models), family, way, dataset_rows)
    for cell, model in enumerate(models):
        assert together[cell] == predict(Pack.build_single(model), family, way, dataset_rows)[0]
    assert len({p.text for predictions in together for p in predictions}) > 3


@pytest.mark.parametrize("way", WAYS)
def test_rows_keep_their_order_and_do_not_depend_on_their_batch(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset_rows = Pack.build_single(tiny_model("decoder-only", 0)), rows()
    together = predict(model, "decoder-only", way, dataset_rows)[0]
    assert [p.prompt for p in together] == [row.prompt for row in dataset_rows]
    assert [p.references for p in together] == [row.references for row in dataset_rows]
    monkeypatch.setattr(decoding, "MAX_BATCH_SEQUENCES", 5)
    assert predict(model, "decoder-only", way, dataset_rows)[0] == together
    monkeypatch.setattr(decoding, "MAX_BATCH_SEQUENCES", 1)
    assert predict(model, "decoder-only", way, dataset_rows)[0] == together


def test_the_form_of_the_length_penalty_reaches_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Pack.build_single(tiny_model("decoder-only", 2))
    by_wu = predict(pack, "decoder-only", "beam of T5X", rows())[0]
    by_power = replace_fields(WAYS["beam of T5X"], length_penalty_form="transformers")
    monkeypatch.setitem(WAYS, "by power", by_power)
    longer = predict(pack, "decoder-only", "by power", rows())[0]
    assert sum(p.tokens for p in longer) > sum(p.tokens for p in by_wu)


def test_sampling_noise_is_keyed_by_row() -> None:
    """A longer evaluation begins with the predictions of a shorter one, and cells share the noise."""
    dataset_rows = [rows()[0]] * 8
    model = tiny_model("decoder-only", 0)
    longer = predict(Pack.build_single(model), "decoder-only", "sample", dataset_rows)[0]
    assert len({p.text for p in longer}) > 1, "one prompt, eight draws"
    shorter = predict(Pack.build_single(model), "decoder-only", "sample", dataset_rows[:3])[0]
    assert shorter == longer[:3]
    twins = predict(Pack.build([model, model]), "decoder-only", "sample", dataset_rows)
    assert twins[0] == twins[1] == longer


def test_lengths_include_the_end_token() -> None:
    dataset_rows = rows(30)
    predictions = predict(
        Pack.build_single(tiny_model("decoder-only", 0)), "decoder-only", "sample", dataset_rows
    )
    ended = [p for p in predictions[0] if p.ended]
    cut = [p for p in predictions[0] if not p.ended]
    assert ended
    assert cut
    assert all(p.tokens == 8 for p in cut)
    assert all(1 <= p.tokens <= 8 for p in ended)
    assert all(len(p.text.split()) <= p.tokens - 1 for p in ended)


def test_progress_counts_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_BATCH_SEQUENCES", 5)
    progress: list[int] = []
    dataset_rows = rows(12)
    examples, _ = encode_rows(
        TOKENIZER,
        [(row.prompt, row.target) for row in dataset_rows],
        is_encoder_decoder=False,
        max_input_tokens=16,
        max_output_tokens=8,
    )
    pack = Pack.build_single(tiny_model("decoder-only", 0))
    generate_predictions(pack, TOKENIZER, dataset_rows, examples, WAYS["greedy"], progress.append)
    assert progress == [5, 5, 2]


def test_prediction_leaves_the_model_in_training_mode_and_without_gradients() -> None:
    model = tiny_model("decoder-only", 0).train()
    predict(Pack.build_single(model), "decoder-only", "greedy", rows(4))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
