"""Build the trainer of a pack from its cells: every argument is stated, none is a library's default."""

from collections.abc import Sequence
from typing import Any

from transformers import PrinterCallback

from gkd_lab.config.cell import Cell
from gkd_lab.encoding.batches import Example, KeyedBatchSampler
from gkd_lab.losses.build_terms import build_term
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.models.packing import Pack
from gkd_lab.runner.artifacts import LoadedModel
from gkd_lab.runner.cross_tokenizer import map_teacher_prompts
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.runner.sft import build_optimizer_arguments, build_trainer_arguments
from gkd_lab.runner.training_inputs import load_extra_teachers
from gkd_lab.store import Record
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.pack_trainer import CellLogger
from gkd_lab.training.trainer import GKDTrainer


class MicroBatchTrainer(GKDTrainer):
    """GKDTrainer whose epochs end with whole batches, however many micro-batches a batch has."""

    def build_batch_sampler(self) -> KeyedBatchSampler:
        """Return the sampler, cut to a multiple of `gradient_accumulation_steps` micro-batches an epoch."""
        sampler = super().build_batch_sampler()
        sampler.length -= sampler.length % self.args.gradient_accumulation_steps
        return sampler


def build_trainer(
    pack: Pack,
    teacher: LoadedModel,
    examples: list[Example],
    cells: Sequence[Cell],
    options: RunOptions,
    tokenizer: Any,
    micro_batches: int = 1,
) -> GKDTrainer:
    """Return a GKDTrainer for the pack, one cell per member; it logs rows and failures to the cells' records.

    tokenizer: the student's. micro_batches: number of micro-batches that a step's batch is split into.
    """
    records = [options.store.get_record(cell) for cell in cells]

    def fail_cell(cell_index: int, reason: str) -> None:
        """Mark the cell's record failed by a FloatingPointError, and close its run at the tracker."""
        records[cell_index].mark_failed(f"FloatingPointError: {reason}")
        options.tracker.finish_run(records[cell_index])

    trainer = MicroBatchTrainer(
        pack=pack,
        cells=[_build_cell_arguments(cell, record) for cell, record in zip(cells, records, strict=True)],
        teacher_model=teacher.model,
        args=_build_trainer_config(cells[0], records[0], options, micro_batches),
        train_dataset=examples,
        processing_class=tokenizer,
        teacher_processing_class=teacher.tokenizer,
        teacher_prompts=map_teacher_prompts(teacher.tokenizer, examples, cells, options),
        more_teachers=load_extra_teachers(cells[0], options),
        log_cell=build_row_logger(records, options),
        on_failure=fail_cell,
    )
    trainer.text_copies = cells[0].training.source.copies
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_row_logger(records: Sequence[Record], options: RunOptions) -> CellLogger:
    """Return a function of (cell index, row): appends to the cell's history and sends to the tracker."""

    def log_row(cell_index: int, row: dict[str, float]) -> None:
        """Append a row to the history of the cell's record, and send it to the tracker."""
        records[cell_index].log_row(row)
        options.tracker.log_row(records[cell_index], row)

    return log_row


def _build_cell_arguments(cell: Cell, record: Record) -> CellArguments:
    """Return the arguments that differ between cells: lmbda, seed, learning rate, loss terms, folder."""
    training = cell.training
    defaults = Divergence()
    return CellArguments(
        lmbda=training.source.lmbda,
        beta=defaults.beta,
        seed=training.seed,
        temperature=training.source.temperature or 1.0,
        teacher_temperature=defaults.teacher_temperature,
        student_temperature=defaults.student_temperature,
        learning_rate=training.optimizer.learning_rate,
        output_dir=str(record.steps_folder),
        objectives=tuple(map(build_term, training.objectives)),
    )


def build_distillation_arguments(
    cell: Cell, record: Record, options: RunOptions, micro_batches: int
) -> dict[str, Any]:
    """Return the arguments of a distillation that our GKDConfig and TRL's share, by name."""
    training = cell.training
    return {
        **build_trainer_arguments(
            record.steps_folder, training.steps, options.checkpoint_every, options.log_every
        ),
        **build_optimizer_arguments(training.optimizer),
        "per_device_train_batch_size": training.batch_size // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "dataloader_drop_last": True,
        "max_new_tokens": training.max_output_tokens,
        # With LoRA, train_cells turns off the base's dropout; the adapter's own may be on.
        "disable_dropout": training.dropout == 0 and training.lora is None,
        "seed": training.seed,
        "bf16": training.precision == "bf16",
    }


def _build_trainer_config(cell: Cell, record: Record, options: RunOptions, micro_batches: int) -> GKDConfig:
    """Return the GKDConfig that all cells of a pack share, from the first cell's spec and the options."""
    training = cell.training
    teacher_dtype, park_teacher = training.get_teacher_placement(0)
    return GKDConfig(
        **build_distillation_arguments(cell, record, options, micro_batches),
        loss_normalization=training.loss_normalization,
        teacher_dtype=teacher_dtype,
        park_teacher=park_teacher,
        log_term_gradients=options.term_gradients,
    )
