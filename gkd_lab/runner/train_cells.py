"""Training a pack of cells: from the starting student to a finished record for each of them."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from transformers import PrinterCallback

from gkd_lab.config.cell import Cell, Role, Training
from gkd_lab.config.packs import explain_unpackable
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.registry import build_term
from gkd_lab.models.build import PRECISION_DTYPES, load_model, load_tokenizer
from gkd_lab.models.packing import CannotPack, Pack
from gkd_lab.runner import artifacts
from gkd_lab.runner.checkpoint_callback import CheckpointCallback
from gkd_lab.runner.cross_tokenizer import check_shared_tokenizer, map_teacher_prompts, retokenize_completions
from gkd_lab.runner.dataset import encode_examples, load_split, write_split_report
from gkd_lab.runner.in_parts import MicroBatchTrainer
from gkd_lab.runner.interrupts import delay_signals
from gkd_lab.runner.memory import (
    PackCapacity,
    compute_capacity,
    increase_micro_batches,
    is_out_of_memory_error,
    measure_free_bytes,
    measure_step_bytes,
    release_memory,
    run_packs,
)
from gkd_lab.runner.repair import quarantine_damaged_result, repair_unfinished_training
from gkd_lab.runner.run_options import RunOptions, select_device
from gkd_lab.runner.sft import HistoryCallback, build_optimizer_arguments, build_trainer_arguments
from gkd_lab.runner.teacher_routing import assign_teachers
from gkd_lab.runner.teacher_scores import ensure_teacher_scores, load_cached_teacher
from gkd_lab.runner.teacher_text import apply_teacher_text, ensure_teacher_text
from gkd_lab.store import Record
from gkd_lab.store.provenance import collect_provenance, describe_sources
from gkd_lab.store.timing import UsageMeter, count_completion_tokens
from gkd_lab.teachers.cached_teachers import ServerTeacher
from gkd_lab.teachers.score_writer import number_examples
from gkd_lab.teachers.server import TeacherServer
from gkd_lab.teachers.teacher import Teacher
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.checkpoints import build_checkpoint_path, list_complete_steps, load_checkpoint_weights
from gkd_lab.training.pack_trainer import AllCellsFailed
from gkd_lab.training.trainer import GKDTrainer


def train_cells(cells: Sequence[Cell], options: RunOptions) -> None:
    """Train those of a claimed pack that have no verdict yet; failures are kept in their records."""
    open_cells = []
    for cell in cells:
        record = options.store.get_record(cell)
        if not all(record.get_evaluation(evaluation).read_status() for evaluation in cell.evaluations):
            quarantine_damaged_result(record, options)
        if options.retry_failed:
            record.clear_failure()
        if not record.read_status():
            open_cells.append(cell)
    if not open_cells:
        return
    for cell in open_cells:
        options.store.get_record(cell).write_spec(cell.training, scale=cell.scale, labels=cell.labels)
        options.tracker.start_run(cell, options.store.get_record(cell))
    limit, work = (
        partial(_limit_training_pack, open_cells, options),
        partial(_train_in_micro_batches, options=options),
    )
    run_packs(open_cells, options.store.get_record, limit, work, options)


def _limit_training_pack(cells: Sequence[Cell], options: RunOptions) -> PackCapacity:
    """How many of the cells fit as one model. A number that was asked for is taken as it is."""
    if options.pack != "auto" or len(cells) == 1:
        return PackCapacity(len(cells))
    first = cells[0].training
    student, teacher = _load_sft_student(cells[0], options), _load_teacher(cells[0], options)
    check_shared_tokenizer(teacher.tokenizer, student.tokenizer, cells)
    found = _load_examples(first, cells[0].scale, student.tokenizer, [], options)
    pack = Pack.build([student.model])
    trainer = _build_trainer(
        pack, teacher, found, cells[:1], [options.store.get_record(cells[0])], options, student.tokenizer
    )
    free = measure_free_bytes(trainer.args.device.type) // options.workers
    limit = compute_capacity(
        len(cells), measure_step_bytes(trainer, _build_longest_batch(found, cells)), free
    )
    if limit.reason:
        options.reporter.say(f"{first.task}: {limit.reason}")
    return limit


def _build_longest_batch(examples: Sequence[Example], cells: Sequence[Cell]) -> dict[str, torch.Tensor]:
    """A batch as long as a step of these cells can be: the longest rows, with all that can be sampled."""
    training = cells[0].training
    rows = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.completion_ids))[-training.batch_size :]
    prompt = max(len(row.prompt_ids) for row in rows)
    completion = max(len(row.completion_ids) for row in rows)
    if training.scores_spec is not None:  # of other tokens none are known
        return collate_examples(
            rows, 0, is_encoder_decoder=training.start.family == "encoder-decoder"
        ).named_tensors()
    if any(cell.lmbda > 0 for cell in cells):
        completion = training.max_output_tokens
    lengths = {"prompt": max(1, prompt), "completion": max(1, completion)}
    shapes = {name: (training.batch_size, length) for name, length in lengths.items()}
    ids = {f"{name}_ids": torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()}
    masks = {f"{name}_mask": torch.ones(shape, dtype=torch.long) for name, shape in shapes.items()}
    routed = any(row.teacher_index >= 0 for row in rows)
    return (
        ids
        | masks
        | ({"teacher_indices": torch.tensor([[row.teacher_index] for row in rows])} if routed else {})
    )


def _load_sft_student(cell: Cell, options: RunOptions) -> artifacts.LoadedModel:
    """The starting student, in the dtype that it is trained in."""
    start = cell.training.start
    loaded = artifacts.load_artifact(artifacts.ensure_artifact("start", start, cell.scale, options), start)
    loaded.model.to(PRECISION_DTYPES["fp64" if cell.training.precision == "fp64" else "fp32"])
    return loaded


def _load_teacher(cell: Cell, options: RunOptions) -> artifacts.LoadedModel:
    """The teacher, or in its place the scores that it gave once, or its server."""
    teacher, scores = cell.training.teacher, cell.training.scores_spec
    if teacher.model.served is not None:
        return _connect_served_teacher(cell, options)
    if scores is not None:
        kept = load_cached_teacher(ensure_teacher_scores(scores, cell.scale, options))
        return artifacts.LoadedModel(kept, kept.tokenizer)
    return artifacts.load_artifact(
        artifacts.ensure_artifact("teacher", teacher, cell.scale, options), teacher
    )


def _connect_served_teacher(cell: Cell, options: RunOptions) -> artifacts.LoadedModel:
    """Its tokenizer is the student's where none is given."""
    model, start = cell.training.teacher.model, cell.training.start
    place = (
        model.path
        or model.pretrained
        or artifacts.ensure_artifact("start", start, cell.scale, options).checkpoint
    )
    assert model.server and model.served and model.top_k, "a served teacher's description is whole"
    patience = {} if model.patience is None else {"patience": model.patience}
    endpoint = TeacherServer(model.server, model.served, model.top_k, **patience)
    source = ServerTeacher(endpoint, load_tokenizer(place))
    return artifacts.LoadedModel(source, source.tokenizer)


def _load_extra_teachers(cell: Cell, options: RunOptions) -> list[Teacher]:
    """Those besides the first, from number 1 on."""
    training = cell.training
    found = []
    for number, model in enumerate(training.teachers, start=1):
        role: Role = "start" if model == training.start else "teacher"
        loaded = artifacts.load_artifact(artifacts.ensure_artifact(role, model, cell.scale, options), model)
        found.append(Teacher(loaded.model, *training.get_teacher_placement(number), loaded.tokenizer))
    return found


def _train_in_micro_batches(cells: list[Cell], limit_reason: str, options: RunOptions) -> None:
    """Train these cells; a single one that runs out of memory in ever smaller micro-batches."""
    parts = 1
    while True:
        try:
            return _train_pack(cells, limit_reason, options, parts)
        except (MemoryError, RuntimeError) as error:
            if len(cells) > 1 or not is_out_of_memory_error(error):
                raise
            parts = increase_micro_batches(cells[0], parts, error, options)
        release_memory()


def _train_pack(cells: list[Cell], limit_reason: str, options: RunOptions, micro_batches: int = 1) -> None:
    """Train these cells as one model from the last step that all have; `why` there are no more of them.

    Each step's batch is taken in `parts`.
    """
    first, meter = cells[0].training, UsageMeter()
    records = [options.store.get_record(cell) for cell in cells]
    student = _load_sft_student(cells[0], options)
    found = _load_examples(first, cells[0].scale, student.tokenizer, records, options)
    pack = _build_pack([student.model] * len(cells))
    if len(cells) > 1:
        options.store.get_sft_student(cells[0]).delete_unpackable_reason()
    for record in records:
        repair_unfinished_training(record, options)
    done = _find_common_step(records)
    for n, record in enumerate(records):
        record.rewind_history(done)
        if done:
            pack.load_cell(n, load_checkpoint_weights(build_checkpoint_path(str(record.steps_folder), done)))
    if done < first.steps:
        guide = _load_teacher(cells[0], options)
        check_shared_tokenizer(guide.tokenizer, student.tokenizer, cells)
        _run_trainer(pack, guide, student.tokenizer, found, cells, records, done, options, micro_batches)
    alone = explain_unpackable(cells[0])
    facts = _describe_pack(cells, f"alone: {alone}" if alone else limit_reason)
    if micro_batches > 1:
        facts["rows_at_once"] = first.batch_size // micro_batches
    for n, record in enumerate(records):
        if not record.read_status():
            artifacts.export_checkpoint(pack.unpack_cell(n), student.tokenizer, record)
            came_from = describe_sources(cells[n].training, cells[0].scale, options.store)
            record.write_provenance(
                collect_provenance(**came_from, **facts, resumed_at_step=done, spent=meter.read_usage())
            )
            record.finish(
                steps=first.steps,
                tokens=round(count_completion_tokens(record.read_history(), first.batch_size)),
                shared_by=len(cells),
                device=select_device(),
            )


def _describe_pack(cells: Sequence[Cell], limit_reason: str) -> dict[str, Any]:
    """Who shared the model, and why no one else did where something kept them apart."""
    facts = {"pack": [cell.fingerprint for cell in cells], "threads": torch.get_num_threads()}
    return {**facts, "device": select_device(), **({"pack_limit": limit_reason} if limit_reason else {})}


def _load_examples(
    training: Training, scale: str, tokenizer: Any, records: Sequence[Record], options: RunOptions
) -> list[Example]:
    data = load_split(training.task, training.data, "train", options.cache_folder)
    found, cut = encode_examples(training.start, tokenizer, data)
    found = assign_teachers(found, data, training.objectives)
    for record in records:
        write_split_report(record.folder, "train", cut)
    if training.text_spec is not None:
        text = ensure_teacher_text(training.text_spec, scale, options)
        teacher = options.store.get_artifact(scale, "teacher", training.teacher)
        found = retokenize_completions(apply_teacher_text(found, text), text, training, teacher, tokenizer)
    if training.scores_spec is not None:
        found = number_examples(found)
    return found[: training.train_rows]


def _run_trainer(
    pack: Pack,
    teacher: artifacts.LoadedModel,
    tokenizer: Any,
    examples: list[Example],
    cells: Sequence[Cell],
    records: Sequence[Record],
    done: int,
    options: RunOptions,
    micro_batches: int,
) -> None:
    """Train the pack from step `done` to its end; a cell that fails has its verdict at once."""
    training = cells[0].training
    with options.reporter.phase(
        f"{training.task}: {_format_pack_name(cells)}", training.steps, done
    ) as advance:
        trainer = _build_trainer(pack, teacher, examples, cells, records, options, tokenizer, micro_batches)
        trainer.add_callback(HistoryCallback(advance))
        trainer.add_callback(CheckpointCallback([record.steps_folder for record in records], trainer.metrics))
        resume = str(build_checkpoint_path(str(records[0].steps_folder), done)) if done else None
        with delay_signals(), suppress(AllCellsFailed):
            trainer.train(resume_from_checkpoint=resume)


def _build_trainer(
    pack: Pack,
    teacher: artifacts.LoadedModel,
    examples: list[Example],
    cells: Sequence[Cell],
    records: Sequence[Record],
    options: RunOptions,
    tokenizer: Any,
    micro_batches: int = 1,
) -> GKDTrainer:
    """`tokenizer`: the student's."""
    trainer = MicroBatchTrainer(
        pack=pack,
        cells=[_build_cell_arguments(cell, record) for cell, record in zip(cells, records, strict=True)],
        teacher_model=teacher.model,
        args=_build_trainer_config(cells[0], records[0], options, micro_batches),
        train_dataset=examples,
        processing_class=tokenizer,
        teacher_processing_class=teacher.tokenizer,
        teacher_prompts=map_teacher_prompts(teacher.tokenizer, examples, cells, options),
        more_teachers=_load_extra_teachers(cells[0], options),
        log_cell=lambda n, row: _log_row(records[n], row, options),
        on_failure=lambda n, why: _fail_cell(records[n], f"FloatingPointError: {why}", options),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _log_row(record: Record, row: dict[str, float], options: RunOptions) -> None:
    record.log_row(row)
    options.tracker.log_row(record, row)


def _fail_cell(record: Record, reason: str, options: RunOptions) -> None:
    record.mark_failed(reason)
    options.tracker.finish_run(record)


def _format_pack_name(cells: Sequence[Cell]) -> str:
    if len(cells) == 1:
        return f"cell {cells[0].fingerprint}, distillation"
    return f"{len(cells)} cells as one model, distillation"


def _build_pack(members: Sequence[Any]) -> Pack:
    """Models as one; a single one of an architecture that cannot be packed as it is. Raises CannotPack."""
    try:
        return Pack.build(members)
    except CannotPack:
        if len(members) > 1:
            raise
        return Pack.build_single(members[0])


def load_trained_pack(cells: Sequence[Cell], options: RunOptions) -> tuple[Pack, Any]:
    """The finished students of some cells as one model, and their tokenizer. Raises CannotPack."""
    first = cells[0].training
    precision = "fp64" if first.precision == "fp64" else "fp32"
    folders = [options.store.get_record(cell).checkpoint for cell in cells]
    members = [load_model(folder, first.start.family, precision) for folder in folders]
    return _build_pack(members), load_tokenizer(folders[0])


def _find_common_step(records: Sequence[Record]) -> int:
    """The last step at which every cell of the pack can be resumed."""
    steps = [list_complete_steps(record.steps_folder) for record in records]
    return max(set.intersection(*steps), default=0)


def _build_cell_arguments(cell: Cell, record: Record) -> CellArguments:
    training = cell.training
    plain = Divergence()
    return CellArguments(
        lmbda=training.source.lmbda,
        beta=plain.beta,
        seed=training.seed,
        temperature=training.source.temperature or 1.0,
        teacher_temperature=plain.teacher_temperature,
        student_temperature=plain.student_temperature,
        learning_rate=training.optimizer.learning_rate,
        output_dir=str(record.steps_folder),
        objectives=tuple(build_term(one) for one in training.objectives),
    )


def _build_trainer_config(cell: Cell, record: Record, options: RunOptions, micro_batches: int) -> GKDConfig:
    """Every argument of the trainer, stated; what differs between cells is in `CellArguments`."""
    training = cell.training
    teacher_dtype, parked = training.get_teacher_placement(0)
    return GKDConfig(
        **build_trainer_arguments(
            record.steps_folder, training.steps, options.checkpoint_every, options.log_every
        ),
        **build_optimizer_arguments(training.optimizer),
        per_device_train_batch_size=training.batch_size // micro_batches,
        gradient_accumulation_steps=micro_batches,
        dataloader_drop_last=True,
        max_new_tokens=training.max_output_tokens,
        loss_normalization=training.loss_normalization,
        disable_dropout=training.dropout == 0,
        seed=training.seed,
        bf16=training.precision == "bf16",
        teacher_dtype=teacher_dtype,
        park_teacher=parked,
        log_term_gradients=options.term_gradients,
    )
