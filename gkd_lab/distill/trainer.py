"""Generalized knowledge distillation of K cells at once: Algorithm 1 of the paper on transformers' Trainer.

It takes what TRL's GKDTrainer takes. K = 1 with a plain model is a pack of one; nothing here asks which.
Shapes: K cells, S distinct seeds, B rows of a micro-batch, C completion tokens.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection

from gkd_lab.distill import setup, trl_form
from gkd_lab.distill.averages import Averages
from gkd_lab.distill.batches import Collator, FollowEpochs, KeyedBatches
from gkd_lab.distill.chunked import CellSums
from gkd_lab.distill.collated import as_sequences, in_form_of_trl
from gkd_lab.distill.config import CellArguments, GKDConfig
from gkd_lab.distill.objectives import reads_teacher
from gkd_lab.distill.pack_trainer import CellLog, PackTrainer, of_the_only_cell
from gkd_lab.distill.reading import Reader
from gkd_lab.distill.rollout import Limits, Place, TeacherText, write_with_generate
from gkd_lab.distill.rows import RowEncoder
from gkd_lab.distill.sampling import end_ids, sampling_config
from gkd_lab.distill.steps import StepBatch, blocks, cell_sums, joined, step_batch, trained_items
from gkd_lab.distill.streams import is_on_policy, key
from gkd_lab.models.attention import attention_in_float32
from gkd_lab.models.forward import Sequences, evaluating
from gkd_lab.models.heads import Head, Unprojected
from gkd_lab.models.packing import Pack
from gkd_lab.models.sharding import place_student, place_teacher
from gkd_lab.models.teachers import at_work, load_student, load_teacher
from gkd_lab.models.vocabulary import shared_vocabulary, tokenizer_of


class GKDTrainer(PackTrainer):
    """Distils `teacher_model` into one student, or into the K students of a `pack`.

    The first thirteen arguments are those of TRL's GKDTrainer.

    Args:
        model: The student, or its name; or leave it out and give `pack`.
        teacher_model: The teacher, or its name; frozen here. None: `args.teacher_model_name_or_path`, and
            without that a frozen copy of the student as it starts.
        args: Common to all cells.
        data_collator: Makes TRL's batches (`input_ids`, `labels`, `prompts`, ...) out of rows; None: ours.
        train_dataset: Rows with `messages`, or `prompt` and `completion`, or a prompt alone; or `Example`s.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer of the student; None: the one in the model's folder.
        peft_config: Trains an adapter instead of the model.
        formatting_func: Applied to each row first.
        teacher_processing_class: The teacher's tokenizer, where it is not in the teacher's folder; it must
            be the student's.
        pack, cells: K students in one model, and what differs between them.
        log_cell: Called with (cell, row) whenever the Trainer logs.
        on_failure: Called with (cell, why) at once when a cell's loss or gradient is no number.
        tokenizer: Deprecated name of `processing_class`.
    """

    lmbda = of_the_only_cell("lmbda")
    beta = of_the_only_cell("beta")
    temperature = of_the_only_cell("temperature")
    generalized_jsd_loss = staticmethod(trl_form.generalized_jsd_loss)
    generate_on_policy_outputs = staticmethod(trl_form.generate_on_policy_outputs)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
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
        pack: Pack | None = None,
        cells: Sequence[CellArguments] | None = None,
        log_cell: CellLog | None = None,
        on_failure: Callable[[int, str], None] | None = None,
        tokenizer: Any = None,
    ) -> None:
        args = setup.arguments(args, model)
        student = pack.model if pack is not None else _student(model, args)
        self._tokenizer = setup.tokenizer_for(processing_class, tokenizer, student, args)
        teacher = load_teacher(
            teacher_model,
            name_or_path=args.teacher_model_name_or_path,
            init_kwargs=args.teacher_model_init_kwargs,
            student=student,
            dtype=args.teacher_dtype,
            trust_remote_code=args.trust_remote_code,
        )
        copied = teacher_model in (None, model) and not args.teacher_model_name_or_path
        known = teacher_processing_class or (self._tokenizer if copied else tokenizer_of(teacher))
        self._vocabulary = shared_vocabulary(student, teacher, self._tokenizer, known)
        pack = pack if pack is not None else Pack.alone(setup.adapted(student, peft_config, args))
        if args.disable_dropout:
            setup.disable_dropout(pack.model)
        self._is_encoder_decoder = bool(student.config.is_encoder_decoder)
        ends = end_ids(student, self._tokenizer)
        self._encode = RowEncoder(
            self._tokenizer,
            end_ids=ends.tolist(),
            is_encoder_decoder=self._is_encoder_decoder,
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            formatting_func=formatting_func,
        )
        pad_id = self._tokenizer.pad_token_id
        super().__init__(
            pack,
            cells or [CellArguments.of(args)],
            log_cell,
            on_failure,
            args=args,
            data_collator=data_collator or Collator(self._encode, pad_id, self._is_encoder_decoder),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self._tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._student_head, self._teacher_head = Head(self.pack.model), Head(teacher)
        self._read = Reader(self._teacher_head)
        self.model = place_student(self.pack.model, self.accelerator)
        self.teacher_model = place_teacher(teacher, self.accelerator, parked=args.park_teacher)
        self._limits = Limits(args.max_new_tokens, ends, pad_id, self._vocabulary)
        self.generation_config = sampling_config(
            self.pack.model, ends, pad_id, args.max_new_tokens, args.temperature
        )
        first = self.cells[0]
        if args.seq_kd and len({(cell.seed, cell.temperature) for cell in self.cells}) > 1:
            raise ValueError(
                "seq_kd=True writes one text for a prompt, and the cells of the pack differ in seed or "
                "temperature: run them alone (`--pack off`)"
            )
        self._teacher_text = TeacherText(
            self._teacher_head.model, self._limits, first.temperature, first.seed, self._on_any_rank
        )
        self._vllm = self._start_vllm() if args.use_vllm else None
        self._own_text = Averages(len(self.cells))
        self._evaluated = 0
        self._epochs = FollowEpochs()
        self.add_callback(self._epochs)

    def _start_vllm(self) -> Any:
        from gkd_lab.distill.vllm import VllmWriter

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
            batches.append(replace(batch, progress=step / max(1, self.state.max_steps - 1)))
        counts = [trained_items(b, len(self.cells), self.args.loss_normalization) for b in batches]
        items = torch.stack(counts).sum(0).to(device) if counts else None
        if self.args.world_size > 1 and items is not None:
            # The gradient is averaged over ranks, so each divides by the mean count.
            items = self.accelerator.reduce(items, reduction="mean")
        samples = [self._sample(batch, items, len(batches)) for batch in batches]
        # A subclass written for TRL divides by a plain number.
        return samples, items if items is None or self.pack.is_packed else items[0]

    def _sample(self, batch: StepBatch, items: Any, parts: int) -> dict[str, Any]:
        """A micro-batch for `compute_loss`; of a single student also in TRL's form, for a subclass."""
        sample = {"batch": batch, "items": items, "parts": parts}
        if self.pack.is_packed:
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
        total = torch.where(self._alive(sums.losses.device), sums.losses, 0).sum()
        if extra is not None:
            total = total + extra / parts
        return (total, {"losses": sums.losses}) if return_outputs else total

    def _sequences(self, batch: Mapping[str, Any]) -> Sequences:
        return as_sequences(batch, self._limits.pad_id, is_encoder_decoder=self._is_encoder_decoder)

    def _off_policy_batch(self, fixed: Sequences) -> tuple[StepBatch, Tensor]:
        """Every cell on the same fixed rows, and the items of these rows alone."""
        copies = joined([fixed] * len(self.seeds), self._limits.pad_id)
        batch = step_batch(self.seeds, self.cells, copies, {}, self._limits.pad_id)
        return batch, trained_items(batch, len(self.cells), self.args.loss_normalization)

    def _sums(self, model: nn.Module, batch: StepBatch, items: Tensor) -> tuple[CellSums, Tensor | None]:
        """Losses and entropies of the cells, and the load-balancing loss of a mixture of experts."""
        asked = any(reads_teacher(cell.terms()) for cell in self.cells)
        with self._teacher_at_work() if asked else nullcontext():
            guide = self._guide(batch) if asked else None
            # Still at work: the loss reads the teacher's head.
            compare = partial(self._compare, guide=guide, items=items)
            *sums, extra = _inside(model, self.pack.model, compare, batch)
        return CellSums(*sums), extra

    def _guide(self, batch: StepBatch) -> Unprojected:
        """What the teacher makes of the step's rows."""
        with torch.no_grad(), self.accelerator.autocast():
            guide: Unprojected = _inside(self.teacher_model, self._teacher_head.model, self._read, batch)
        return guide

    def _compare(
        self, batch: StepBatch, guide: Unprojected | None, items: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A plain tuple: ZeRO-3 gathers the head for the backward pass only if it finds the loss in it."""
        own = self._student_head.unprojected(batch.student)
        sums = cell_sums(own, guide, batch, self.cells, items, self.args.loss_normalization, self._vocabulary)
        return sums.losses, sums.entropies, sums.terms, own.aux_loss

    def _teacher_at_work(self) -> Any:
        return at_work(self.teacher_model, self.args.device, parked=self.args.park_teacher)

    def _note(self, sums: CellSums, batch: StepBatch) -> None:
        losses = sums.losses.detach()
        for n in (~losses.isfinite()).nonzero().flatten().tolist():
            self._fail(n, f"the loss is {losses[n].item()}")
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
            return loss, *trl_form.logits_and_labels(model, fixed, self._is_encoder_decoder)

    def _evaluate_own_text(self, model: nn.Module, fixed: Sequences) -> None:
        purpose = f"evaluation {self._evaluated}"
        self._evaluated += 1
        everyone = range(len(self.cells))
        copies = joined([fixed] * len(self.seeds), self._limits.pad_id)
        rank, world = self.args.process_index, self.args.world_size
        place = Place(self.state.global_step, 0, 1, rank, world, fixed.rows)
        written = self._written(copies, everyone, place, purpose)
        batch = step_batch(self.seeds, self.cells, copies, written, self._limits.pad_id)
        items = trained_items(batch, len(self.cells), self.args.loss_normalization)
        sums, _ = self._sums(model, batch, items)
        self._own_text.add(sums.losses, sums.entropies, batch, self._limits.end_ids)


def _student(model: Any, args: GKDConfig) -> PreTrainedModel:
    if model is None:
        raise ValueError("give the student as `model`, or several of them as `pack`")
    return load_student(model, init_kwargs=args.model_init_kwargs, trust_remote_code=args.trust_remote_code)


def _inside(wrapped: nn.Module, inner: nn.Module, method: Callable[..., Any], argument: Any) -> Any:
    """Run `method` within the forward pass of `wrapped`, where DDP and FSDP have the weights at hand."""
    if wrapped is inner and not isinstance(inner, FSDPModule):
        return method(argument)
    return _ForwardRedirection()(wrapped, inner, method, argument)
