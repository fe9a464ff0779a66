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

from gkd_lab.encoding.batches import Collator, FollowEpochs, KeyedBatches
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.encoding.trl_batch import as_sequences, in_form_of_trl
from gkd_lab.losses.attentions import give_maps
from gkd_lab.losses.auxiliary_modules import StepModules, StepOwn
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.fused_loss import CellSums
from gkd_lab.losses.policy_gradient import Hooks, Ranks, Rewards
from gkd_lab.losses.step_loss import (
    StepBatch,
    blocks,
    cell_sums,
    cell_weights,
    joined,
    step_batch,
    trained_items,
)
from gkd_lab.losses.term_gradients import term_norms
from gkd_lab.losses.terms import asked_for, reads_texts, teachers_read
from gkd_lab.models.attention import attention_in_float32
from gkd_lab.models.forward import Sequences, evaluating, unwrapped
from gkd_lab.models.heads import Head
from gkd_lab.models.loading import load_student
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import is_on_policy, key
from gkd_lab.models.sharding import place_student
from gkd_lab.teachers.cached_teachers import TeacherSource
from gkd_lab.teachers.load_teachers import GivenTeachers
from gkd_lab.teachers.teacher import LiveTeacher, Said, Teacher, check_routes, check_teachers, inside
from gkd_lab.teachers.teacher_prompts import Prompts, PromptsOfRows
from gkd_lab.teachers.text_teacher import TextTeacher
from gkd_lab.training import setup, trl_compat
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.classification_adapter import classification_of
from gkd_lab.training.metric_accumulator import Averages
from gkd_lab.training.pack_trainer import CellLog, PackTrainer, of_the_only_cell
from gkd_lab.training.rollout import Limits, Place, TeacherText, write_with_generate
from gkd_lab.training.sampling import end_ids, sampling_config


class GKDTrainer(PackTrainer):
    """Distils `teacher_model` into one student, or into the K students of a `pack`.

    The first thirteen arguments are those of TRL's GKDTrainer.

    Args:
        model: The student, or its name; or leave it out and give `pack`.
        teacher_model: The teacher, or its name; frozen here. Or a `TeacherSource`, such as scores that were
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

    lmbda = of_the_only_cell("lmbda")
    beta = of_the_only_cell("beta")
    temperature = of_the_only_cell("temperature")
    generalized_jsd_loss = staticmethod(trl_compat.generalized_jsd_loss)
    generate_on_policy_outputs = staticmethod(trl_compat.generate_on_policy_outputs)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | TeacherSource | str | None = None,
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
        teacher_prompts: Prompts | None = None,
        pack: Pack | None = None,
        cells: Sequence[CellArguments] | None = None,
        log_cell: CellLog | None = None,
        on_failure: Callable[[int, str], None] | None = None,
        tokenizer: Any = None,
    ) -> None:
        unstated = args is None
        args = setup.arguments(args, model)
        student = pack.model if pack is not None else _student(model, args)
        self._tokenizer = setup.tokenizer_for(processing_class, tokenizer, student, args)
        given = GivenTeachers.of(
            teacher_model,
            more_teachers,
            student,
            cells or [CellArguments.of(args)],
            args,
            tokenizer=teacher_processing_class,
            of_student=self._tokenizer,
            is_copy=teacher_model in (None, model) and not args.teacher_model_name_or_path,
        )
        self._classes = classification_of(
            student, given.with_tokenizers(), self._tokenizer, args, unstated=unstated
        )
        # Of a classifier the arguments that nobody stated are others from here on.
        cells = cells or [CellArguments.of(args)]
        if self._classes is None:
            compared = teachers_read(cell.terms() for cell in cells) + [0] * args.seq_kd
            self._vocabulary = given.vocabulary(student, self._tokenizer, compared)
        else:
            self._vocabulary = len(self._classes.names)
        pack = pack if pack is not None else Pack.alone(setup.adapted(student, peft_config, args))
        if args.disable_dropout:
            setup.disable_dropout(pack.model)
        self._is_encoder_decoder = bool(student.config.is_encoder_decoder)
        writes = self._classes is None
        ends = end_ids(student, self._tokenizer) if writes else torch.tensor([], dtype=torch.long)
        self._encode = RowEncoder(
            self._tokenizer,
            end_ids=ends.tolist(),
            is_encoder_decoder=self._is_encoder_decoder,
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            formatting_func=formatting_func,
        )
        pad_id = self._tokenizer.pad_token_id
        prompts = self._prompts_of(cells, given, args, teacher_prompts)
        if prompts is not None and not hasattr(train_dataset, "__len__"):
            setup.check_every_process_collates(args)
        collator: Any = Collator(prompts or self._encode, pad_id, self._is_encoder_decoder)
        if self._classes is not None:
            cells = self._classes.cells(cells)
            collator = self._classes.collator(cells, args, formatting_func)
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
        self._limits = Limits(args.max_new_tokens, ends, pad_id, self._vocabulary)
        self._place_models(given)
        self._start_terms(given, prompts)
        self._start_writers()
        self._own_text = Averages(len(self.cells))
        self._evaluated = 0
        self._term_norms: list[dict[str, float]] = []
        self._epochs = FollowEpochs()
        self.add_callback(self._epochs)

    def _place_models(self, given: GivenTeachers) -> None:
        """Student and teachers where the run needs them."""
        self._student_head = Head(self.pack.model)
        self._teachers = given.placed(self.accelerator, parked=self.args.park_teacher)
        self.model = place_student(self.pack.model, self.accelerator)
        live = self._teachers[0] if isinstance(self._teachers[0], LiveTeacher) else None
        self.teacher_model: Any = live and live.model
        self._teacher_head: Any = live and live.head
        if self._classes is not None:
            self._classes.align(self._teachers)
        check_teachers(self._teachers, teachers_read(cell.terms() for cell in self.cells))

    def _start_terms(self, given: GivenTeachers, prompts: PromptsOfRows | None) -> None:
        """What the loss's terms need besides logits."""
        self._start_step_modules()
        if prompts is not None:
            first, ends = self._teachers[0], self._limits.end_ids.tolist()
            reader = TextTeacher(first, given.tokenizer, self._tokenizer, ends, prompts.known)
            self._modules.read_texts_with(reader)
        self._rewards = Rewards(
            self.cells,
            self._tokenizer,
            self.args.loss_normalization,
            self.accelerator.device,
            Hooks(self._fail, self._logged.add_reward),
            Ranks(self.args.world_size, self._summed_over_ranks),
        )

    def _start_writers(self) -> None:
        """What lets the student, and the teacher in its place, write. A classifier writes nothing."""
        args, limits, first = self.args, self._limits, self.cells[0]
        if self._classes is None:
            self.generation_config = sampling_config(
                self.pack.model, limits.end_ids, limits.pad_id, args.max_new_tokens, args.temperature
            )
        if args.seq_kd and len({(cell.seed, cell.temperature) for cell in self.cells}) > 1:
            raise ValueError(
                "seq_kd=True writes one text for a prompt, and the cells of the pack differ in seed or "
                "temperature: run them alone (`--pack off`)"
            )
        # A source writes nothing, and seq_kd is refused with it.
        writer: Any = self._teacher_head and self._teacher_head.model
        self._teacher_text = TeacherText(writer, limits, first.temperature, first.seed, self._on_any_rank)
        self._vllm = self._start_vllm() if args.use_vllm else None

    def _start_vllm(self) -> Any:
        from gkd_lab.training.vllm_sampling import VllmWriter

        if self.pack.is_packed:
            raise ValueError("use_vllm serves one student: run the cells alone (`--pack off`)")
        return VllmWriter(
            self.pack.model,
            self._tokenizer,
            self.accelerator,
            self.args,
            self._limits.end_ids,
            self._vocabulary,
        )

    def _prompts_of(
        self,
        cells: Sequence[CellArguments],
        given: GivenTeachers,
        args: GKDConfig,
        known: Prompts | None,
    ) -> PromptsOfRows | None:
        """How the teacher reads prompts, where a term lets it read texts."""
        if not reads_texts(cell.terms() for cell in cells):
            return None
        if args.dataloader_num_workers:
            raise ValueError(
                "uld keeps the teacher's prompts where rows are collated: set dataloader_num_workers to 0"
            )
        return PromptsOfRows(self._encode, given.tokenizer, given.first.config, known)

    def _start_step_modules(self) -> None:
        """What the loss's terms compute besides logits, and what of it learns."""
        model = self._student_head.model
        if "attentions" in asked_for(cell.terms() for cell in self.cells):
            for head in (self._student_head, self._teacher_head):
                if head is not None:
                    give_maps(unwrapped(head.model))
        self._modules = StepModules(
            self.cells,
            model.config,
            self._teachers[0].config,
            self.accelerator.device,
            model.dtype,
            partial(self.accelerator.reduce, reduction="mean"),
        )
        if self._modules.learn and self.args.fp16:
            raise ValueError("a term of the loss learns, which fp16's scaled gradients do not fit: use bf16")
        if self._modules.learn:
            self.add_callback(StepOwn(self._modules, self.failures))

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches of (S*B) rows in the order that each cell's seed gives; a stream keeps its own order."""
        if not hasattr(self.train_dataset, "__len__"):
            return super().get_train_dataloader()
        args = self.args
        batches = KeyedBatches(
            len(self.train_dataset),
            self._train_batch_size,
            self.seeds,
            drop_last=args.dataloader_drop_last,
            shuffled=args.train_sampling_strategy == "random",
        )
        self._epochs.batches = batches
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
        pad_id = self._limits.pad_id
        fetched = [self._sequences(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        for rows in fetched:
            check_routes((cell.terms() for cell in self.cells), rows.routes)
        step, rank = self.state.global_step, self.args.process_index
        # Dropout of this step, resumed or not; ranks drop different units.
        torch.manual_seed(key(self.args.seed, step, f"dropout {rank}" if rank else "dropout"))
        alive = [n for n in range(len(self.cells)) if n not in self.failures]
        writing = [n for n in alive if is_on_policy(self.cells[n].lmbda, self.cells[n].seed, step)]
        # The last micro-batch of an epoch may be smaller, and still must not repeat another's noise.
        stride = max((fixed.rows for fixed in fetched), default=0) // len(self.seeds)
        batches = []
        for position, fixed in enumerate(fetched):
            place = Place(step, position, len(fetched), rank, self.args.world_size, stride)
            if len(writing) < len(alive):
                fixed = self._off_policy(fixed)
            written = self._written(fixed, writing, place)
            batch = step_batch(self.seeds, self.cells, fixed, written, pad_id)
            batches.append(replace(batch, progress=step / max(1, self.state.max_steps - 1), step=step))
        counts = [trained_items(b, len(self.cells), self.args.loss_normalization) for b in batches]
        items = torch.stack(counts).sum(0).to(device) if counts else None
        if self.args.world_size > 1 and items is not None:
            # The gradient is averaged over ranks, so each divides by the mean count.
            items = self.accelerator.reduce(items, reduction="mean")
        batches = self._rewards.scaled(batches, fetched, items)
        samples = [self._sample(batch, items, len(batches)) for batch in batches]
        # A subclass written for TRL divides by a plain number.
        return samples, items if items is None or self.pack.is_packed else items[0]

    def _sample(self, batch: StepBatch, items: Any, parts: int) -> dict[str, Any]:
        """A micro-batch for `compute_loss`; of a single student also in TRL's form, for a subclass."""
        sample = {"batch": batch, "items": items, "parts": parts}
        if self.pack.is_packed or self._classes is not None:
            return sample
        return {**sample, **in_form_of_trl(batch.student, is_encoder_decoder=self._is_encoder_decoder)}

    def _off_policy(self, fixed: Sequences) -> Sequences:
        """What those cells train on whose coin fell on the data."""
        if self.args.seq_kd:
            with self._teacher_at_work():
                return self._teacher_text.in_place_of(fixed)
        empty = int((fixed.completion_mask.sum(-1) == 0).sum())
        if empty:
            raise ValueError(
                f"{empty} of {fixed.rows} rows have no completion, which a step off policy trains on; set "
                "lmbda=1 to train on the student's own text alone, or seq_kd=True to let the teacher write"
            )
        return fixed

    def _written(
        self, fixed: Sequences, writing: Sequence[int], place: Place, purpose: str = "sampling"
    ) -> dict[int, Sequences]:
        """What the students of the cells `writing` answer to the prompts of `fixed`, cell -> (B) rows."""
        if self._vllm is not None and writing:
            cell = self.cells[0]
            answers = self._vllm.write(
                fixed,
                max_new_tokens=self._limits.max_new_tokens,
                temperature=cell.temperature,
                step=place.step,
                seed=cell.seed,
                purpose=purpose,
            )
            return {0: answers}
        prompts = dict(zip(self.seeds, blocks(fixed, len(self.seeds)), strict=True))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        # Outside of the model's own autocast, so that weights which one token has cast serve all others.
        with self._attention(), self.accelerator.autocast():
            return write_with_generate(
                self.pack, self.cells, writing, prompts, place, self._limits, purpose, dtype
            )

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """The Trainer's, backward pass included."""
        with self._attention():
            return super().training_step(*args, **options)

    def _attention(self) -> Any:
        return attention_in_float32(
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
            batch, items = self._off_policy_batch(self._sequences(inputs))
            items, parts = items if num_items_in_batch is None else items * 0 + num_items_in_batch, 1
        sums, extra = self._sums(model, batch, items)
        if ours:
            self._note(sums, batch)
            if self.args.log_term_gradients and (self.state.global_step + 1) % self.state.logging_steps == 0:
                losses = partial(self._sums_of, model, items)
                self._term_norms = term_norms(self.pack, self.cells, losses, batch)
        total = torch.where(self._alive(sums.losses.device), sums.losses, 0).sum()
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
            batch, items = self._off_policy_batch(self._sequences(inputs))
        return term_norms(self.pack, self.cells, partial(self._sums_of, self.model, items), batch)

    def _sums_of(self, model: nn.Module, items: Tensor, batch: StepBatch) -> Tensor:
        return self._sums(model, batch, items)[0].losses

    def _sequences(self, batch: Mapping[str, Any]) -> Sequences:
        if self._classes is not None:
            return self._classes.sequences(batch)
        return as_sequences(batch, self._limits.pad_id, is_encoder_decoder=self._is_encoder_decoder)

    def _off_policy_batch(self, fixed: Sequences) -> tuple[StepBatch, Tensor]:
        """Every cell on the same fixed rows, and the items of these rows alone."""
        copies = joined([fixed] * len(self.seeds), self._limits.pad_id)
        batch = step_batch(self.seeds, self.cells, copies, {}, self._limits.pad_id)
        return batch, trained_items(batch, len(self.cells), self.args.loss_normalization)

    def _sums(self, model: nn.Module, batch: StepBatch, items: Tensor) -> tuple[CellSums, Tensor | None]:
        """Losses and entropies of the cells, and the load-balancing loss of a mixture of experts."""
        with ExitStack() as at_work:
            said = self._said(batch, at_work)
            compare = partial(self._compare, said=said, items=items)
            *sums, extra = inside(model, self.pack.model, compare, batch)
        return CellSums(*sums), extra

    def _said(self, batch: StepBatch, at_work: ExitStack) -> dict[int, Said]:
        """What the teachers make of the step's rows, by number.

        Until `at_work` ends, what the loss still reads stays on the device: a single teacher, or the heads of
        several, which come to the device one after another.
        """
        asked = teachers_read(cell.terms() for cell in self.cells)
        if len(asked) == 1:
            teacher = self._teachers[asked[0]]
            at_work.enter_context(teacher.at_work())
            return {asked[0]: self._says(asked[0], batch)}
        found = {}
        for number in asked:
            with self._teachers[number].at_work():
                found[number] = self._says(number, batch)
        for number in asked:
            at_work.enter_context(self._teachers[number].head_at_work())
        return found

    def _says(self, number: int, batch: StepBatch) -> Said:
        modules = self._modules
        asks = modules.asks if number == 0 and modules.reads_teacher else ()
        return self._teachers[number].says(batch, asks)

    def _compare(
        self, batch: StepBatch, said: Mapping[int, Said], items: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A plain tuple: ZeRO-3 gathers the head for the backward pass only if it finds the loss in it."""
        own = self._student_head.unprojected(batch.student, self._modules.asks)
        normalization = self.args.loss_normalization
        guides = {number: one.guide for number, one in said.items()}
        sums = cell_sums(own, guides, batch, self.cells, items, normalization, self._vocabulary)
        if self._modules:
            weights = cell_weights(batch, len(self.cells), items, normalization)
            states = said[0].states if 0 in said else None
            sums = sums.with_terms(self._modules.values(own, states, batch, weights))
        return sums.losses, sums.entropies, sums.terms, own.aux_loss

    def _teacher_at_work(self) -> Any:
        return self._teachers[0].at_work()

    def _facts(self, cell: int) -> dict[str, float]:
        norms = self._term_norms[cell] if self._term_norms else {}
        return self._modules.logged(cell) | {f"grad_norm/{name}": norm for name, norm in norms.items()}

    def _save_own(self, cell: int, folder: Path) -> None:
        self._modules.save(cell, folder)

    def _load_own(self, cell: int, folder: Path) -> None:
        self._modules.load(cell, folder)

    def _note(self, sums: CellSums, batch: StepBatch) -> None:
        losses = sums.losses.detach()
        wrong = ~losses.isfinite()
        # What one process finds ends the cell in all of them, which otherwise would wait for it.
        anywhere = wrong if self.args.world_size == 1 else self._summed_over_ranks(wrong.double()) > 0
        for n in anywhere.nonzero().flatten().tolist():
            self._fail(
                n, f"the loss is {losses[n].item()}" + ("" if wrong[n] else " here, elsewhere no number")
            )
        self._logged.add(losses, sums.entropies, batch, self._limits.end_ids)
        self._logged.add_terms(sums.terms)

    # ---- evaluation: the loss on fixed data, and on the students' own text if asked ----

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Adds what the students wrote themselves to the metrics, where `args.eval_on_policy` says so."""
        self._own_text, self._evaluated = Averages(len(self.cells)), 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._own_text.batches:
            rows = self._own_text.take(self._over_ranks)
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
        fixed = self._sequences(self._prepare_inputs(inputs))
        batch, items = self._off_policy_batch(fixed)
        with torch.no_grad(), evaluating(self.pack.model), self._attention():
            sums, _ = self._sums(model, batch, items)
            losses = torch.where(items.to(sums.losses.device) > 0, sums.losses, torch.nan)
            loss = losses[self._alive(losses.device)].mean()
            if self.args.eval_on_policy:
                self._evaluate_own_text(model, fixed)
            if prediction_loss_only or self.pack.is_packed:
                return loss, None, None
            if self._classes is not None:
                return loss, *self._classes.logits_and_labels(model, fixed)
            return loss, *trl_compat.logits_and_labels(model, fixed, self._is_encoder_decoder)

    def _evaluate_own_text(self, model: nn.Module, fixed: Sequences) -> None:
        purpose = f"evaluation {self._evaluated}"
        self._evaluated += 1
        everyone = range(len(self.cells))
        copies = joined([fixed] * len(self.seeds), self._limits.pad_id)
        rank, world = self.args.process_index, self.args.world_size
        place = Place(self.state.global_step, 0, 1, rank, world, fixed.rows)
        written = self._written(copies, everyone, place, purpose)
        batch = self._rewards.left_out(
            step_batch(self.seeds, self.cells, copies, written, self._limits.pad_id)
        )
        items = trained_items(batch, len(self.cells), self.args.loss_normalization)
        sums, _ = self._sums(model, batch, items)
        self._own_text.add(sums.losses, sums.entropies, batch, self._limits.end_ids)


def _student(model: Any, args: GKDConfig) -> PreTrainedModel:
    if model is None:
        raise ValueError("give the student as `model`, or several of them as `pack`")
    return load_student(model, init_kwargs=args.model_init_kwargs, trust_remote_code=args.trust_remote_code)
