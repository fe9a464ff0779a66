"""Generalized knowledge distillation of K cells at once: Algorithm 1 of the paper on transformers' Trainer.

It takes what TRL's GKDTrainer takes. K = 1 with a plain model is a pack of one; nothing here asks which.
Shapes: K cells, S distinct seeds, B rows of a micro-batch, C completion tokens.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from gkd_lab.encoding.batches import Collator, EpochCallback, KeyedBatchSampler
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.encoding.trl_batch import build_trl_batch, parse_collated_batch
from gkd_lab.losses.attentions import enable_attention_maps
from gkd_lab.losses.auxiliary_modules import AuxiliaryModules, AuxiliaryUpdateCallback
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.fused_loss import CellLosses
from gkd_lab.losses.policy_gradient import ProcessGroup, RewardHooks, RewardScaler
from gkd_lab.losses.step_loss import (
    MicroBatch,
    build_micro_batch,
    cell_token_weights,
    compute_step_losses,
    concatenate_blocks,
    count_trained_items,
    split_blocks,
)
from gkd_lab.losses.term_gradients import term_gradient_norms
from gkd_lab.losses.terms import needs_text_reader, required_outputs, required_teachers
from gkd_lab.models.attention import upcast_cpu_attention
from gkd_lab.models.forward import Sequences, eval_mode, unwrap_model
from gkd_lab.models.heads import OutputHead
from gkd_lab.models.loading import load_student
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import derive_seed, is_on_policy
from gkd_lab.models.sharding import place_student
from gkd_lab.teachers.cached_teachers import ModelFreeTeacher
from gkd_lab.teachers.load_teachers import TeacherSet
from gkd_lab.teachers.teacher import (
    LiveTeacher,
    Teacher,
    TeacherOutput,
    check_row_routes,
    check_teacher_numbers,
    run_inside_forward,
)
from gkd_lab.teachers.teacher_prompts import TeacherPrompts, TwoTokenizerEncoder
from gkd_lab.teachers.text_teacher import TextTeacher
from gkd_lab.training import setup, trl_compat
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.classification_adapter import build_classification_adapter
from gkd_lab.training.metric_accumulator import MetricAccumulator
from gkd_lab.training.pack_trainer import CellLogger, PackTrainer, build_single_cell_property
from gkd_lab.training.rollout import (
    GenerationLimits,
    MicroBatchPosition,
    TeacherCompletions,
    sample_student_completions,
)
from gkd_lab.training.sampling import build_sampling_config, collect_end_ids


class GKDTrainer(PackTrainer):
    """Distils `teacher_model` into one student, or into the K students of a `pack`.

    The first thirteen arguments are those of TRL's GKDTrainer.

    Args:
        model: The student, or its name; or leave it out and give `pack`.
        teacher_model: The teacher, or its name; frozen here. Or a `ModelFreeTeacher`, such as scores that were
            kept. None: `args.teacher_model_name_or_path`, and without that a frozen copy of the student as it
            starts.
        args: Common to all cells.
        data_collator: Makes TRL's batches (`input_ids`, `labels`, `prompts`, ...) out of rows; None: ours.
        train_dataset: Rows with `messages`, or `prompt` and `completion`, or a prompt alone; or `Example`s.
            Of a classifier: `text` (and `text_pair`), `tokens` or `input_ids`, and `label` or `labels`.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer of the student; None: the one in the model's folder.
        peft_config: Trains an adapter instead of the model.
        formatting_func: Applied to each row first.
        teacher_processing_class: The teacher's tokenizer, where it is not in the teacher's folder; it must
            be the student's, unless the teacher reads texts (the objective `uld`) and nothing else.
        more_teachers: Teachers besides the first, from number 1 on: a divergence says with which it compares.
        teacher_prompts: How a teacher with another tokenizer reads prompts, by the student's ids. Those of
            rows that are no `Example`s are encoded for both.
        pack, cells: K students in one model, and what differs between them.
        log_cell: Called with (cell, row) whenever the Trainer logs.
        on_failure: Called with (cell, why) at once when a cell's loss or gradient is no number.
        tokenizer: Deprecated name of `processing_class`.
    """

    lmbda = build_single_cell_property("lmbda")
    beta = build_single_cell_property("beta")
    temperature = build_single_cell_property("temperature")
    generalized_jsd_loss = staticmethod(trl_compat.generalized_jsd_loss)
    generate_on_policy_outputs = staticmethod(trl_compat.generate_on_policy_outputs)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | ModelFreeTeacher | str | None = None,
        args: GKDConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
        *,
        teacher_processing_class: Any = None,
        more_teachers: Sequence[Teacher] = (),
        teacher_prompts: TeacherPrompts | None = None,
        pack: Pack | None = None,
        cells: Sequence[CellArguments] | None = None,
        log_cell: CellLogger | None = None,
        on_failure: Callable[[int, str], None] | None = None,
        tokenizer: Any = None,
    ) -> None:
        unstated = args is None
        args = setup.resolve_arguments(args, model)
        student = pack.model if pack is not None else _load_student(model, args)
        self._tokenizer = setup.resolve_tokenizer(processing_class, tokenizer, student, args)
        given = TeacherSet.load(
            teacher_model,
            more_teachers,
            student,
            cells or [CellArguments.build(args)],
            args,
            tokenizer=teacher_processing_class,
            student_tokenizer=self._tokenizer,
            is_copy=teacher_model in (None, model) and not args.teacher_model_name_or_path,
        )
        self._classes = build_classification_adapter(
            student, given.list_models_and_tokenizers(), self._tokenizer, args, use_default_arguments=unstated
        )
        # Of a classifier the arguments that nobody stated are others from here on.
        cells = cells or [CellArguments.build(args)]
        if self._classes is None:
            compared = required_teachers(cell.list_terms() for cell in cells) + [0] * args.seq_kd
            self.vocabulary_size = given.count_shared_vocabulary(student, self._tokenizer, compared)
        else:
            self.vocabulary_size = len(self._classes.label_names)
        pack = (
            pack if pack is not None else Pack.build_single(setup.prepare_student(student, peft_config, args))
        )
        if args.disable_dropout:
            setup.disable_dropout(pack.model)
        self._is_encoder_decoder = bool(student.config.is_encoder_decoder)
        writes = self._classes is None
        ends = collect_end_ids(student, self._tokenizer) if writes else torch.tensor([], dtype=torch.long)
        self.encode_row = RowEncoder(
            self._tokenizer,
            end_ids=ends.tolist(),
            is_encoder_decoder=self._is_encoder_decoder,
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            formatting_func=formatting_func,
        )
        pad_id = self._tokenizer.pad_token_id
        prompts = self._build_text_encoder(cells, given, args, teacher_prompts)
        if prompts is not None and not hasattr(train_dataset, "__len__"):
            setup.check_stream_collation(args)
        collator: Any = Collator(prompts or self.encode_row, pad_id, self._is_encoder_decoder)
        if self._classes is not None:
            cells = self._classes.resolve_cell_arguments(cells)
            collator = self._classes.build_collator(cells, args, formatting_func)
            compute_metrics = compute_metrics or self._classes.compute_metrics
        super().__init__(
            pack,
            cells,
            log_cell,
            on_failure,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self._tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.generation_limits = GenerationLimits(args.max_new_tokens, ends, pad_id, self.vocabulary_size)
        self._place_models(given)
        self._create_loss_modules(given, prompts)
        self._create_samplers()
        self._on_policy_metrics = MetricAccumulator(len(self.cells))
        self._n_evaluated_batches = 0
        self._term_norms: list[dict[str, float]] = []
        self._epochs = EpochCallback()
        self.add_callback(self._epochs)

    def _place_models(self, given: TeacherSet) -> None:
        """Student and teachers where the run needs them."""
        self.student_head = OutputHead(self.pack.model)
        self.teachers = given.place_teachers(self.accelerator, parked=self.args.park_teacher)
        self.model = place_student(self.pack.model, self.accelerator)
        live = self.teachers[0] if isinstance(self.teachers[0], LiveTeacher) else None
        self.teacher_model: Any = live and live.model
        self.teacher_head: Any = live and live.head
        if self._classes is not None:
            self._classes.align_teacher_labels(self.teachers)
        check_teacher_numbers(self.teachers, required_teachers(cell.list_terms() for cell in self.cells))

    def _create_loss_modules(self, given: TeacherSet, prompts: TwoTokenizerEncoder | None) -> None:
        """What the loss's terms need besides logits."""
        self._create_auxiliary_modules()
        if prompts is not None:
            first, ends = self.teachers[0], self.generation_limits.end_ids.tolist()
            reader = TextTeacher(first, given.tokenizer, self._tokenizer, ends, prompts.teacher_prompts)
            self.auxiliary_modules.set_text_reader(reader)
        self.reward_scaler = RewardScaler(
            self.cells,
            self._tokenizer,
            self.args.loss_normalization,
            self.accelerator.device,
            RewardHooks(self._fail_cell, self.metrics.add_reward),
            ProcessGroup(self.args.world_size, self._sum_over_ranks),
        )

    def _create_samplers(self) -> None:
        """What lets the student, and the teacher in its place, write. A classifier writes nothing."""
        args, limits, first = self.args, self.generation_limits, self.cells[0]
        if self._classes is None:
            self.generation_config = build_sampling_config(
                self.pack.model, limits.end_ids, limits.pad_id, args.max_new_tokens, args.temperature
            )
        if args.seq_kd and len({(cell.seed, cell.temperature) for cell in self.cells}) > 1:
            raise ValueError(
                "seq_kd=True writes one text for a prompt, and the cells of the pack differ in seed or "
                "temperature: run them alone (`--pack off`)"
            )
        # A source writes nothing, and seq_kd is refused with it.
        writer: Any = self.teacher_head and self.teacher_head.model
        self.teacher_completions = TeacherCompletions(
            writer, limits, first.temperature, first.seed, self._is_true_on_any_rank
        )
        self._vllm_sampler = self._create_vllm_sampler() if args.use_vllm else None

    def _create_vllm_sampler(self) -> Any:
        from gkd_lab.training.vllm_sampling import VllmSampler

        if self.pack.is_packed:
            raise ValueError("use_vllm serves one student: run the cells alone (`--pack off`)")
        return VllmSampler(
            self.pack.model,
            self._tokenizer,
            self.accelerator,
            self.args,
            self.generation_limits.end_ids,
            self.vocabulary_size,
        )

    def _build_text_encoder(
        self,
        cells: Sequence[CellArguments],
        given: TeacherSet,
        args: GKDConfig,
        known: TeacherPrompts | None,
    ) -> TwoTokenizerEncoder | None:
        """How the teacher reads prompts, where a term lets it read texts."""
        if not needs_text_reader(cell.list_terms() for cell in cells):
            return None
        if args.dataloader_num_workers:
            raise ValueError(
                "uld keeps the teacher's prompts where rows are collated: set dataloader_num_workers to 0"
            )
        return TwoTokenizerEncoder(self.encode_row, given.tokenizer, given.first.config, known)

    def _create_auxiliary_modules(self) -> None:
        """What the loss's terms compute besides logits, and what of it learns."""
        model = self.student_head.model
        if "attentions" in required_outputs(cell.list_terms() for cell in self.cells):
            for head in (self.student_head, self.teacher_head):
                if head is not None:
                    enable_attention_maps(unwrap_model(head.model))
        self.auxiliary_modules = AuxiliaryModules(
            self.cells,
            model.config,
            self.teachers[0].config,
            self.accelerator.device,
            model.dtype,
            partial(self.accelerator.reduce, reduction="mean"),
        )
        if self.auxiliary_modules.has_parameters and self.args.fp16:
            raise ValueError("a term of the loss learns, which fp16's scaled gradients do not fit: use bf16")
        if self.auxiliary_modules.has_parameters:
            self.add_callback(AuxiliaryUpdateCallback(self.auxiliary_modules, self.failures))

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches of (S*B) rows in the order that each cell's seed gives; a stream keeps its own order."""
        if not hasattr(self.train_dataset, "__len__"):
            return super().get_train_dataloader()
        args = self.args
        batches = KeyedBatchSampler(
            len(self.train_dataset),
            self._train_batch_size,
            self.seeds,
            drop_last=args.dataloader_drop_last,
            shuffled=args.train_sampling_strategy == "random",
        )
        self._epochs.batch_sampler = batches
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    # ---- one step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """All micro-batches of one optimizer step: toss the coin, let students write, count items."""
        pad_id = self.generation_limits.pad_id
        fetched = [self.parse_batch(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        for rows in fetched:
            check_row_routes((cell.list_terms() for cell in self.cells), rows.teacher_indices)
        step, rank = self.state.global_step, self.args.process_index
        # Dropout of this step, resumed or not; ranks drop different units.
        torch.manual_seed(derive_seed(self.args.seed, step, f"dropout {rank}" if rank else "dropout"))
        alive = [n for n in range(len(self.cells)) if n not in self.failures]
        writing = [n for n in alive if is_on_policy(self.cells[n].lmbda, self.cells[n].seed, step)]
        # The last micro-batch of an epoch may be smaller, and still must not repeat another's noise.
        stride = max((fixed.num_rows for fixed in fetched), default=0) // len(self.seeds)
        batches = []
        for position, fixed in enumerate(fetched):
            place = MicroBatchPosition(step, position, len(fetched), rank, self.args.world_size, stride)
            if len(writing) < len(alive):
                fixed = self._get_off_policy_sequences(fixed)
            written = self.sample_completions(fixed, writing, place)
            batch = build_micro_batch(self.seeds, self.cells, fixed, written, pad_id)
            batches.append(replace(batch, progress=step / max(1, self.state.max_steps - 1), step=step))
        counts = [count_trained_items(b, len(self.cells), self.args.loss_normalization) for b in batches]
        items = torch.stack(counts).sum(0).to(device) if counts else None
        if self.args.world_size > 1 and items is not None:
            # The gradient is averaged over ranks, so each divides by the mean count.
            items = self.accelerator.reduce(items, reduction="mean")
        batches = self.reward_scaler.add_reward_scales(batches, fetched, items)
        samples = [self._build_sample(batch, items, len(batches)) for batch in batches]
        # A subclass written for TRL divides by a plain number.
        return samples, items if items is None or self.pack.is_packed else items[0]

    def _build_sample(self, batch: MicroBatch, items: Any, parts: int) -> dict[str, Any]:
        """A micro-batch for `compute_loss`; of a single student also in TRL's form, for a subclass."""
        sample = {"batch": batch, "items": items, "parts": parts}
        if self.pack.is_packed or self._classes is not None:
            return sample
        return {**sample, **build_trl_batch(batch.student, is_encoder_decoder=self._is_encoder_decoder)}

    def _get_off_policy_sequences(self, fixed: Sequences) -> Sequences:
        """What those cells train on whose coin fell on the data."""
        if self.args.seq_kd:
            with self._activate_teacher():
                return self.teacher_completions.replace_completions(fixed)
        empty = int((fixed.completion_mask.sum(-1) == 0).sum())
        if empty:
            raise ValueError(
                f"{empty} of {fixed.num_rows} rows have no completion, which a step off policy trains on; set "
                "lmbda=1 to train on the student's own text alone, or seq_kd=True to let the teacher write"
            )
        return fixed

    def sample_completions(
        self,
        fixed: Sequences,
        on_policy_cells: Sequence[int],
        position: MicroBatchPosition,
        purpose: str = "sampling",
    ) -> dict[int, Sequences]:
        """What the students of the cells `writing` answer to the prompts of `fixed`, cell -> (B) rows."""
        if self._vllm_sampler is not None and on_policy_cells:
            cell = self.cells[0]
            answers = self._vllm_sampler.write(
                fixed,
                max_new_tokens=self.generation_limits.max_new_tokens,
                temperature=cell.temperature,
                step=position.step,
                seed=cell.seed,
                purpose=purpose,
            )
            return {0: answers}
        prompts = dict(zip(self.seeds, split_blocks(fixed, len(self.seeds)), strict=True))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        # Outside of the model's own autocast, so that weights which one token has cast serve all others.
        with self._use_float32_attention(), self.accelerator.autocast():
            return sample_student_completions(
                self.pack,
                self.cells,
                on_policy_cells,
                prompts,
                position,
                self.generation_limits,
                purpose,
                dtype,
            )

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """The Trainer's, backward pass included."""
        with self._use_float32_attention():
            return super().training_step(*args, **options)

    def _use_float32_attention(self) -> Any:
        return upcast_cpu_attention(
            self.args.device.type == "cpu" and self.accelerator.mixed_precision in ("bf16", "fp16")
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum of the cells' losses: their gradients do not meet, so each cell gets its own.

        `inputs` are a micro-batch of `get_batch_samples`, or what a data collator makes; the loss of the
        latter is off policy and divided by `num_items_in_batch`, or by its own tokens or sequences.
        """
        ours = "batch" in inputs
        if ours:
            batch, items, parts = inputs["batch"], inputs["items"], inputs["parts"]
        else:
            batch, items = self._build_off_policy_batch(self.parse_batch(inputs))
            items, parts = items if num_items_in_batch is None else items * 0 + num_items_in_batch, 1
        sums, extra = self.compute_cell_sums(model, batch, items)
        if ours:
            self._record_losses(sums, batch)
            if self.args.log_term_gradients and (self.state.global_step + 1) % self.state.logging_steps == 0:
                losses = partial(self._compute_losses_per_cell, model, items)
                self._term_norms = term_gradient_norms(self.pack, self.cells, losses, batch)
        total = torch.where(self._mask_running_cells(sums.losses.device), sums.losses, 0).sum()
        if extra is not None:
            total = total + extra / parts
        return (total, {"losses": sums.losses}) if return_outputs else total

    def term_gradients(self, inputs: dict[str, Any]) -> list[dict[str, float]]:
        """For each cell name of a term -> norm of its gradient by the student's weights, its weight included.

        `inputs` as for `compute_loss`; nothing learns from it, and nothing is logged.
        """
        if "batch" in inputs:
            batch, items = inputs["batch"], inputs["items"]
        else:
            batch, items = self._build_off_policy_batch(self.parse_batch(inputs))
        return term_gradient_norms(
            self.pack, self.cells, partial(self._compute_losses_per_cell, self.model, items), batch
        )

    def _compute_losses_per_cell(self, model: nn.Module, items: Tensor, batch: MicroBatch) -> Tensor:
        return self.compute_cell_sums(model, batch, items)[0].losses

    def parse_batch(self, batch: Mapping[str, Any]) -> Sequences:
        if self._classes is not None:
            return self._classes.parse_batch(batch)
        return parse_collated_batch(
            batch, self.generation_limits.pad_id, is_encoder_decoder=self._is_encoder_decoder
        )

    def _build_off_policy_batch(self, fixed: Sequences) -> tuple[MicroBatch, Tensor]:
        """Every cell on the same fixed rows, and the items of these rows alone."""
        copies = concatenate_blocks([fixed] * len(self.seeds), self.generation_limits.pad_id)
        batch = build_micro_batch(self.seeds, self.cells, copies, {}, self.generation_limits.pad_id)
        return batch, count_trained_items(batch, len(self.cells), self.args.loss_normalization)

    def compute_cell_sums(
        self, model: nn.Module, batch: MicroBatch, items: Tensor
    ) -> tuple[CellLosses, Tensor | None]:
        """Losses and entropies of the cells, and the load-balancing loss of a mixture of experts."""
        with ExitStack() as at_work:
            said = self._compute_teacher_outputs(batch, at_work)
            compare = partial(self._compute_losses, said=said, items=items)
            *sums, extra = run_inside_forward(model, self.pack.model, compare, batch)
        return CellLosses(*sums), extra

    def _compute_teacher_outputs(self, batch: MicroBatch, at_work: ExitStack) -> dict[int, TeacherOutput]:
        """What the teachers make of the step's rows, by number.

        Until `at_work` ends, what the loss still reads stays on the device: a single teacher, or the heads of
        several, which come to the device one after another.
        """
        asked = required_teachers(cell.list_terms() for cell in self.cells)
        if len(asked) == 1:
            teacher = self.teachers[asked[0]]
            at_work.enter_context(teacher.activate())
            return {asked[0]: self._compute_teacher_output(asked[0], batch)}
        found = {}
        for number in asked:
            with self.teachers[number].activate():
                found[number] = self._compute_teacher_output(number, batch)
        for number in asked:
            at_work.enter_context(self.teachers[number].activate_head())
        return found

    def _compute_teacher_output(self, number: int, batch: MicroBatch) -> TeacherOutput:
        modules = self.auxiliary_modules
        asks = modules.required_outputs if number == 0 and modules.reads_teacher else ()
        return self.teachers[number].compute_output(batch, asks)

    def _compute_losses(
        self, batch: MicroBatch, said: Mapping[int, TeacherOutput], items: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A plain tuple: ZeRO-3 gathers the head for the backward pass only if it finds the loss in it."""
        own = self.student_head.compute_unprojected(batch.student, self.auxiliary_modules.required_outputs)
        normalization = self.args.loss_normalization
        guides = {number: one.logits for number, one in said.items()}
        sums = compute_step_losses(own, guides, batch, self.cells, items, normalization, self.vocabulary_size)
        if self.auxiliary_modules:
            weights = cell_token_weights(batch, len(self.cells), items, normalization)
            states = said[0].forward_output if 0 in said else None
            sums = sums.add_terms(self.auxiliary_modules.compute_terms(own, states, batch, weights))
        return sums.losses, sums.entropies, sums.terms, own.aux_loss

    def _activate_teacher(self) -> Any:
        return self.teachers[0].activate()

    def _get_extra_metrics(self, cell: int) -> dict[str, float]:
        norms = self._term_norms[cell] if self._term_norms else {}
        return self.auxiliary_modules.collect_logs(cell) | {
            f"grad_norm/{name}": norm for name, norm in norms.items()
        }

    def _save_extra_state(self, cell: int, folder: Path) -> None:
        self.auxiliary_modules.save_cell(cell, folder)

    def _load_extra_state(self, cell: int, folder: Path) -> None:
        self.auxiliary_modules.load_cell(cell, folder)

    def _record_losses(self, sums: CellLosses, batch: MicroBatch) -> None:
        losses = sums.losses.detach()
        wrong = ~losses.isfinite()
        # What one process finds ends the cell in all of them, which otherwise would wait for it.
        anywhere = wrong if self.args.world_size == 1 else self._sum_over_ranks(wrong.double()) > 0
        for n in anywhere.nonzero().flatten().tolist():
            self._fail_cell(
                n, f"the loss is {losses[n].item()}" + ("" if wrong[n] else " here, elsewhere no number")
            )
        self.metrics.add_micro_batch(losses, sums.entropies, batch, self.generation_limits.end_ids)
        self.metrics.add_term_losses(sums.terms)

    # ---- evaluation: the loss on fixed data, and on the students' own text if asked ----

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Adds what the students wrote themselves to the metrics, where `args.eval_on_policy` says so."""
        self._on_policy_metrics, self._n_evaluated_batches = MetricAccumulator(len(self.cells)), 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._on_policy_metrics.n_batches:
            rows = self._on_policy_metrics.pop_means(self._average_over_ranks)
            kept = [row for n, row in enumerate(rows) if n not in self.failures]
            for name in ("loss", "completion_length", "truncated", "entropy"):
                mean = sum(row[name] for row in kept) / len(kept)
                output.metrics[f"{metric_key_prefix}_on_policy_{name}"] = mean
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Mean over the cells of the loss on the data's own targets; logits and labels as TRL lays them out.

        A batch without any target has the loss NaN.
        """
        fixed = self.parse_batch(self._prepare_inputs(inputs))
        batch, items = self._build_off_policy_batch(fixed)
        with torch.no_grad(), eval_mode(self.pack.model), self._use_float32_attention():
            sums, _ = self.compute_cell_sums(model, batch, items)
            losses = torch.where(items.to(sums.losses.device) > 0, sums.losses, torch.nan)
            loss = losses[self._mask_running_cells(losses.device)].mean()
            if self.args.eval_on_policy:
                self._evaluate_on_policy(model, fixed)
            if prediction_loss_only or self.pack.is_packed:
                return loss, None, None
            if self._classes is not None:
                return loss, *self._classes.compute_logits_and_labels(model, fixed)
            return loss, *trl_compat.compute_logits_and_labels(model, fixed, self._is_encoder_decoder)

    def _evaluate_on_policy(self, model: nn.Module, fixed: Sequences) -> None:
        purpose = f"evaluation {self._n_evaluated_batches}"
        self._n_evaluated_batches += 1
        everyone = range(len(self.cells))
        copies = concatenate_blocks([fixed] * len(self.seeds), self.generation_limits.pad_id)
        rank, world = self.args.process_index, self.args.world_size
        place = MicroBatchPosition(self.state.global_step, 0, 1, rank, world, fixed.num_rows)
        written = self.sample_completions(copies, everyone, place, purpose)
        batch = self.reward_scaler.remove_rewards(
            build_micro_batch(self.seeds, self.cells, copies, written, self.generation_limits.pad_id)
        )
        items = count_trained_items(batch, len(self.cells), self.args.loss_normalization)
        sums, _ = self.compute_cell_sums(model, batch, items)
        self._on_policy_metrics.add_micro_batch(
            sums.losses, sums.entropies, batch, self.generation_limits.end_ids
        )


def _load_student(model: Any, args: GKDConfig) -> PreTrainedModel:
    if model is None:
        raise ValueError("give the student as `model`, or several of them as `pack`")
    return load_student(model, init_kwargs=args.model_init_kwargs, trust_remote_code=args.trust_remote_code)
