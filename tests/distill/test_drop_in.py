"""What a user of TRL's GKDTrainer relies on, kept when one import changes: tried as such a user would."""

import copy
import math
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    GenerationConfig,
    TrainerCallback,
)
from trl import LogCompletionsCallback
from trl.experimental.gkd import GKDConfig as TrlConfig
from trl.experimental.gkd import GKDTrainer as TrlTrainer
from trl.experimental.utils import DataCollatorForChatML

from gkd_lab import GKDConfig, GKDTrainer

from ..models.test_attention import Kernels
from .scripts import (
    CHATML,
    chat,
    chat_tokenizer,
    config,
    conversations,
    llama,
    logged,
    losses,
    saved,
    t5,
    trainer,
    weights,
)

OFF = {"lmbda": 0.0}
HALF = {"lmbda": 0.5}
ON = {"lmbda": 1.0}
ROUNDING = 1e-5
"""Relative, float32; both compute the same sums in another order."""
Make = Callable[..., Any]


def both(folder: Path, rows: Any = None, *, model: Make = llama, **changes: Any) -> list[Any]:
    """TRL's trainer and ours from one script, and so on the same data in the same order."""
    options = dict(changes)
    more = {name: options.pop(name) for name in tuple(options) if name in OPTIONS}
    made = []
    for kind, arguments in ((TrlTrainer, TrlConfig), (GKDTrainer, GKDConfig)):
        own = vars(config(folder))
        fields = {name: own[name] for name in FIELDS}
        made.append(
            kind(
                model=model(0),
                teacher_model=llama(1, width=24),
                args=arguments(**{**fields, **OFF, "per_device_train_batch_size": 8, **options}),
                train_dataset=Dataset.from_list(conversations() if rows is None else rows),
                processing_class=chat_tokenizer(),
                **copy.deepcopy(more),
            )
        )
    return made


OPTIONS = ("eval_dataset", "compute_metrics", "preprocess_logits_for_metrics", "peft_config", "optimizers")
FIELDS = (
    "output_dir",
    "max_steps",
    "learning_rate",
    "max_new_tokens",
    "logging_steps",
    "save_strategy",
    "report_to",
    "disable_tqdm",
    "use_cpu",
    "bf16",
)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name, value in one.items() if not torch.equal(value, other[name])]


# ---- the same training as TRL's, where TRL's is right ----


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": False},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "weight_decay": 0.1},
    ],
    ids=["plain", "accumulated", "adafactor"],
)
def test_off_policy_losses_gradients_and_weights_are_those_of_trl(
    tmp_path: Path, beta: float, changes: dict[str, Any]
) -> None:
    """A step sees all the data, since the two order their rows differently."""
    arguments = {"max_steps": 5, "warmup_steps": 2, "max_grad_norm": 0.1, "beta": beta, **changes}
    theirs, ours = both(tmp_path, **arguments)
    for made in (theirs, ours):
        made.train()
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len(logged(ours, name)) == 5
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=ROUNDING)
    start, end = weights(llama(0)), weights(ours.model)
    assert_close(end, weights(theirs.model), atol=1e-6)
    assert max(float((end[name] - start[name]).abs().max()) for name in start) > 1e-3


def test_the_order_of_the_data_is_that_of_trl_where_the_user_asks_for_the_datas_own(tmp_path: Path) -> None:
    arguments = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 3, "max_steps": 6}
    theirs, ours = both(tmp_path, **arguments)
    for made in (theirs, ours):
        made.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=ROUNDING)


def test_evaluation_and_its_metrics_are_those_of_trl(tmp_path: Path) -> None:
    found = []
    for made in both(
        tmp_path,
        per_device_eval_batch_size=3,
        eval_dataset={"all": Dataset.from_list(conversations(8)), "few": Dataset.from_list(conversations(2))},
        compute_metrics=token_accuracy,
    ):
        made.train()
        found.append(made.evaluate())
    theirs, ours = found
    names = [name for name in theirs if name.endswith(("_loss", "_accuracy", "_tokens"))]
    assert len(names) == 6
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: theirs[name] for name in names}, rel=ROUNDING
    )


def test_a_lora_adapter_learns_what_it_learns_with_trl(tmp_path: Path) -> None:
    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        return peft.get_peft_model(llama(seed), lora())

    theirs, ours = both(tmp_path, model=adapted, max_steps=4, learning_rate=1e-2)
    for made in (theirs, ours):
        made.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=ROUNDING)
    assert_close(weights(ours.model), weights(theirs.model), atol=1e-6)


# ---- data ----


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return self.rows[n]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.mark.parametrize("model", [llama, t5])
def test_every_kind_of_data_set_trains_alike(tmp_path: Path, model: Make) -> None:
    found = []
    for data in (conversations(), Dataset.from_list(conversations()), Rows(conversations())):
        made = trainer(tmp_path, model=model(0), teacher=model(1), train_dataset=data, arguments=HALF)
        made.train()
        found.append(weights(made.model))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("model", [llama, t5])
def test_streams_train_in_their_own_order(tmp_path: Path, model: Make) -> None:
    found = []
    streams = (Dataset.from_list(conversations()).to_iterable_dataset(), Stream(conversations()))
    assert isinstance(streams[0], IterableDataset)
    for data in streams:
        made = trainer(
            tmp_path, model=model(0), teacher=model(1), train_dataset=data, arguments={**HALF, "max_steps": 6}
        )
        made.train()  # passes the end of the data
        assert len(losses(made)) == 6
        found.append(weights(made.model))
    assert_same(*found)


def test_a_stream_without_a_number_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path, train_dataset=Stream(conversations()), arguments={"max_steps": -1})


class Seen:
    """Keeps the prompts of the rows that are trained on."""

    def __init__(self, made: GKDTrainer) -> None:
        self.steps: list[list[list[int]]] = []
        original = made.get_batch_samples

        def get_batch_samples(*args: Any) -> Any:
            samples, items = original(*args)
            rows = [sample["batch"].student for sample in samples]
            self.steps.append(
                [
                    ids[mask.bool()].tolist()
                    for row in rows
                    for ids, mask in zip(row.prompt_ids, row.prompt_mask, strict=True)
                ]
            )
            return samples, items

        made.get_batch_samples = get_batch_samples  # type: ignore[method-assign]


@pytest.mark.parametrize(("accumulation", "sizes"), [(1, [2, 2, 2, 1] * 2), (2, [4, 3] * 2), (3, [6, 1] * 2)])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_last_part_of_an_epoch_trains_too(
    tmp_path: Path, accumulation: int, sizes: list[int], lmbda: float
) -> None:
    arguments = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": accumulation}
    rows = [{"messages": chat(" ".join(["one"] * (n + 1)), "two three")} for n in range(7)]
    made = trainer(tmp_path, rows, arguments={"lmbda": lmbda, **arguments})
    seen = Seen(made)
    made.train()
    assert [len(step) for step in seen.steps] == sizes
    assert made.state.global_step == made.state.max_steps == len(sizes)
    prompts = [prompt for step in seen.steps for prompt in step]
    epochs = [prompts[:7], prompts[7:]]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len({len(prompt) for prompt in epochs[0]}) == 7
    assert epochs[0] != epochs[1]


def test_dropping_the_last_part_is_the_users_choice(tmp_path: Path) -> None:
    arguments = {"max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": True}
    made = trainer(tmp_path, conversations(7), arguments=arguments)
    made.train()
    assert made.state.global_step == 6


@pytest.mark.parametrize("model", [llama, t5])
def test_a_worker_process_loads_what_the_trainer_would(tmp_path: Path, model: Make) -> None:
    found = []
    for workers in (0, 1):
        made = trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            eval_dataset=conversations(3),
            arguments={**HALF, "dataloader_num_workers": workers},
        )
        made.train()
        found.append((losses(made), made.evaluate()["eval_loss"]))
    assert found[0] == found[1]


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
    found = []
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
        found.append(weights(made.model))
    assert_same(*found)
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


# ---- metrics, in the form that TRL's users write them ----


def token_accuracy(found: EvalPrediction) -> dict[str, float]:
    """For a decoder-only model, from its logits."""
    logits, labels = found.predictions[:, :-1], found.label_ids[:, 1:]
    mask = labels != -100
    return {
        "accuracy": float((logits.argmax(-1) == labels)[mask].mean()),
        "tokens": int(mask.sum()),
    }


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
        example = made._encode(row)
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
def test_a_token_accuracy_of_the_users_is_that_of_a_count_by_hand(
    tmp_path: Path, model: Make, shift: int
) -> None:
    rows = conversations(7)
    made = trainer(
        tmp_path,
        model=model(0),
        teacher=model(1),
        eval_dataset=rows,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda found: accuracy_of_ids(found, shift=shift),
        arguments={"per_device_eval_batch_size": 2, "max_steps": 8, "learning_rate": 1e-2, **OFF},
    )
    made.train()
    right, count = right_by_hand(made, rows)
    found = made.evaluate()
    assert 0 < right < count
    assert found["eval_tokens"] == count
    assert found["eval_accuracy"] == pytest.approx(right / count)


@pytest.mark.parametrize("model", [llama, t5])
def test_metrics_may_ask_for_the_inputs_and_the_losses(tmp_path: Path, model: Make) -> None:
    asked: list[EvalPrediction] = []

    def note(found: EvalPrediction) -> dict[str, float]:
        asked.append(found)
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
    assert asked[0].inputs.shape[0] == 4
    assert np.mean(asked[0].losses) == pytest.approx(loss)


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
    expected = sum(len(made._encode(row).completion_ids) for row in conversations(4))
    assert made.evaluate()["eval_tokens"] == expected


# ---- callbacks and optimizers ----


class Notes(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("step")
        assert more["model"] is not None and more["optimizer"] is not None
        assert more["processing_class"].eos_token == "<|im_end|>"

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("evaluate")
        assert more["metrics"]["eval_loss"] > 0

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.logs.append(dict(more["logs"]))

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append("end")


def test_callbacks_are_called_as_transformers_promises(tmp_path: Path) -> None:
    notes = Notes()
    made = trainer(
        tmp_path,
        callbacks=[notes],
        eval_dataset=conversations(2),
        arguments={
            **HALF,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    )
    made.train()
    assert notes.events == ["step", "evaluate", "step", "evaluate", "save", "end"]
    assert [{"loss", "grad_norm", "learning_rate", "epoch"} <= row.keys() for row in notes.logs[:3:2]] == [
        True,
        True,
    ]


class Stops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_callback_can_stop_the_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, callbacks=[Stops()], arguments={**HALF, "max_steps": 50})
    made.train()
    assert made.state.global_step == 2


@pytest.mark.parametrize("model", [llama, t5])
def test_early_stopping_ends_with_the_best_model(tmp_path: Path, model: Make) -> None:
    """The rate is so high that the student gets worse."""
    made = trainer(
        tmp_path,
        model=model(0),
        teacher=model(1),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_dataset=conversations(4),
        arguments={
            **OFF,
            "max_steps": 20,
            "learning_rate": 1.0,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        },
    )
    made.train()
    found = logged(made, "eval_loss")
    assert len(found) < 20 and found[-1] > min(found)
    assert made.state.best_metric == min(found)
    assert made.evaluate()["eval_loss"] == pytest.approx(min(found), rel=1e-6)


@pytest.mark.parametrize("given", ["tuple", "optim", "class"])
def test_the_optimizer_may_be_chosen(tmp_path: Path, given: str) -> None:
    student = llama(0)
    options: dict[str, Any] = {}
    if given == "tuple":
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        options["optimizers"] = (optimizer, schedule)
    if given == "class":
        options["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": 0.5})
        with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):  # TRL's takes none either
            trainer(tmp_path, model=student, **options)
        return
    arguments = {"optim": "adafactor"} if given == "optim" else {}
    made = trainer(tmp_path, model=student, arguments={**OFF, "max_steps": 3, **arguments}, **options)
    made.train()
    kind = type(getattr(made.optimizer, "optimizer", made.optimizer)).__name__
    assert kind == {"tuple": "SGD", "optim": "Adafactor"}[given]
    if given == "tuple":
        assert logged(made, "learning_rate") == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("model", [llama, t5])
def test_checkpointed_gradients_are_the_same_gradients(tmp_path: Path, model: Make) -> None:
    found = []
    for checkpointing in (False, True):
        made = trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            arguments={**HALF, "learning_rate": 1e-6, "gradient_checkpointing": checkpointing},
        )
        made.train()
        assert made.model.is_gradient_checkpointing == checkpointing
        found.append((logged(made, "loss"), logged(made, "grad_norm")))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=ROUNDING)


# ---- collators ----


def test_the_collator_of_trl_may_be_given(tmp_path: Path) -> None:
    found = []
    for collator in (None, DataCollatorForChatML(chat_tokenizer(), max_length=64)):
        made = trainer(
            tmp_path,
            data_collator=collator,
            eval_dataset=conversations(3),
            arguments={**HALF, "max_steps": 6},
        )
        made.train()
        assert set(logged(made, "on_policy")) == {0.0, 1.0}
        found.append((losses(made), made.evaluate()["eval_loss"], weights(made.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=ROUNDING)
    assert found[0][1] == pytest.approx(found[1][1], rel=ROUNDING)
    assert_close(found[0][2], found[1][2], atol=1e-6)


def test_a_collator_need_not_state_the_prompts(tmp_path: Path) -> None:
    whole = DataCollatorForChatML(chat_tokenizer(), max_length=64)

    def without(rows: Any) -> dict[str, Tensor]:
        batch = whole(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    found = []
    for collator in (whole, without):
        made = trainer(tmp_path, data_collator=collator, arguments={**HALF, "max_steps": 6})
        made.train()
        found.append(losses(made))
    assert found[0] == found[1]


def test_our_collator_makes_the_batches_of_trl(tmp_path: Path) -> None:
    """TRL pads whole rows on the left, we pad each prompt on the left and each completion on the right."""
    made = trainer(tmp_path)
    assert made.train_dataset[3] == conversations()[3]
    ours = made.data_collator([made.train_dataset[n] for n in range(8)])
    theirs = DataCollatorForChatML(chat_tokenizer(), max_length=64)(conversations())
    assert {"input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask"} <= ours.keys()
    for name in ("prompts", "prompt_attention_mask"):
        assert torch.equal(ours[name], theirs[name])
    for n in range(8):
        rows = [(b["input_ids"][n], b["labels"][n], b["attention_mask"][n].bool()) for b in (ours, theirs)]
        for column in (0, 1):
            assert rows[0][column][rows[0][2]].tolist() == rows[1][column][rows[1][2]].tolist()
        assert (rows[0][1][~rows[0][2]] == -100).all()


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
def test_compute_loss_divides_as_trl_documents(tmp_path: Path, items: Any) -> None:
    """Every completion token counts, though the prompts differ in length."""
    theirs, ours = both(tmp_path)
    batch = theirs.data_collator(conversations())
    with torch.no_grad():
        expected = theirs.compute_loss(theirs.model, dict(batch), num_items_in_batch=items)
    loss = ours.compute_loss(ours.model, ours.data_collator(conversations()), num_items_in_batch=items)
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert ours.compute_loss(ours.model, batch, num_items_in_batch=items).item() == pytest.approx(
        loss.item(), rel=ROUNDING
    )
    with_outputs, _ = ours.compute_loss(ours.model, batch, return_outputs=True, num_items_in_batch=items)
    assert with_outputs.item() == pytest.approx(loss.item(), rel=ROUNDING)


# ---- adapters ----


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("model", "task"), [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
def test_an_adapter_alone_is_trained_and_saved(
    tmp_path: Path, model: Make, task: str, checkpointing: bool
) -> None:
    def made(**changes: Any) -> GKDTrainer:
        return trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            peft_config=lora(task_type=task),
            arguments={
                **HALF,
                "max_steps": 4,
                "learning_rate": 1e-2,
                "save_strategy": "steps",
                "save_steps": 2,
                "gradient_checkpointing": checkpointing,
                **changes,
            },
        )

    straight = made()
    start = weights(straight.model)
    straight.train()
    end = weights(straight.model)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if "lora_" in name}
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed.model), end)
    loaded = peft.PeftModel.from_pretrained(model(0), str(tmp_path / "checkpoint-4"))
    ids = torch.arange(2, 8)[None]
    batch = {"input_ids": ids, **({"labels": ids} if straight.model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, straight.model.eval()(**batch).logits)


@pytest.mark.parametrize(("model", "task"), [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
def test_sampling_uses_the_adapter_and_a_copied_teacher_does_not(
    tmp_path: Path, model: Make, task: str
) -> None:
    """The copy is made before the adapter is there, so the adapter moves away from it."""
    with pytest.warns(UserWarning, match="copy"):
        made = GKDTrainer(
            model=model(0),
            args=config(tmp_path, **ON),
            train_dataset=conversations(),
            processing_class=chat_tokenizer(),
            peft_config=lora(task_type=task),
        )
    assert not isinstance(made.teacher_model, peft.PeftModel)
    batch = made.data_collator(conversations(4))
    assert made.compute_loss(made.model, batch).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert made.compute_loss(made.model, batch).item() > 1e-3
    assert_close(weights(made.teacher_model), weights(model(0)), atol=0)
    texts = []
    for enabled in (True, False):
        if not enabled:
            made.model.base_model.disable_adapter_layers()
        seen = written(made)
        texts.append(seen)
    assert texts[0] != texts[1]


def written(made: GKDTrainer) -> list[list[int]]:
    """What the students would write in the first step."""
    samples, _ = made.get_batch_samples(iter(made.get_train_dataloader()), 2, torch.device("cpu"))
    return [row for sample in samples for row in sample["batch"].student.completion_ids.tolist()]


def test_a_model_with_an_adapter_may_be_given(tmp_path: Path) -> None:
    torch.manual_seed(42)
    student = peft.get_peft_model(llama(0), lora(task_type="CAUSAL_LM"))
    ready = trainer(tmp_path, model=student, arguments=HALF)
    ready.train()
    base = {n: v for n, v in weights(student).items() if "lora_" not in n}
    assert_same(
        {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in base.items()},
        weights(llama(0)),
    )
    with pytest.raises(ValueError, match="adapter already"):
        trainer(tmp_path, model=student, peft_config=lora())
    with pytest.raises(TypeError, match="peft_config is a dict"):
        trainer(tmp_path, peft_config={"r": 4})


# ---- saving and resuming ----


@pytest.mark.parametrize("model", [llama, t5])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, model: Make, accumulation: int, at: int
) -> None:
    """Four steps an epoch, or two; so both points lie within one. Dropout is on."""

    def made(folder: Path) -> GKDTrainer:
        return trainer(
            folder,
            model=model(0, dropout=0.1),
            teacher=model(1),
            arguments={
                **HALF,
                "max_steps": 5,
                "gradient_accumulation_steps": accumulation,
                "disable_dropout": False,
                "save_strategy": "steps",
                "save_steps": 1,
                "seed": 3,
            },
        )

    straight = made(tmp_path / "straight")
    straight.train()
    assert set(logged(straight, "on_policy")) == {0.0, 1.0}
    shutil.copytree(tmp_path / "straight" / f"checkpoint-{at}", tmp_path / "again" / f"checkpoint-{at}")
    resumed = made(tmp_path / "again")
    torch.rand(at)  # whatever was drawn before
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    for name in ("loss", "grad_norm", "learning_rate", "on_policy", "completion_length", "entropy"):
        assert logged(resumed, name) == logged(straight, name)


def test_a_stream_resumes_where_it_stopped(tmp_path: Path) -> None:
    def made() -> GKDTrainer:
        arguments = {**HALF, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        return trainer(tmp_path, train_dataset=Stream(conversations()), arguments=arguments)

    straight = made()
    straight.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(weights(resumed.model), weights(straight.model))


@pytest.mark.parametrize(("model", "auto"), [(llama, AutoModelForCausalLM), (t5, AutoModelForSeq2SeqLM)])
def test_what_is_saved_is_a_model_with_its_tokenizer(tmp_path: Path, model: Make, auto: Any) -> None:
    made = trainer(
        tmp_path / "run",
        model=model(0),
        teacher=model(1),
        arguments={**HALF, "save_strategy": "steps", "save_steps": 2},
    )
    made.train()
    made.save_model(str(tmp_path / "own"))
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "own"):
        assert_same(weights(auto.from_pretrained(folder)), weights(made.model))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == chat_tokenizer().get_vocab()
        assert tokenizer.chat_template == CHATML
        arguments = torch.load(folder / "training_args.bin", weights_only=False)
        assert isinstance(arguments, GKDConfig) and arguments.lmbda == 0.5
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()


# ---- other arguments ----


def test_a_formatting_function_makes_rows_of_other_columns(tmp_path: Path) -> None:
    rows = [
        {"question": r["messages"][0]["content"], "answer": r["messages"][1]["content"]}
        for r in conversations()
    ]
    plain = trainer(tmp_path, arguments=HALF)
    formatted = trainer(
        tmp_path,
        rows,
        formatting_func=lambda row: {"messages": chat(row["question"], row["answer"])},
        arguments=HALF,
    )
    for made in (plain, formatted):
        made.train()
    assert losses(plain) == losses(formatted)
    with pytest.raises(ValueError, match="formatting_func returned str"):
        trainer(tmp_path, rows, formatting_func=lambda row: row["question"], arguments=HALF).train()


def test_former_names_are_taken_with_a_warning_that_names_the_new_ones(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="max_length"):
        arguments = config(tmp_path, max_seq_length=48, **OFF)
    assert arguments.max_length == 48
    with pytest.warns(FutureWarning, match="processing_class"):
        made = GKDTrainer(
            model=llama(0),
            teacher_model=llama(1),
            args=arguments,
            train_dataset=conversations(),
            tokenizer=chat_tokenizer(),
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(tokenizer|max_seq_length) is deprecated")
        plain = trainer(tmp_path, teacher=llama(1), arguments={**OFF, "max_length": 48})
    for one in (made, plain):
        one.train()
    assert losses(made) == losses(plain)


@pytest.mark.parametrize("model", [llama, t5])
def test_models_may_be_named(tmp_path: Path, model: Make) -> None:
    names = [saved(model(n).bfloat16(), tmp_path / str(n), chat_tokenizer()) for n in (0, 1)]
    made = trainer(tmp_path, model=names[0], teacher=names[1], processing_class=None)
    assert made.model.dtype == torch.float32  # as in TRL, whatever the file's
    assert made.processing_class.chat_template == CHATML
    changed = trainer(
        tmp_path,
        model=names[0],
        teacher=names[1],
        arguments={
            "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"},
            "teacher_model_init_kwargs": {"dtype": "float32"},
        },
    )
    assert changed.model.dtype == torch.bfloat16 and changed.teacher_model.dtype == torch.float32
    assert changed.model.config._attn_implementation == "eager"
    for one in (made, changed):
        one.train()
        assert losses(one)[0] > 0


def test_tokens_and_template_may_be_set_in_the_arguments(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_start|>", "system"))
    tokenizer = chat_tokenizer()
    made = trainer(
        tmp_path,
        processing_class=tokenizer,
        arguments={"eos_token": "ten", "pad_token": "nine", "chat_template_path": str(template), **HALF},
    )
    ids = dict(
        zip(("end", "pad", "system"), tokenizer.convert_tokens_to_ids(["ten", "nine", "system"]), strict=True)
    )
    batch = made.data_collator(conversations(2))
    assert ids["system"] in batch["prompts"][0].tolist()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == ids["pad"]).all()
    assert ids["end"] in made.generation_config.eos_token_id
    made.train()
    assert made.model.generation_config.eos_token_id is not None
    for field in ("eos_token", "pad_token"):
        with pytest.raises(ValueError, match=f"{field} 'eleven' is not in"):
            trainer(tmp_path, arguments={field: "eleven"})
    with pytest.raises(ValueError, match="clone_chat_template"):
        trainer(tmp_path, arguments={"chat_template_path": "some/model"})


def test_without_a_pad_token_the_end_of_sequence_pads_and_is_still_trained_on(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = None
    found = []
    for one in (tokenizer, chat_tokenizer()):
        made = trainer(tmp_path, processing_class=one, arguments={**HALF, "max_steps": 4})
        made.train()
        found.append(losses(made))
    assert found[0] == found[1]
    neither = chat_tokenizer()
    neither.pad_token = neither.eos_token = None
    with pytest.raises(ValueError, match="pad_token"):
        trainer(tmp_path, processing_class=neither)


@pytest.mark.parametrize("field", ["packing", "padding_free"])
def test_what_does_not_fit_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=True does not fit GKD"):
        trainer(tmp_path, arguments={field: True})


def test_an_unknown_argument_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lmda"):
        config(tmp_path, lmda=1.0)
    with pytest.raises(TypeError, match="ref_model"):
        trainer(tmp_path, ref_model=None)
    with pytest.raises(TypeError, match="GKDConfig"):
        trainer(tmp_path, args=TrlConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_a_processor_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    processor = LlavaProcessor(CLIPImageProcessor(), chat_tokenizer())
    with pytest.raises(ValueError, match=r"LlavaProcessor reads images.*tokenizer"):
        trainer(tmp_path, processing_class=processor)


def test_a_teacher_of_the_other_family_is_refused(tmp_path: Path) -> None:
    for student, teacher in ((llama(0), t5(1)), (t5(0), llama(1))):
        with pytest.raises(ValueError, match=r"encoder-decoder.*decoder-only|decoder-only.*encoder-decoder"):
            trainer(tmp_path, model=student, teacher=teacher)


@pytest.mark.parametrize("model", [llama, t5])
def test_autocast_to_bfloat16_trains_float32_weights(tmp_path: Path, model: Make) -> None:
    found = []
    for bf16 in (False, True):
        made = trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            eval_dataset=conversations(2),
            arguments={**HALF, "max_steps": 4, "bf16": bf16},
        )
        batch = made.data_collator(conversations(4))
        with made.compute_loss_context_manager():
            found.append(made.compute_loss(made.model, batch).item())
        made.train()
        assert all(loss > 0 for loss in losses(made)) and made.evaluate()["eval_loss"] > 0
        assert {value.dtype for value in weights(made.model).values()} == {torch.float32}
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.1)


def test_arguments_are_copied_and_pickled(tmp_path: Path) -> None:
    arguments = config(tmp_path, beta=0.25, teacher_temperature=0.1, divergence="tv")
    for other in (copy.deepcopy(arguments), pickle.loads(pickle.dumps(arguments))):
        assert isinstance(other, GKDConfig)
        assert other.to_dict() == arguments.to_dict()
    assert arguments.to_dict()["teacher_temperature"] == 0.1


def test_two_trainers_of_one_configuration_do_the_same(tmp_path: Path) -> None:
    arguments = config(tmp_path, **HALF)
    before = arguments.to_dict()
    found = []
    for _ in range(2):
        made = trainer(tmp_path, args=arguments)
        made.train()
        found.append(weights(made.model))
    assert_same(*found)
    # As TRL's: its collators read columns that a model does not name.
    assert arguments.to_dict() == {**before, "remove_unused_columns": False}


# ---- what scripts call on the class ----


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_generalized_jsd_loss_is_that_of_trl(
    beta: float, temperature: float, labelled: bool, reduction: str
) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 5, 11, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 11, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, -100) if labelled else None
    results = []
    for kind in (TrlTrainer, GKDTrainer):
        own = student.clone().requires_grad_()
        loss = kind.generalized_jsd_loss(
            own, teacher, labels, beta=beta, temperature=temperature, reduction=reduction
        )
        loss.sum().backward()
        results.append((loss, own.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(7.0)])
def test_generalized_jsd_loss_divides_by_a_number_given(items: Any) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    found = [
        kind.generalized_jsd_loss(student, teacher, reduction="none", num_items_in_batch=items)
        for kind in (TrlTrainer, GKDTrainer)
    ]
    torch.testing.assert_close(found[1], found[0])
    nothing = torch.full((3, 5), -100)
    for kind in (TrlTrainer, GKDTrainer):
        assert kind.generalized_jsd_loss(student, teacher, nothing).item() == 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_generate_on_policy_outputs_are_those_of_trl(count: int) -> None:
    """Greedy, from prompts padded on the left, with no, one and two ends of sequence."""
    model = llama(5).eval()
    model.generation_config.eos_token_id = None
    inputs = DataCollatorForChatML(chat_tokenizer(), max_length=64)(conversations())
    assert (inputs["prompt_attention_mask"] == 0).any()
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)
    width = inputs["prompts"].shape[1]
    free = GKDTrainer.generate_on_policy_outputs(model, inputs, settings)[0][:, width:]
    ends = [int(free[0, 3]), int(free[1, 5])][:count]
    settings.eos_token_id = {0: None, 1: ends[0] if ends else None, 2: ends}[count]
    theirs, ours = (
        kind.generate_on_policy_outputs(model, inputs, settings) for kind in (TrlTrainer, GKDTrainer)
    )
    for one, other in zip(theirs, ours, strict=True):
        assert torch.equal(one, other)
    lengths = ours[1][:, width:].sum(1).tolist()
    assert (min(lengths) < max(lengths)) == (count > 0)


# ---- around the training ----


class WithCrossEntropy(GKDTrainer):
    """What a user may add: some of the usual loss on the sequence that the step trains on."""

    seen: list[Tensor]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        self.seen.append(inputs["labels"])
        loss = super().compute_loss(model, inputs, *args, **options)
        names = ("input_ids", "attention_mask", "labels")
        return loss + 0.5 * model(**{name: inputs[name] for name in names}).loss


@pytest.mark.parametrize("model", [llama, t5])
def test_a_subclass_finds_the_tensors_of_trl_in_a_training_step(tmp_path: Path, model: Make) -> None:
    arguments = config(tmp_path, **HALF, include_num_input_tokens_seen="non_padding")
    made = WithCrossEntropy(
        model=model(0),
        teacher_model=model(1),
        args=arguments,
        train_dataset=conversations(),
        processing_class=chat_tokenizer(),
    )
    made.seen = []
    made.train()
    assert logged(made, "on_policy") == [0.0, 1.0]
    completions = [int((labels != -100).sum()) for labels in made.seen]
    assert completions == [round(2 * length) for length in logged(made, "completion_length")]
    assert made.state.num_input_tokens_seen > 0


def test_the_card_of_the_model_names_the_data_set_as_with_trl(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments=OFF)
    made.train()
    made.create_model_card(model_name="student", dataset_name="some/data", tags="gkd")
    text = (tmp_path / "README.md").read_text()
    assert "some/data" in text and "gkd" in text


def test_trls_callback_that_shows_completions_runs(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"prompt": chat("one plus two ?"), "completion": [{"role": "assistant", "content": "three"}]}] * 3
    )
    made = trainer(tmp_path, train_dataset=rows, eval_dataset=rows, arguments=HALF)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False)
    shown = LogCompletionsCallback(made, settings, num_prompts=2, freq=1)
    made.add_callback(shown)
    made.train()
    assert len(shown.table) == 4  # two prompts in each of two steps


def test_sampling_leaves_the_generation_configuration_of_the_adapted_model_alone(tmp_path: Path) -> None:
    student = llama(0)
    student.generation_config.temperature, student.generation_config.max_new_tokens = 0.33, 77
    made = trainer(tmp_path, model=student, arguments=ON, peft_config=lora(task_type="CAUSAL_LM"))
    made.train()
    kept = made.model.merge_and_unload().generation_config
    assert (kept.temperature, kept.max_new_tokens) == (0.33, 77)


class Annealed(TrainerCallback):
    """Turns the student's own text on after the first step, and the other way round for beta."""

    trainer: Any = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.lmbda, self.trainer.beta = 1.0, 0.0


def test_a_callback_may_set_lmbda_beta_and_temperature_on_the_trainer(tmp_path: Path) -> None:
    callback = Annealed()
    made = trainer(tmp_path, arguments=OFF, callbacks=[callback])
    callback.trainer = made
    assert (made.lmbda, made.beta, made.temperature) == (0.0, 0.5, 0.9)
    made.train()
    assert logged(made, "on_policy") == [0.0, 1.0]
    assert (made.cells[0].lmbda, made.cells[0].beta) == (1.0, 0.0)


class TrlStyle(GKDTrainer):
    """A loss as a subclass of TRL's trainer writes it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student, teacher = (m(**ids).logits[:, :-1] for m in (model, self.teacher_model))
        loss = self.generalized_jsd_loss(
            student,
            teacher,
            inputs["labels"][:, 1:],
            beta=self.beta,
            num_items_in_batch=num_items_in_batch,
        )
        return (loss, {}) if return_outputs else loss


def test_a_subclass_may_write_its_loss_as_with_trl(tmp_path: Path) -> None:
    ours = trainer(tmp_path, arguments=HALF)
    theirs = TrlStyle(
        model=llama(0),
        teacher_model=llama(1, width=24),
        args=config(tmp_path, **HALF),
        train_dataset=conversations(),
        processing_class=chat_tokenizer(),
    )
    for made in (ours, theirs):
        made.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-4)


def test_a_batch_that_is_too_large_for_the_memory_is_halved(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        arguments={**OFF, "auto_find_batch_size": True, "per_device_train_batch_size": 8},
    )
    step = made.training_step

    def with_room_for_two(model: Any, inputs: Any, *more: Any) -> Any:
        if inputs["batch"].student.rows > 2:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *more)

    made.training_step = with_room_for_two
    made.train()
    assert len(losses(made)) == 2


def test_a_subclass_may_log_a_loss_of_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments={**OFF, "logging_steps": 100})
    made.train()
    made.log({"loss": 1.0})
    assert losses(made) == [1.0]


def test_in_bfloat16_on_a_cpu_attention_stays_in_float32(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=conversations(2), arguments={**HALF, "bf16": True})
    with Kernels() as seen:
        made.train()
        made.evaluate()
    assert logged(made, "on_policy") == [0.0, 1.0]
    assert seen.queries == {torch.float32}
