"""Training and data as a user of TRL's GKDTrainer knows them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset, IterableDataset

from gkd_lab import GKDTrainer

from ...training.scripts import chat, conversations, llama, logged, losses, t5, trainer, weights
from .common import HALF, ROUNDING, Make, Stream, assert_close, assert_same, both, lora, token_accuracy

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


def test_an_unshuffled_data_set_is_read_in_the_order_of_trl(tmp_path: Path) -> None:
    arguments = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 3, "max_steps": 6}
    theirs, ours = both(tmp_path, **arguments)
    for made in (theirs, ours):
        made.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=ROUNDING)


def test_evaluation_and_its_metrics_are_those_of_trl(tmp_path: Path) -> None:
    all_metrics = []
    for made in both(
        tmp_path,
        per_device_eval_batch_size=3,
        eval_dataset={"all": Dataset.from_list(conversations(8)), "few": Dataset.from_list(conversations(2))},
        compute_metrics=token_accuracy,
    ):
        made.train()
        all_metrics.append(made.evaluate())
    theirs, ours = all_metrics
    names = [name for name in theirs if name.endswith(("_loss", "_accuracy", "_tokens"))]
    assert len(names) == 6
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: theirs[name] for name in names}, rel=ROUNDING
    )


def test_a_lora_adapter_trains_as_with_trl(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("model", [llama, t5])
def test_every_kind_of_data_set_gives_the_same_training(tmp_path: Path, model: Make) -> None:
    all_losses = []
    for data in (conversations(), Dataset.from_list(conversations()), Rows(conversations())):
        made = trainer(tmp_path, model=model(0), teacher=model(1), train_dataset=data, arguments=HALF)
        made.train()
        all_losses.append(weights(made.model))
    assert_same(all_losses[0], all_losses[1])
    assert_same(all_losses[0], all_losses[2])


@pytest.mark.parametrize("model", [llama, t5])
def test_streams_train_in_their_own_order(tmp_path: Path, model: Make) -> None:
    all_losses = []
    streams = (Dataset.from_list(conversations()).to_iterable_dataset(), Stream(conversations()))
    assert isinstance(streams[0], IterableDataset)
    for data in streams:
        made = trainer(
            tmp_path, model=model(0), teacher=model(1), train_dataset=data, arguments={**HALF, "max_steps": 6}
        )
        made.train()  # passes the end of the data
        assert len(losses(made)) == 6
        all_losses.append(weights(made.model))
    assert_same(*all_losses)


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
def test_a_worker_process_encodes_rows_as_the_trainer_does(tmp_path: Path, model: Make) -> None:
    all_losses = []
    for workers in (0, 1):
        made = trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            eval_dataset=conversations(3),
            arguments={**HALF, "dataloader_num_workers": workers},
        )
        made.train()
        all_losses.append((losses(made), made.evaluate()["eval_loss"]))
    assert all_losses[0] == all_losses[1]
