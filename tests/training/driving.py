"""Runs the trainer on tiny models and hands back all that it logged and learnt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from gkd_lab.config.artifact_specs import Family
from gkd_lab.encoding.batches import Example
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.terms import WeightedLosses
from gkd_lab.models.packing import Pack
from gkd_lab.teachers.teacher import Teacher
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.trainer import GKDTrainer

from ..models.tiny import tiny_examples, tiny_model, tiny_tokenizer

Prepare = Callable[[GKDTrainer], None]


@dataclass
class Run:
    """A finished training."""

    trainer: GKDTrainer
    history: list[list[dict[str, float]]]
    """For each cell its logged rows."""

    def losses(self, cell: int = 0) -> list[float]:
        return [row["loss"] for row in self.history[cell]]

    def weights(self, cell: int = 0) -> dict[str, Tensor]:
        """A plain model's parameters of the cell."""
        return {n: v.clone() for n, v in self.trainer.pack.get_cell_parameters(cell).items()}


def cell(
    folder: Path,
    name: str = "0",
    *,
    lmbda: float = 0.5,
    beta: float = 0.5,
    seed: int = 0,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    learning_rate: float = 3e-4,
    objectives: WeightedLosses = (),
) -> CellArguments:
    return CellArguments(
        lmbda=lmbda,
        beta=beta,
        seed=seed,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        student_temperature=1.0,
        learning_rate=learning_rate,
        output_dir=str(folder / name),
        objectives=objectives,
    )


def arguments(folder: Path, **changes: Any) -> GKDConfig:
    """Every step is logged; the rate warms up, holds and falls, so that the schedule matters.

    At thirty times this rate these spread-out models are chaotic: rounding grows fivefold a step.
    """
    return GKDConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-4,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "linear"},
            "warmup_steps": 2,
            "max_grad_norm": 0.5,
            "max_new_tokens": 8,
            "loss_normalization": "sequence",
            "logging_steps": 1,
            "save_strategy": "no",
            "save_steps": 1000,
            "report_to": [],
            "disable_tqdm": True,
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **changes,
        }
    )


def distil(
    folder: Path,
    family: Family,
    cells: Sequence[CellArguments],
    *,
    packed: bool = True,
    dtype: torch.dtype = torch.float64,
    students: Sequence[Any] | None = None,
    teacher: Any = None,
    examples: Sequence[Example] | None = None,
    resume: str | None = None,
    prepare: Prepare = lambda trainer: None,
    more_teachers: Sequence[Teacher] = (),
    **changes: Any,
) -> Run:
    """Train the cells as one model (or one cell as a plain model) from equal weights."""
    models = list(students or [tiny_model(family, 7, dtype=dtype) for _ in cells])
    pack = Pack.build(models) if packed else Pack.build_single(models[0])
    history: list[list[dict[str, float]]] = [[] for _ in cells]
    trainer = GKDTrainer(
        pack=pack,
        cells=cells,
        teacher_model=teacher or tiny_model(family, 3, width=32, dtype=dtype),
        args=arguments(folder, **changes),
        train_dataset=list(examples or tiny_examples()),
        processing_class=tiny_tokenizer(),
        more_teachers=more_teachers,
        log_cell=lambda n, row: history[n].append(row),
    )
    trainer.remove_callback(PrinterCallback)
    prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer, history)


def largest_difference(run: Run, other: Run, cell: int, other_cell: int) -> float:
    """Return the largest difference between the logged losses of a cell of each run."""
    pairs = zip(run.losses(cell), other.losses(other_cell), strict=True)
    return max(abs(a - b) for a, b in pairs)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not differing


MIXED = (
    {"lmbda": 0.0, "beta": 0.0},
    {"lmbda": 0.5, "beta": 0.1, "teacher_temperature": 0.5},
    {"lmbda": 1.0, "beta": 0.5, "learning_rate": 1e-4},
    {"lmbda": 0.5, "beta": 0.9, "seed": 1, "temperature": 0.7},
    {"lmbda": 1.0, "beta": 1.0, "seed": 1},
)
"""Cells of two seeds that differ in everything in which the cells of a pack may differ."""


def mixed(folder: Path) -> list[Any]:
    return [cell(folder, str(n), **kind) for n, kind in enumerate(MIXED)]  # type: ignore[arg-type]


class Stopped(Exception):
    """Stands for a killed process."""


def stop_at(step: int) -> Any:
    def prepare(trainer: GKDTrainer) -> None:
        save = trainer._save_checkpoint

        def save_and_stop(*args: Any) -> None:
            save(*args)
            if trainer.state.global_step == step:
                raise Stopped

        trainer._save_checkpoint = save_and_stop  # type: ignore[method-assign]

    return prepare
