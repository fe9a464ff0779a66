"""Training a pack of cells: from the starting student to a finished record for each of them."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from transformers import PrinterCallback

from gkd_lab.config.cell import Cell, Role, Training
from gkd_lab.config.packs import why_alone
from gkd_lab.encoding.batches import Example, collate
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.registry import term_of
from gkd_lab.models.build import DTYPES, load_model, load_tokenizer
from gkd_lab.models.packing import CannotPack, Pack
from gkd_lab.runner import artifacts
from gkd_lab.runner.checkpoint_callback import Saving
from gkd_lab.runner.cross_tokenizer import check_tokenizers, in_own_tokens, teacher_prompts
from gkd_lab.runner.dataset import examples, report_cut, rows
from gkd_lab.runner.in_parts import InParts
from gkd_lab.runner.interrupts import finishing_steps
from gkd_lab.runner.memory import (
    Limit,
    bytes_of_step,
    fitting,
    free_bytes,
    in_packs,
    is_out_of_memory,
    release,
    smaller_batches,
)
from gkd_lab.runner.repair import mend_finished, mend_unfinished
from gkd_lab.runner.run_options import RunOptions, device
from gkd_lab.runner.sft import Follow, common_arguments, optimizer_arguments
from gkd_lab.runner.teacher_routing import with_routes
from gkd_lab.runner.teacher_scores import ensure_scores, stored_teacher
from gkd_lab.runner.teacher_text import ensure_text, with_teacher_text
from gkd_lab.store import Record
from gkd_lab.store.pack_cache import forget_reason
from gkd_lab.store.provenance import provenance, sources_of
from gkd_lab.store.timing import tokens
from gkd_lab.store.usage import Meter
from gkd_lab.teachers.cached_teachers import ServedTeacher
from gkd_lab.teachers.score_writer import numbered
from gkd_lab.teachers.server import Endpoint
from gkd_lab.teachers.teacher import Teacher
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.checkpoints import complete_steps, folder_of, weights
from gkd_lab.training.pack_trainer import AllCellsFailed
from gkd_lab.training.trainer import GKDTrainer


def train(cells: Sequence[Cell], options: RunOptions) -> None:
    """Train those of a claimed pack that have no verdict yet; failures are kept in their records."""
    open_cells = []
    for cell in cells:
        record = options.store.of(cell)
        if not all(record.evaluation(evaluation).status() for evaluation in cell.evaluations):
            mend_finished(record, options)
        if options.retry_failed:
            record.forget_failure()
        if not record.status():
            open_cells.append(cell)
    if not open_cells:
        return
    for cell in open_cells:
        options.store.of(cell).describe(cell.training, scale=cell.scale, labels=cell.labels)
        options.tracker.start(cell, options.store.of(cell))
    limit, work = partial(_limit, open_cells, options), partial(_train_fitting, options=options)
    in_packs(open_cells, options.store.of, limit, work, options)


def _limit(cells: Sequence[Cell], options: RunOptions) -> Limit:
    """How many of the cells fit as one model. A number that was asked for is taken as it is."""
    if options.pack != "auto" or len(cells) == 1:
        return Limit(len(cells))
    first = cells[0].training
    student, teacher = _student(cells[0], options), _teacher(cells[0], options)
    check_tokenizers(teacher.tokenizer, student.tokenizer, cells)
    found = _examples(first, cells[0].scale, student.tokenizer, [], options)
    pack = Pack.of([student.model])
    trainer = _trainer(
        pack, teacher, found, cells[:1], [options.store.of(cells[0])], options, student.tokenizer
    )
    free = free_bytes(trainer.args.device.type) // options.workers
    limit = fitting(len(cells), bytes_of_step(trainer, _longest(found, cells)), free)
    if limit.why:
        options.reporter.say(f"{first.task}: {limit.why}")
    return limit


def _longest(found: Sequence[Example], cells: Sequence[Cell]) -> dict[str, torch.Tensor]:
    """A batch as long as a step of these cells can be: the longest rows, with all that can be sampled."""
    training = cells[0].training
    rows = sorted(found, key=lambda e: len(e.prompt_ids) + len(e.completion_ids))[-training.batch_size :]
    prompt = max(len(row.prompt_ids) for row in rows)
    completion = max(len(row.completion_ids) for row in rows)
    if training.scores is not None:  # of other tokens none are known
        return collate(rows, 0, is_encoder_decoder=training.start.family == "encoder-decoder").tensors()
    if any(cell.lmbda > 0 for cell in cells):
        completion = training.max_output_tokens
    lengths = {"prompt": max(1, prompt), "completion": max(1, completion)}
    shapes = {name: (training.batch_size, length) for name, length in lengths.items()}
    ids = {f"{name}_ids": torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()}
    masks = {f"{name}_mask": torch.ones(shape, dtype=torch.long) for name, shape in shapes.items()}
    routed = any(row.route >= 0 for row in rows)
    return ids | masks | ({"routes": torch.tensor([[row.route] for row in rows])} if routed else {})


def _student(cell: Cell, options: RunOptions) -> artifacts.Loaded:
    """The starting student, in the dtype that it is trained in."""
    start = cell.training.start
    loaded = artifacts.load(artifacts.ensure("start", start, cell.scale, options), start)
    loaded.model.to(DTYPES["fp64" if cell.training.precision == "fp64" else "fp32"])
    return loaded


def _teacher(cell: Cell, options: RunOptions) -> artifacts.Loaded:
    """The teacher, or in its place the scores that it gave once, or its server."""
    teacher, scores = cell.training.teacher, cell.training.scores
    if teacher.model.served is not None:
        return _behind_a_server(cell, options)
    if scores is not None:
        kept = stored_teacher(ensure_scores(scores, cell.scale, options))
        return artifacts.Loaded(kept, kept.tokenizer)
    return artifacts.load(artifacts.ensure("teacher", teacher, cell.scale, options), teacher)


def _behind_a_server(cell: Cell, options: RunOptions) -> artifacts.Loaded:
    """Its tokenizer is the student's where none is given."""
    model, start = cell.training.teacher.model, cell.training.start
    place = model.path or model.pretrained or artifacts.ensure("start", start, cell.scale, options).checkpoint
    assert model.server and model.served and model.top_k, "a served teacher's description is whole"
    patience = {} if model.patience is None else {"patience": model.patience}
    endpoint = Endpoint(model.server, model.served, model.top_k, **patience)
    source = ServedTeacher(endpoint, load_tokenizer(place))
    return artifacts.Loaded(source, source.tokenizer)


def _more_teachers(cell: Cell, options: RunOptions) -> list[Teacher]:
    """Those besides the first, from number 1 on."""
    training = cell.training
    found = []
    for number, model in enumerate(training.teachers, start=1):
        role: Role = "start" if model == training.start else "teacher"
        loaded = artifacts.load(artifacts.ensure(role, model, cell.scale, options), model)
        found.append(Teacher(loaded.model, *training.held(number), loaded.tokenizer))
    return found


def _train_fitting(cells: list[Cell], why: str, options: RunOptions) -> None:
    """Train these cells; a single one that runs out of memory in ever smaller micro-batches."""
    parts = 1
    while True:
        try:
            return _train(cells, why, options, parts)
        except (MemoryError, RuntimeError) as error:
            if len(cells) > 1 or not is_out_of_memory(error):
                raise
            parts = smaller_batches(cells[0], parts, error, options)
        release()


def _train(cells: list[Cell], why: str, options: RunOptions, parts: int = 1) -> None:
    """Train these cells as one model from the last step that all have; `why` there are no more of them.

    Each step's batch is taken in `parts`.
    """
    first, meter = cells[0].training, Meter()
    records = [options.store.of(cell) for cell in cells]
    student = _student(cells[0], options)
    found = _examples(first, cells[0].scale, student.tokenizer, records, options)
    pack = _pack([student.model] * len(cells))
    if len(cells) > 1:
        forget_reason(options.store.artifact(cells[0].scale, "start", first.start))
    for record in records:
        mend_unfinished(record, options)
    done = _common_step(records)
    for n, record in enumerate(records):
        record.rewind(done)
        if done:
            pack.load(n, weights(folder_of(str(record.steps_folder), done)))
    if done < first.steps:
        guide = _teacher(cells[0], options)
        check_tokenizers(guide.tokenizer, student.tokenizer, cells)
        _distil(pack, guide, student.tokenizer, found, cells, records, done, options, parts)
    alone = why_alone(cells[0])
    facts = _facts(cells, f"alone: {alone}" if alone else why)
    if parts > 1:
        facts["rows_at_once"] = first.batch_size // parts
    for n, record in enumerate(records):
        if not record.status():
            artifacts.export(pack.unpack(n), student.tokenizer, record)
            came_from = sources_of(cells[n].training, cells[0].scale, options.store)
            record.write_provenance(
                provenance(**came_from, **facts, resumed_at_step=done, spent=meter.spent())
            )
            record.finish(
                steps=first.steps,
                tokens=round(tokens(record.history(), first.batch_size)),
                shared_by=len(cells),
                device=device(),
            )


def _facts(cells: Sequence[Cell], why: str) -> dict[str, Any]:
    """Who shared the model, and why no one else did where something kept them apart."""
    facts = {"pack": [cell.fingerprint for cell in cells], "threads": torch.get_num_threads()}
    return {**facts, "device": device(), **({"pack_limit": why} if why else {})}


def _examples(
    training: Training, scale: str, tokenizer: Any, records: Sequence[Record], options: RunOptions
) -> list[Example]:
    data = rows(training.task, training.data, "train", options.cache)
    found, cut = examples(training.start, tokenizer, data)
    found = with_routes(found, data, training.objectives)
    for record in records:
        report_cut(record.folder, "train", cut)
    if training.text is not None:
        text = ensure_text(training.text, scale, options)
        teacher = options.store.artifact(scale, "teacher", training.teacher)
        found = in_own_tokens(with_teacher_text(found, text), text, training, teacher, tokenizer)
    if training.scores is not None:
        found = numbered(found)
    return found[: training.train_rows]


def _distil(
    pack: Pack,
    teacher: artifacts.Loaded,
    tokenizer: Any,
    found: list[Example],
    cells: Sequence[Cell],
    records: Sequence[Record],
    done: int,
    options: RunOptions,
    parts: int,
) -> None:
    """Train the pack from step `done` to its end; a cell that fails has its verdict at once."""
    training = cells[0].training
    with options.reporter.phase(f"{training.task}: {_called(cells)}", training.steps, done) as advance:
        trainer = _trainer(pack, teacher, found, cells, records, options, tokenizer, parts)
        trainer.add_callback(Follow(advance))
        trainer.add_callback(Saving([record.steps_folder for record in records], trainer._logged))
        resume = str(folder_of(str(records[0].steps_folder), done)) if done else None
        with finishing_steps(), suppress(AllCellsFailed):
            trainer.train(resume_from_checkpoint=resume)


def _trainer(
    pack: Pack,
    teacher: artifacts.Loaded,
    found: list[Example],
    cells: Sequence[Cell],
    records: Sequence[Record],
    options: RunOptions,
    tokenizer: Any,
    parts: int = 1,
) -> GKDTrainer:
    """`tokenizer`: the student's."""
    trainer = InParts(
        pack=pack,
        cells=[_arguments(cell, record) for cell, record in zip(cells, records, strict=True)],
        teacher_model=teacher.model,
        args=_config(cells[0], records[0], options, parts),
        train_dataset=found,
        processing_class=tokenizer,
        teacher_processing_class=teacher.tokenizer,
        teacher_prompts=teacher_prompts(teacher.tokenizer, found, cells, options),
        more_teachers=_more_teachers(cells[0], options),
        log_cell=lambda n, row: _log(records[n], row, options),
        on_failure=lambda n, why: _fail(records[n], f"FloatingPointError: {why}", options),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _log(record: Record, row: dict[str, float], options: RunOptions) -> None:
    record.log(row)
    options.tracker.log(record, row)


def _fail(record: Record, why: str, options: RunOptions) -> None:
    record.failed(why)
    options.tracker.settle(record)


def _called(cells: Sequence[Cell]) -> str:
    if len(cells) == 1:
        return f"cell {cells[0].fingerprint}, distillation"
    return f"{len(cells)} cells as one model, distillation"


def _pack(members: Sequence[Any]) -> Pack:
    """Models as one; a single one of an architecture that cannot be packed as it is. Raises CannotPack."""
    try:
        return Pack.of(members)
    except CannotPack:
        if len(members) > 1:
            raise
        return Pack.alone(members[0])


def load_pack(cells: Sequence[Cell], options: RunOptions) -> tuple[Pack, Any]:
    """The finished students of some cells as one model, and their tokenizer. Raises CannotPack."""
    first = cells[0].training
    precision = "fp64" if first.precision == "fp64" else "fp32"
    folders = [options.store.of(cell).checkpoint for cell in cells]
    members = [load_model(folder, first.start.family, precision) for folder in folders]
    return _pack(members), load_tokenizer(folders[0])


def _common_step(records: Sequence[Record]) -> int:
    """The last step at which every cell of the pack can be resumed."""
    steps = [complete_steps(record.steps_folder) for record in records]
    return max(set.intersection(*steps), default=0)


def _arguments(cell: Cell, record: Record) -> CellArguments:
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
        objectives=tuple(term_of(one) for one in training.objectives),
    )


def _config(cell: Cell, record: Record, options: RunOptions, parts: int) -> GKDConfig:
    """Every argument of the trainer, stated; what differs between cells is in `CellArguments`."""
    training = cell.training
    teacher_dtype, parked = training.held(0)
    return GKDConfig(
        **common_arguments(record.steps_folder, training.steps, options.checkpoint_every, options.log_every),
        **optimizer_arguments(training.optimizer),
        per_device_train_batch_size=training.batch_size // parts,
        gradient_accumulation_steps=parts,
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
