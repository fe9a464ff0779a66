"""Hidden-layer matching: values and gradients by plain formulas, projections, and cells of a pack."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    TrainerCallback,
)

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses.auxiliary_losses import LossInputs
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.hidden_states import (
    HiddenStateLoss,
    HiddenStateModule,
    cosine_distance,
    mean_squared_error,
)
from gkd_lab.losses.layer_stacks import StackName, stack_size
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses
from gkd_lab.models.forward import Sequences
from gkd_lab.training.arguments import GKDConfig

from ..models.tiny import FAMILIES, tiny_model
from ..training.driving import Run, assert_close, assert_identical, cell, distil
from ..training.passes import COMPLETIONS, PROMPTS, labelled, longer, rows, seen
from ..training.scripts import conversations, llama, trainer
from .descriptions import hidden_state_loss, parse

CASES: list[tuple[Family, StackName]] = [
    ("decoder-only", "decoder"),
    ("encoder-decoder", "decoder"),
    ("encoder-decoder", "encoder"),
]
Loss = Literal["mse", "cosine"]


def pair(family: Family, teacher_width: int = 32) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model(family, 7), tiny_model(family, 3, width=teacher_width)


def build_module(
    measure: HiddenStateLoss, models: tuple[PreTrainedModel, PreTrainedModel]
) -> HiddenStateModule:
    made = measure.create_module(models[0].config, models[1].config, seed=5).double()
    assert isinstance(made, HiddenStateModule)
    return made


def positions(family: Family, stack: StackName, batch: Sequences) -> list[tuple[int, int, float]]:
    """List (row, position in the stack, weight) of each token; each trained row has half the weight."""
    weighted_positions = []
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        if not completion:
            continue
        if stack == "encoder":
            weighted_positions += [(row, n, 0.5 / len(prompt)) for n in range(len(prompt))]
        else:
            start = batch.prompt_ids.shape[1] - 1 if family == "decoder-only" else 0
            weighted_positions += [(row, start + n, 0.5 / len(completion)) for n in range(len(completion))]
    return weighted_positions


def plain(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance of two vectors: half of PKD's formula."""
    if loss == "mse":
        return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(teacher)  # type: ignore[return-value]
    return (student / student.norm() - teacher / teacher.norm()).square().sum() / 2


def expected(
    module: HiddenStateModule, inputs: LossInputs, family: Family, pairs: tuple[tuple[int, int], ...]
) -> Tensor:
    config = module.config
    prefix = "" if family == "decoder-only" else f"{config.stack}_"
    student_states, teacher_states = (
        item.outputs[f"{prefix}hidden_states"] for item in (inputs.student, inputs.teacher) if item
    )
    total = torch.zeros((), dtype=torch.float64)
    for n, (mine, theirs) in enumerate(pairs):
        for row, place, weight in positions(family, config.stack, inputs.rows):
            state = student_states[mine][row, place]
            if len(module.projections):
                state = module.projections[n] @ state
            total = total + weight * plain(config.loss, state, teacher_states[theirs][row, place])
    return total / len(pairs)


# ---- values ----


def test_the_distances_of_two_vectors_are_those_worked_out_by_hand() -> None:
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert mean_squared_error(student, teacher).tolist() == [1.0]
    assert cosine_distance(student, teacher).item() == pytest.approx(1 - 24 / 25)
    assert cosine_distance(student, -2 * student).item() == pytest.approx(2)


@pytest.mark.parametrize("loss", ("mse", "cosine"))
@pytest.mark.parametrize("width", (16, 32))
@pytest.mark.parametrize(("family", "stack"), CASES)
def test_value_and_gradients_are_those_of_a_plain_formula(
    family: Family, stack: StackName, width: int, loss: Loss
) -> None:
    models = pair(family, width)
    module = build_module(hidden_state_loss(((0, 0), (1, 2), (2, 2)), loss, stack), models)
    inputs = seen(*models, rows(family), "hidden_states")
    assert len(module.projections) == (3 if width == 32 else 0)
    value, other = module(inputs), expected(module, inputs, family, ((0, 0), (1, 2), (2, 2)))
    torch.testing.assert_close(value, other)
    assert value > 1e-3
    learnt = [p for p in models[0].parameters() if p.requires_grad] + list(module.parameters())
    ours, theirs = (
        torch.autograd.grad(item, learnt, retain_graph=True, allow_unused=True) for item in (value, other)
    )
    assert [g is None for g in ours] == [g is None for g in theirs]
    for mine, theirs_too in zip(ours, theirs, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs_too)


@pytest.mark.parametrize(("family", "stack"), CASES)
def test_a_student_equal_to_its_teacher_has_no_loss(family: Family, stack: StackName) -> None:
    model = tiny_model(family, 7)
    for loss in ("mse", "cosine"):
        module = build_module(hidden_state_loss("uniform", loss, stack), (model, model))  # type: ignore[arg-type]
        assert module(seen(model, model, rows(family), "hidden_states")).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("family", "stack"), CASES)
def test_padding_changes_nothing(family: Family, stack: StackName) -> None:
    models = pair(family)
    module = build_module(hidden_state_loss("uniform", stack=stack), models)
    batch = rows(family)
    values = [module(seen(*models, item, "hidden_states")) for item in (batch, longer(batch, 3))]
    torch.testing.assert_close(*values)


def test_the_last_layer_is_what_the_head_reads() -> None:
    model = tiny_model("decoder-only", 7)
    inputs = seen(model, model, rows("decoder-only"), "hidden_states")
    head = model.get_output_embeddings()
    torch.testing.assert_close(
        head(inputs.student.outputs["hidden_states"][2])[:, -5:], inputs.student.last_hidden
    )


def classifier(width: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, num_hidden_layers=2, num_labels=3, hidden_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification(config).double().eval()


def test_of_a_classifier_every_token_of_a_text_shares_the_weight_of_its_label() -> None:
    models = classifier(8, 0), classifier(12, 1)
    module = build_module(hidden_state_loss(((1, 2),)), models)
    inputs = seen(*models, labelled(rows("encoder-decoder")), "hidden_states")
    assert inputs.teacher is not None
    total = torch.zeros((), dtype=torch.float64)
    for row, prompt in enumerate(PROMPTS):
        for place in range(len(prompt)):
            projected = module.projections[0] @ inputs.student.outputs["hidden_states"][1][row, place]
            distance = plain("mse", projected, inputs.teacher.outputs["hidden_states"][2][row, place])
            total = total + distance / (len(PROMPTS) * len(prompt))
    torch.testing.assert_close(module(inputs), total)


def test_rows_without_anything_trained_add_nothing() -> None:
    models = pair("decoder-only")
    inputs = seen(*models, rows("decoder-only"), "hidden_states")
    inputs.weights.zero_()
    value = build_module(hidden_state_loss(), models)(inputs)
    assert value.item() == 0
    value.backward()


# ---- projections ----


def test_projections_come_from_the_seed_alone_and_leave_other_draws_as_they_are() -> None:
    student, teacher = (model.config for model in pair("decoder-only"))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (hidden_state_loss().create_module(student, teacher, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    drawn = [dict(module.named_parameters()) for module in (first, again, other)]
    assert {name: tuple(p.shape) for name, p in drawn[0].items()} == {
        "projections.0": (32, 16),
        "projections.1": (32, 16),
    }
    for name, value in drawn[0].items():
        assert torch.equal(value, drawn[1][name])
        assert not torch.equal(value, drawn[2][name])
        assert 0.2 < value.abs().max() <= 0.25  # 1 / sqrt(16)
    assert not torch.equal(drawn[0]["projections.0"], drawn[0]["projections.1"])


def test_models_of_one_width_need_no_projection() -> None:
    config = tiny_model("decoder-only", 7).config
    assert not list(hidden_state_loss().create_module(config, config, 0).parameters())


# ---- what models have ----


def test_sizes_are_read_from_the_configurations_of_both_families() -> None:
    llama = LlamaConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2)
    t5 = T5Config(num_layers=2, num_decoder_layers=5, d_model=8, num_heads=4)
    bart = BartConfig(
        encoder_layers=2, decoder_layers=5, d_model=8, encoder_attention_heads=4, decoder_attention_heads=2
    )
    assert stack_size(llama, "decoder", "layers") == 3
    for config, heads in ((t5, {"decoder": 4, "encoder": 4}), (bart, {"decoder": 2, "encoder": 4})):
        assert [stack_size(config, stack, "layers") for stack in ("decoder", "encoder")] == [5, 2]
        assert [stack_size(config, stack, "width") for stack in ("decoder", "encoder")] == [8, 8]
        assert {stack: stack_size(config, stack, "heads") for stack in ("decoder", "encoder")} == heads


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [[9, 1]]}, "layer 9.*student.*0 to 2"),
        ({"layers": "last_9"}, "last_9: .*last_2"),
        ({"stack": "encoder"}, "stack 'encoder': LlamaConfig.*'decoder'"),
    ],
)
def test_what_the_models_do_not_have_is_refused_when_a_module_is_made(
    fields: dict[str, Any], message: str
) -> None:
    (term,) = parse([{"type": "hidden_states", **fields}])
    student, teacher = (model.config for model in pair("decoder-only"))
    with pytest.raises(ValueError, match=message):
        term.loss.create_module(student, teacher, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": "uniformly"}, "'uniformly' .*'uniform'"),
        ({"layers": [[1]]}, r"pair 1 is \[1\]"),
        ({"loss": "cos"}, "loss: 'cos' .*'cosine'"),
        ({"stack": "decodr"}, "stack: 'decodr' .*'decoder'"),
        ({"layer": 1}, r"'objectives\[0\].layer'; .*'layers'.*loss"),
    ],
)
def test_what_is_not_understood_is_refused_when_it_is_written(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([{"type": "hidden_states", **fields}])


def test_a_configuration_lists_it_as_json(tmp_path: Path) -> None:
    listed = [{"beta": 0.1}, {"type": "hidden_states", "layers": [[2, 1]], "loss": "cosine", "weight": 0.1}]
    config = GKDConfig(output_dir=str(tmp_path), objectives=json.dumps(listed), bf16=False, use_cpu=True)
    wanted = WeightedLoss(hidden_state_loss(((2, 1),), "cosine"), 0.1)
    assert CellArguments.build(config).objectives[1] == wanted


# ---- in the trainer ----

KL = Divergence(beta=0.1)
LOSSES: tuple[WeightedLosses, ...] = (
    (WeightedLoss(KL), WeightedLoss(hidden_state_loss("last_1", "cosine"), 0.5)),
    (WeightedLoss(KL), WeightedLoss(hidden_state_loss("uniform"), 0.05, 0.5)),
    (WeightedLoss(hidden_state_loss(((0, 0), (2, 1))), 0.3),),
)


def build_cells(folder: Path, lmbda: float = 0.5) -> list[CellArguments]:
    return [
        cell(folder, str(n), lmbda=lmbda, seed=n, objectives=terms, learning_rate=3e-4 * (n + 1))
        for n, terms in enumerate(LOSSES)
    ]


def learnt(trainer: Any, n: int) -> dict[str, Tensor]:
    """Parameters of a cell's modules."""
    return {
        f"{place}.{name}": p.detach().clone()
        for (number, place), term_module in trainer.auxiliary_modules._term_modules.items()
        if number == n
        for name, p in term_module.module.named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_packed_are_those_cells_alone(family: Family, tmp_path: Path) -> None:
    cells = build_cells(tmp_path)
    run = distil(tmp_path, family, cells, max_steps=4)
    for n, cell_arguments in enumerate(cells):
        alone = distil(tmp_path / "alone", family, [cell_arguments], packed=False, max_steps=4)
        assert_close(run.weights(n), alone.weights())
        assert_close(learnt(run.trainer, n), learnt(alone.trainer, 0))
        assert learnt(alone.trainer, 0)
        for row, other in zip(run.history[n], alone.history[0], strict=True):
            assert row == pytest.approx(other, rel=1e-6, abs=1e-9)


class Stopped(Exception):
    """Stands for the end of a run between two steps."""


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Stopped


@pytest.mark.parametrize(("family", "packed"), (("decoder-only", False), ("encoder-decoder", True)))
def test_a_resumed_run_is_equal_bit_for_bit(family: Family, packed: bool, tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> Run:
        cells = build_cells(folder) if packed else build_cells(folder)[1:2]
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return distil(folder, family, cells, packed=packed, dtype=torch.float32, **saving, **options)

    whole = run(tmp_path / "a")
    with pytest.raises(Stopped):
        run(tmp_path / "b", prepare=lambda trainer: trainer.add_callback(StopAfter(2)))
    place = tmp_path / "b" / ("0/checkpoint-2" if packed else "checkpoint-2")
    gone_on = run(tmp_path / "b", resume=str(place))
    for n in range(len(whole.history)):
        assert_identical(whole.weights(n), gone_on.weights(n))
        assert_identical(learnt(whole.trainer, n), learnt(gone_on.trainer, n))
        assert gone_on.history[n] == whole.history[n][2:]


def test_projections_learn_and_the_distance_falls(tmp_path: Path) -> None:
    (cell_arguments,) = build_cells(tmp_path, lmbda=0.0)[2:]
    cell_arguments = replace(cell_arguments, learning_rate=3e-3)
    drawn: dict[str, Tensor] = {}
    run = distil(
        tmp_path,
        "decoder-only",
        [cell_arguments],
        packed=False,
        max_steps=20,
        prepare=lambda trainer: drawn.update(learnt(trainer, 0)),
    )
    for name, value in learnt(run.trainer, 0).items():
        assert (value - drawn[name]).abs().max() > 1e-3
    assert sum(run.losses()[-5:]) < 0.8 * sum(run.losses()[:5])


def test_each_layer_s_term_is_logged_and_a_student_that_is_saved_has_no_projection(tmp_path: Path) -> None:
    run = distil(tmp_path, "decoder-only", build_cells(tmp_path)[:1], packed=False, max_steps=2)
    for row in run.history[0]:
        assert row["loss"] == pytest.approx(row["loss/divergence"] + row["loss/hidden_states"], rel=1e-9)
        assert row["loss/hidden_states"] > 0
    run.trainer.save_model(str(tmp_path / "student"))
    plain = {name for name, _ in tiny_model("decoder-only", 7).named_parameters()}
    assert set(load_file(tmp_path / "student" / "model.safetensors")) == plain


def test_projections_follow_a_schedule_that_is_no_function_of_the_step(tmp_path: Path) -> None:
    """Each step is evaluated, none is much better than the first, so the rate falls tenfold."""
    arguments = {
        "objectives": [{}, {"type": "hidden_states", "weight": 0.05}],
        "lmbda": 0.0,
        "max_steps": 3,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1, "threshold": 0.9},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    }
    options = {"eval_dataset": conversations(2)}
    made = trainer(tmp_path, conversations(), teacher=llama(1, width=24), arguments=arguments, **options)
    (term_module,) = made.auxiliary_modules._term_modules.values()
    rates: list[float] = []
    assert term_module.optimizer is not None
    term_module.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    made.train()
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4])
