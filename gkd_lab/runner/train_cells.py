"""Train a pack of cells as one model: from their SFT student to a finished record for each cell.

`_train_pack` does the work in this order: SFT student, examples, pack, resume, teacher, training, records.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from gkd_lab.config.cell import Cell, Training
from gkd_lab.config.packs import explain_unpackable
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.models.build import load_tokenizer
from gkd_lab.models.lora_students import add_lora_adapter, holds_adapter, load_adapter_weights
from gkd_lab.models.packing import CannotPack, Pack
from gkd_lab.runner.artifacts import LoadedModel
from gkd_lab.runner.build_trainer import build_trainer
from gkd_lab.runner.checkpoint_callback import CheckpointCallback
from gkd_lab.runner.cross_tokenizer import check_shared_tokenizer
from gkd_lab.runner.interrupts import delay_signals
from gkd_lab.runner.memory import (
    PackCapacity,
    increase_micro_batches,
    is_out_of_memory_error,
    measure_free_bytes,
    measure_step_bytes,
    release_memory,
    run_packs,
)
from gkd_lab.runner.pack_capacity import (
    attempt_pack,
    keep_capacity,
    keep_shortage,
    read_micro_batches,
)
from gkd_lab.runner.repair import quarantine_damaged_result, repair_unfinished_training
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.selection import SelectionCallback, load_best_weights
from gkd_lab.runner.sft import HistoryCallback
from gkd_lab.runner.student_files import choose_precision, load_student, save_student
from gkd_lab.runner.tf32 import use_tf32
from gkd_lab.runner.training_inputs import load_examples, load_sft_student, load_teacher
from gkd_lab.runner.trl_trainer import TrlCellTrainer, build_trl_trainer, load_uncut_examples
from gkd_lab.store import Record
from gkd_lab.store.provenance import collect_provenance, describe_sources
from gkd_lab.store.timing import UsageMeter, count_completion_tokens
from gkd_lab.training.checkpoints import build_checkpoint_path, list_complete_steps, load_checkpoint_weights
from gkd_lab.training.pack_trainer import AllCellsFailed
from gkd_lab.training.setup import disable_dropout
from gkd_lab.training.trainer import GKDTrainer


def train_cells(cells: Sequence[Cell], options: RunOptions) -> None:
    """Train those cells of a locked pack that have no status; store failures in their records, raise none.

    With `--retry-failed`, failed cells are trained again. Errors of the machine are raised.
    """
    unfinished_cells = []
    for cell in cells:
        record = options.store.get_record(cell)
        if not all(record.get_evaluation(evaluation).read_status() for evaluation in cell.evaluations):
            quarantine_damaged_result(record, options)
        if options.retry_failed:
            record.clear_failure()
        if not record.read_status():
            record.write_spec(cell.training, scale=cell.scale, labels=cell.labels)
            options.tracker.start_run(cell, record)
            unfinished_cells.append(cell)
    if unfinished_cells:
        run_packs(
            unfinished_cells,
            options.store.get_record,
            partial(_measure_training_capacity, unfinished_cells, options),
            partial(_train_in_micro_batches, options=options),
            options,
            partial(keep_shortage, unfinished_cells[0], "training", options),
        )


def _train_in_micro_batches(cells: list[Cell], limit_reason: str, options: RunOptions) -> None:
    """Train a pack; if a single cell runs out of memory, try again with more micro-batches per step."""
    # TRL tosses a coin for each micro-batch: with more of them the cell would be another one.
    is_trl = cells[0].training.implementation == "trl"
    micro_batches = 1 if len(cells) > 1 or is_trl else read_micro_batches(cells[0], options)
    while True:
        try:
            with attempt_pack(cells, "training", options, micro_batches):
                return _train_pack(cells, limit_reason, options, micro_batches)
        except (MemoryError, RuntimeError) as error:
            if len(cells) > 1 or is_trl or not is_out_of_memory_error(error):
                raise
            micro_batches = increase_micro_batches(cells[0], micro_batches, error, options)
        release_memory()


def _train_pack(cells: list[Cell], limit_reason: str, options: RunOptions, micro_batches: int) -> None:
    """Train cells as one model, from the last step that all of them have, and finish their records.

    limit_reason: why the pack is no larger. micro_batches: number that each step's batch is split into.
    """
    training, meter = cells[0].training, UsageMeter()
    records = [options.store.get_record(cell) for cell in cells]
    students = {cell.training.start: load_sft_student(cell, options) for cell in _list_start_cells(cells)}
    student = students[training.start]
    if training.implementation == "trl":
        examples = load_uncut_examples(cells[0], student.tokenizer, records[0], options)
    else:
        examples = load_examples(cells[0], student.tokenizer, records, options)
    pack = _build_student_pack(cells, [students[cell.training.start].model for cell in cells])
    if len(cells) > 1:
        options.store.get_sft_student(cells[0]).delete_unpackable_reason()
    start_step = _resume_pack(pack, records, options)
    if start_step < training.steps:
        teacher = load_teacher(cells[0], options)
        check_shared_tokenizer(teacher.tokenizer, student.tokenizer, cells)
        _run_trainer(pack, teacher, student, examples, cells, start_step, options, micro_batches)
    facts = _describe_pack(cells, limit_reason)
    if micro_batches > 1:
        facts["rows_at_once"] = training.batch_size // micro_batches
    for n, (cell, record) in enumerate(zip(cells, records, strict=True)):
        if not record.read_status():
            save_student(pack.unpack_cell(n), student.tokenizer, cell, record.checkpoint)
            if training.selection is not None:
                pack.load_cell(n, load_best_weights(record, training.selection.metric))
                save_student(pack.unpack_cell(n), student.tokenizer, cell, record.best_checkpoint)
            sources = describe_sources(cell.training, cell.scale, options.store)
            usage = meter.read_usage()
            record.write_provenance(
                collect_provenance(**sources, **facts, resumed_at_step=start_step, spent=usage)
            )
            record.finish(
                steps=training.steps,
                tokens=round(count_completion_tokens(record.read_history(), training.batch_size)),
                shared_by=len(cells),
                device=select_device(),
            )


def _build_student_pack(cells: Sequence[Cell], models: Sequence[PreTrainedModel]) -> Pack:
    """Return the cells' SFT students as one pack; a student of TRL's trainer or of LoRA is alone in it."""
    training = cells[0].training
    model = models[0] if training.lora is None else _add_adapter(models[0], training)
    if training.implementation == "trl" or training.lora is not None:
        return Pack.build_single(model)
    return _build_pack(models)


def _add_adapter(model: PreTrainedModel, training: Training) -> Any:
    """Return the SFT student with the cell's new adapter; its own dropout is on only if the cell's is."""
    assert training.lora is not None, "a training of an adapter"
    if training.dropout == 0:
        disable_dropout(model)
    return add_lora_adapter(model, training.lora, training.seed, training.start.model.name)


def _list_start_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return the first cell of each SFT student: cells of other seeds may have starts of their own."""
    return list({cell.training.start: cell for cell in reversed(cells)}.values())


def _resume_pack(pack: Pack, records: Sequence[Record], options: RunOptions) -> int:
    """Load the newest checkpoint that all records have into the pack; return its step, 0 without one.

    Damaged checkpoints are set aside first. The records' histories are cut back to that step.
    """
    for record in records:
        repair_unfinished_training(record, options)
    common_steps = set.intersection(*(list_complete_steps(record.steps_folder) for record in records))
    step = max(common_steps, default=0)
    for n, record in enumerate(records):
        record.rewind_history(step)
        checkpoint = build_checkpoint_path(str(record.steps_folder), step)
        if step and holds_adapter(checkpoint):
            load_adapter_weights(pack.model, checkpoint)
        elif step:
            pack.load_cell(n, load_checkpoint_weights(checkpoint))
    return step


def _run_trainer(
    pack: Pack,
    teacher: LoadedModel,
    student: LoadedModel,
    examples: list[Example],
    cells: Sequence[Cell],
    start_step: int,
    options: RunOptions,
    micro_batches: int,
) -> None:
    """Train the pack in place from `start_step` to the last step; mark a cell failed as soon as it fails."""
    training = cells[0].training
    steps_folders = [options.store.get_record(cell).steps_folder for cell in cells]
    name = (
        f"cell {cells[0].fingerprint}, distillation"
        if len(cells) == 1
        else f"{len(cells)} cells as one model, distillation"
    )
    with options.reporter.phase(
        f"{training.task}: {name}",
        training.steps,
        start_step,
        folders=[options.store.get_record(cell).folder for cell in cells],
        work="distillation",
        unit="steps",
    ) as update_progress:
        trainer: GKDTrainer | TrlCellTrainer
        if training.implementation == "trl":
            trainer = build_trl_trainer(pack.model, teacher, examples, cells[0], options, student.tokenizer)
        else:
            trainer = build_trainer(pack, teacher, examples, cells, options, student.tokenizer, micro_batches)
        trainer.add_callback(HistoryCallback(update_progress))
        if training.selection is not None:
            trainer.add_callback(SelectionCallback(pack, student.tokenizer, cells, options))
        trainer.add_callback(CheckpointCallback(steps_folders, trainer.metrics))
        checkpoint = str(build_checkpoint_path(str(steps_folders[0]), start_step)) if start_step else None
        with delay_signals(), use_tf32(training.tf32), suppress(AllCellsFailed):
            trainer.train(resume_from_checkpoint=checkpoint)


def _describe_pack(cells: Sequence[Cell], limit_reason: str) -> dict[str, Any]:
    """Return provenance entries: `pack` (fingerprints), `threads`, `device`, `pack_limit` (why no larger)."""
    unpackable_reason = explain_unpackable(cells[0])
    reason = f"alone: {unpackable_reason}" if unpackable_reason else limit_reason
    return {
        "pack": [cell.fingerprint for cell in cells],
        "threads": torch.get_num_threads(),
        "device": select_device(),
        **({"pack_limit": reason} if reason else {}),
    }


def _measure_training_capacity(cells: Sequence[Cell], options: RunOptions) -> PackCapacity:
    """Return the PackCapacity: what memory allows if option `pack` is auto, otherwise all of the cells."""
    return keep_capacity(cells, "training", options, partial(_measure_training_bytes, cells, options))


def _measure_training_bytes(cells: Sequence[Cell], options: RunOptions) -> tuple[int, int]:
    """Return the bytes that one cell needs in a step on the longest examples, and the available bytes."""
    student, teacher = load_sft_student(cells[0], options), load_teacher(cells[0], options)
    check_shared_tokenizer(teacher.tokenizer, student.tokenizer, cells)
    examples = load_examples(cells[0], student.tokenizer, [], options)
    trainer = build_trainer(
        Pack.build([student.model]), teacher, examples, cells[:1], options, student.tokenizer
    )
    device = trainer.args.device.type
    available_bytes = measure_free_bytes(device) // options.count_sharing_workers(device)
    return measure_step_bytes(trainer, _build_longest_batch(examples, cells)), available_bytes


def _build_longest_batch(examples: Sequence[Example], cells: Sequence[Cell]) -> dict[str, torch.Tensor]:
    """Return named input tensors as large as one cell's longest batch, sampled completions at their limit.

    The tokens are zeros, except with cached scores, which exist for the examples' own tokens only.
    """
    training = cells[0].training
    by_length = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.completion_ids))
    longest = by_length[-training.batch_size :]
    if training.scores_spec is not None:  # cached scores exist for these very tokens only
        is_encoder_decoder = training.start.family == "encoder-decoder"
        return collate_examples(longest, 0, is_encoder_decoder=is_encoder_decoder).named_tensors()
    lengths = {
        "prompt": max(1, *(len(example.prompt_ids) for example in longest)),
        "completion": max(1, *(len(example.completion_ids) for example in longest)),
    }
    if any(cell.lmbda > 0 for cell in cells):
        lengths["completion"] = training.max_output_tokens
    batch = {}
    for name, length in lengths.items():
        batch[f"{name}_ids"] = torch.zeros(training.batch_size, length, dtype=torch.long)
        batch[f"{name}_mask"] = torch.ones(training.batch_size, length, dtype=torch.long)
    if any(example.teacher_index >= 0 for example in longest):
        batch["teacher_indices"] = torch.tensor([[example.teacher_index] for example in longest])
    return batch


def _build_pack(members: Sequence[Any]) -> Pack:
    """Return the models as one pack; a single model of any architecture is allowed. Raises CannotPack."""
    try:
        return Pack.build(members)
    except CannotPack:
        if len(members) > 1:
            raise
        return Pack.build_single(members[0])


def load_trained_pack(
    cells: Sequence[Cell], options: RunOptions, *, is_best: bool = False
) -> tuple[Pack, Any]:
    """Return (pack of the cells' trained models in order, the first cell's tokenizer). Raises CannotPack.

    is_best: the models that scored best on validation rows, instead of the last.
    """
    training = cells[0].training
    records = [options.store.get_record(cell) for cell in cells]
    members = [
        load_student(record, training.start, choose_precision(training), is_best=is_best)
        for record in records
    ]
    tokenizer = load_tokenizer(records[0].best_checkpoint if is_best else records[0].checkpoint)
    pack = _build_pack(members) if training.lora is None else Pack.build_single(members[0])
    return pack, tokenizer
