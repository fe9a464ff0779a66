"""GKDTrainer: generalized knowledge distillation (Algorithm 1 of the paper) on transformers' Trainer.

A step in this file: `get_batch_samples` tosses the coins and samples completions, `compute_loss` runs the
teachers and computes the losses; the Trainer calls both and then updates the weights (`PackTrainer`).
Shapes: K cells, S distinct seeds, B rows of a micro-batch, C completion tokens.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.cell_losses import CellLosses
from gkd_lab.losses.policy_gradient import ProcessGroup, RewardHooks, RewardScaler
from gkd_lab.losses.step_loss import (
    MicroBatch,
    build_micro_batch,
    cell_token_weights,
    check_completions,
    compute_step_losses,
    concatenate_blocks,
    count_trained_items,
)
from gkd_lab.losses.term_gradients import term_gradient_norms
from gkd_lab.losses.terms import required_teachers
from gkd_lab.models.forward import Sequences, eval_mode
from gkd_lab.models.heads import OutputHead
from gkd_lab.models.packing import Pack
from gkd_lab.models.padding import declare_counts
from gkd_lab.models.rng import derive_seed, is_on_policy
from gkd_lab.models.sharding import place_student
from gkd_lab.teachers.cached_teachers import ModelFreeTeacher
from gkd_lab.teachers.load_teachers import TeacherInputs, TeacherSet
from gkd_lab.teachers.teacher import (
    LiveTeacher,
    Teacher,
    TeacherOutput,
    check_row_routes,
    check_teacher_numbers,
    compute_teacher_outputs,
    run_inside_forward,
)
from gkd_lab.teachers.text_teacher import TeacherPrompts
from gkd_lab.training import trl_compat
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.callbacks import AuxiliaryUpdateCallback
from gkd_lab.training.metric_accumulator import MetricAccumulator
from gkd_lab.training.pack_trainer import CellLogger, PackTrainer, build_single_cell_property
from gkd_lab.training.rollout import MicroBatchPosition, TeacherCompletions
from gkd_lab.training.sampling import build_sampling_config
from gkd_lab.training.setup import (
    StudentInputs,
    create_auxiliary_modules,
    create_student_sampler,
    prepare_training,
)


class GKDTrainer(PackTrainer):
    """Distils `teacher_model` into one student, or into the K students of a `pack`.

    The first thirteen arguments are those of TRL's GKDTrainer.

    Args:
        model: The student, or its name; or leave it out and give `pack`.
        teacher_model: The teacher, or its name; frozen here. Or a `ModelFreeTeacher`, such as cached scores.
            The base of a PEFT student, `student.get_base_model()`, teaches with the adapter off, uncopied.
            None: `args.teacher_model_name_or_path`, and without that a frozen copy of the initial student.
        args: Common to all cells.
        data_collator: Makes TRL's batches (`input_ids`, `labels`, `prompts`, ...) out of rows; None: ours.
        train_dataset: Rows with `messages`, or `prompt` and `completion`, or a prompt alone; or `Example`s.
            For a classifier: `text` (and `text_pair`), `tokens` or `input_ids`, and `label` or `labels`.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer of the student; None: the one in the model's folder.
        peft_config: Trains an adapter instead of the model.
        formatting_func: Applied to each row first.
        teacher_processing_class: The teacher's tokenizer, where it is not in the teacher's folder; it must
            be the student's, unless the teacher reads texts (the objective `uld`) and nothing else.
        more_teachers: Teachers besides the first, from number 1 on: a divergence says with which it compares.
        teacher_prompts: Prompts of `Example`s in the ids of a teacher with another tokenizer, by the
            student's ids. Prompts of other rows are encoded for both.
        pack: K students in one model.
        cells: What differs between the students of the pack.
        log_cell: Called with (cell, row) whenever the Trainer logs.
        on_failure: Called with (cell, reason) at once when a cell's loss or gradient is not finite.
        tokenizer: Deprecated name of `processing_class`.
        quantization_config: Of a student that is loaded by name, as TRL's SFTTrainer takes it.

    Attributes:
        adapter: The task, language modelling or classification.
        teachers: By number.
        student_head: Hidden states and output head of the student.
        teacher_head: The same of the teacher; None without a teacher model.
        generation_limits: Pad id, end ids, most new tokens, and V, the entries that are compared.
        auxiliary_modules: Modules of loss terms that read more than logits.
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
        quantization_config: Any = None,
    ) -> None:
        student = StudentInputs(
            model, processing_class, tokenizer, peft_config, formatting_func, pack, cells, quantization_config
        )
        teacher = TeacherInputs(teacher_model, teacher_processing_class, more_teachers, teacher_prompts)
        setup = prepare_training(args, student, teacher, train_dataset)
        self.adapter, self.generation_limits = setup.adapter, setup.adapter.limits
        options = setup.build_trainer_options(data_collator, compute_metrics)
        options |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "callbacks": callbacks}
        options |= {"optimizers": optimizers, "preprocess_logits_for_metrics": preprocess_logits_for_metrics}
        super().__init__(setup.pack, setup.adapter.cells, log_cell, on_failure, **options)
        self._place_models(setup.teachers)
        self._create_losses()
        self._create_samplers()

    # ---- setup ----

    def _place_models(self, teachers: TeacherSet) -> None:
        """Move student and teachers to their devices; set the attributes of models, heads and teachers.

        ValueError if a loss term names a teacher number that does not exist.
        """
        self.student_head = OutputHead(self.pack.model)
        self.teachers = teachers.place_teachers(
            self.pack.model, self.accelerator, parked=self.args.park_teacher
        )
        self.model = place_student(self.pack.model, self.accelerator)
        live = self.teachers[0] if isinstance(self.teachers[0], LiveTeacher) else None
        self.teacher_model: Any = live and live.model
        self.teacher_head: Any = live and live.head
        self._use_teacher_alone = nullcontext if live is None else live.use_alone
        self.adapter.reorder_teacher_labels(self.teachers)
        check_teacher_numbers(self.teachers, required_teachers(cell.list_terms() for cell in self.cells))

    def _create_losses(self) -> None:
        """Set `auxiliary_modules` (terms that read more than logits) and `reward_scaler` (reward terms)."""
        self.auxiliary_modules = create_auxiliary_modules(
            self.cells, self.student_head, self.teacher_head, self.teachers[0].config, self.accelerator
        )
        if self.auxiliary_modules.has_parameters:
            self.add_callback(AuxiliaryUpdateCallback(self.auxiliary_modules, self.failures))
        text_teacher = self.adapter.create_text_teacher(self.teachers[0])
        if text_teacher is not None:
            self.auxiliary_modules.set_text_reader(text_teacher)
        self.reward_scaler = RewardScaler(
            self.cells,
            self.processing_class,
            self.args.loss_normalization,
            self.accelerator.device,
            RewardHooks(self.fail_cell, self.metrics.add_reward),
            ProcessGroup(self.args.world_size, self.sum_over_ranks),
        )
        self._term_norms: list[dict[str, float]] = []

    def _create_samplers(self) -> None:
        """Set `student_sampler`, `teacher_completions` and `generation_config`; add the epoch callback.

        ValueError if seq_kd would need several texts for a prompt.
        """
        args, limits, first = self.args, self.generation_limits, self.cells[0]
        if self.adapter.can_generate:
            self.generation_config = build_sampling_config(
                self.pack.model, limits.end_ids, limits.pad_id, args.max_new_tokens, args.temperature
            )
        if args.seq_kd and len({(cell.seed, cell.temperature) for cell in self.cells}) > 1:
            raise ValueError(
                "seq_kd=True writes one text for a prompt, and the cells of the pack differ in seed or "
                "temperature: run them alone (`--pack off`)"
            )
        # A model-free teacher writes nothing, and seq_kd is refused with it.
        writer: Any = self.teacher_head and self.teacher_head.model
        self.teacher_completions = TeacherCompletions(
            writer, limits, first.temperature, first.seed, self.is_true_on_any_rank
        )
        self.student_sampler = create_student_sampler(
            self.pack, self.processing_class, self.accelerator, args, limits, self.use_run_precision
        )
        self.add_callback(self.epoch_callback)

    @property
    def encode_row(self) -> Callable[[Any], Any]:
        """Return the callable that encodes one dataset row for the student, to an example of token ids."""
        return self.adapter.encode_row

    # ---- Algorithm 1: coin and sampling ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Build one optimizer step: toss each cell's coin, sample; return (micro-batch dicts, item counts).

        Takes up to `num_batches` batches from the iterator and seeds the step's dropout. Counts divide the
        losses: (K,) for a pack, a scalar for one student, None without batches.
        """
        fetched = [self.adapter.parse_batch(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        for rows in fetched:
            check_row_routes((cell.list_terms() for cell in self.cells), rows.teacher_indices)
        step, rank = self.state.global_step, self.args.process_index
        # Dropout of this step, resumed or not; ranks drop different units.
        torch.manual_seed(derive_seed(self.args.seed, step, f"dropout {rank}" if rank else "dropout"))
        running = [n for n in range(len(self.cells)) if n not in self.failures]
        on_policy = [n for n in running if is_on_policy(self.cells[n].lmbda, self.cells[n].seed, step)]
        # The last micro-batch of an epoch may be smaller, and still must not repeat another's noise.
        full_rows = max((rows.num_rows for rows in fetched), default=0) // len(self.seeds)
        batches = []
        for index, rows in enumerate(fetched):
            position = MicroBatchPosition(step, index, len(fetched), rank, self.args.world_size, full_rows)
            if len(on_policy) < len(running) and self.args.seq_kd:
                rows = self._write_teacher_completions(rows)
            batches.append(self._build_micro_batch(rows, on_policy, position))
        items = self._count_step_items(batches, device)
        batches = self.reward_scaler.add_reward_scales(batches, fetched, items)
        samples = [self._build_sample(batch, items, len(batches)) for batch in batches]
        return samples, self.strategy.convert_item_count(items)

    def _write_teacher_completions(self, rows: Sequences) -> Sequences:
        """Return the rows with the teacher's completions (`seq_kd`)."""
        with self.teachers[0].activate(), self._use_teacher_alone():
            return self.teacher_completions.replace_completions(rows)

    def _build_micro_batch(
        self, rows: Sequences, on_policy: Sequence[int], position: MicroBatchPosition
    ) -> MicroBatch:
        """Return one MicroBatch of all cells: completions sampled on policy, `rows` unchanged off policy.

        Raises ValueError for rows without completion that an off-policy cell would train on.
        """
        completions = self.sample_completions(rows, on_policy, position)
        batch = build_micro_batch(self.seeds, self.cells, rows, completions, self.generation_limits.pad_id)
        if not self.args.seq_kd:
            check_completions(batch, self.failures.keys())
        return replace(batch, progress=self._compute_progress(position.step), step=position.step)

    def _compute_progress(self, step: int) -> float:
        """Return the share (0 to 1) of the steps before this one, by which the weights of terms move."""
        last_step = (self.state.max_steps or self.args.max_steps) - 1
        return min(1.0, step / last_step) if last_step > 0 else 0.0

    def sample_completions(
        self,
        rows: Sequences,
        on_policy_cells: Sequence[int],
        position: MicroBatchPosition,
        purpose: str = "sampling",
    ) -> dict[int, Sequences]:
        """Let the on-policy students complete the prompts of (S*B) rows; return cell number -> its (B) rows.

        `purpose` keys the noise, with each cell's seed and the step.
        """
        if not on_policy_cells:
            return {}
        return self.student_sampler.sample(self.cells, on_policy_cells, rows, position, purpose)

    def _count_step_items(self, batches: Sequence[MicroBatch], device: torch.device) -> Tensor | None:
        """Count each cell's trained tokens or sequences in a step, (K,), mean over ranks; None if empty."""
        if not batches:
            return None
        counts = [self._count_items(batch) for batch in batches]
        items = sum(counts[1:], counts[0]).to(device)
        # The gradient is averaged over ranks, so each divides by the mean count.
        return items if self.args.world_size == 1 else self.accelerator.reduce(items, reduction="mean")

    def _count_items(self, batch: MicroBatch) -> Tensor:
        """Count each cell's trained tokens, or sequences by loss_normalization, in a micro-batch, (K,)."""
        return count_trained_items(batch, self.args.loss_normalization)

    def _build_sample(self, batch: MicroBatch, items: Tensor | None, parts: int) -> dict[str, Any]:
        """Return the dict for `compute_loss`: batch, items, number of micro-batches, TRL's fields."""
        fields = self.strategy.build_trl_fields(self.adapter, batch.student)
        return {"batch": batch, "items": items, "parts": parts, **fields}

    # ---- Algorithm 1: teacher and loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the scalar sum of running cells' losses and router loss; or (sum, outputs) if asked for.

        `inputs` are a micro-batch of `get_batch_samples`, or what a data collator makes; the loss of the
        latter is off-policy and divided by `num_items_in_batch`, or by its own tokens or sequences.
        """
        batch, items = self._get_batch_and_items(inputs)
        is_training_sample = "batch" in inputs
        if not is_training_sample and num_items_in_batch is not None:
            items = items * 0 + num_items_in_batch
        if is_training_sample and self._is_term_gradient_step():
            # Before the step's own forward, so that the terms begin with its random state and its dropout.
            self._term_norms = self._compute_term_norms(model, batch, items)
        sums, router_loss = self.compute_cell_sums(model, batch, items)
        if is_training_sample:
            self._record_losses(sums, batch)
        finite_losses = sums.losses.nan_to_num(0.0, 0.0, 0.0)
        if self.failures:
            finite_losses = torch.where(self.mask_running_cells(finite_losses.device), finite_losses, 0)
        total = finite_losses.sum()
        if router_loss is not None:
            total = total + router_loss / inputs.get("parts", 1)
        return (total, {"losses": sums.losses}) if return_outputs else total

    def _get_batch_and_items(self, inputs: Mapping[str, Any]) -> tuple[MicroBatch, Tensor]:
        """Return a training sample's (micro-batch, item counts); a collated batch's are built off-policy."""
        if "batch" in inputs:
            return inputs["batch"], inputs["items"]
        return self._build_off_policy_batch(self.adapter.parse_batch(inputs))

    def _build_off_policy_batch(self, rows: Sequences) -> tuple[MicroBatch, Tensor]:
        """Return (micro-batch in which every cell has the same (B) rows, its item counts (K,))."""
        copies = concatenate_blocks([rows] * len(self.seeds), self.generation_limits.pad_id)
        batch = build_micro_batch(self.seeds, self.cells, copies, {}, self.generation_limits.pad_id)
        batch = replace(batch, progress=self._compute_progress(self.state.global_step))
        return batch, self._count_items(batch)

    def compute_cell_sums(
        self, model: nn.Module, batch: MicroBatch, items: Tensor
    ) -> tuple[CellLosses, Tensor | None]:
        """Run teachers and students; return (each cell's losses and entropies, router loss or None).

        The router loss is the load-balancing loss of a mixture of experts.
        """
        numbers, modules = required_teachers(cell.list_terms() for cell in self.cells), self.auxiliary_modules
        output_names = modules.required_outputs if modules.reads_teacher else ()
        with compute_teacher_outputs(self.teachers, numbers, batch, output_names) as outputs:
            compute_losses = partial(self._compute_losses, teacher_outputs=outputs, items=items)
            *sums, router_loss = run_inside_forward(model, self.pack.model, compute_losses, batch)
        return CellLosses(*sums), router_loss

    def _compute_losses(
        self, batch: MicroBatch, teacher_outputs: Mapping[int, TeacherOutput], items: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Run students, compare with teachers; return (losses, entropies, terms, router loss or None).

        A plain tuple: ZeRO-3 gathers the head for the backward pass only if it finds the loss in it.
        """
        modules, normalization = self.auxiliary_modules, self.args.loss_normalization
        with declare_counts(self.pack.model, batch.student, batch.teacher.token_counts):
            student = self.student_head.compute_unprojected(batch.student, modules.required_outputs)
        logits = {number: output.logits for number, output in teacher_outputs.items()}
        sums = compute_step_losses(
            student, logits, batch, self.cells, items, normalization, self.generation_limits.vocabulary_size
        )
        if modules:
            weights = cell_token_weights(batch, len(self.cells), items, normalization)
            teacher = teacher_outputs[0].forward_output if 0 in teacher_outputs else None
            sums = sums.add_terms(modules.compute_terms(student, teacher, batch, weights))
        return sums.losses, sums.entropies, sums.terms, student.aux_loss

    def _record_losses(self, sums: CellLosses, batch: MicroBatch) -> None:
        """Add a micro-batch to the metrics; `check_step` fails a cell whose loss is not finite."""
        losses = sums.losses.detach()
        self.note_losses(losses)
        self.metrics.add_micro_batch(losses, sums.entropies, batch, self.generation_limits.end_ids)
        self.metrics.add_term_losses(sums.terms)

    def term_gradients(self, inputs: dict[str, Any]) -> list[dict[str, float]]:
        """Return a dict for each cell: loss term name -> norm of its weighted gradient (student's weights).

        `inputs` as for `compute_loss`; nothing is updated or logged.
        """
        return self._compute_term_norms(self.model, *self._get_batch_and_items(inputs))

    def _is_term_gradient_step(self) -> bool:
        """Return whether this optimizer step logs the norms of its terms' gradients."""
        is_logged = (self.state.global_step + 1) % self.state.logging_steps == 0
        return self.args.log_term_gradients and is_logged

    def _compute_term_norms(
        self, model: nn.Module, batch: MicroBatch, items: Tensor
    ) -> list[dict[str, float]]:
        """Return a dict for each cell: loss term name -> norm of its weighted gradient; `.grad` is kept."""

        def compute_losses(term_batch: MicroBatch) -> Tensor:
            """Return the cells' losses, (K,), on a micro-batch with a single active term."""
            return self.compute_cell_sums(model, term_batch, items)[0].losses

        return term_gradient_norms(self.pack, self.cells, compute_losses, batch)

    # ---- logs and checkpoints ----

    def get_extra_metrics(self, cell: int) -> dict[str, float]:
        """Return the values that the cell's auxiliary modules log, and its terms' last `grad_norm/TERM`."""
        norms = self._term_norms[cell] if self._term_norms else {}
        return self.auxiliary_modules.collect_logs(cell) | {
            f"grad_norm/{name}": norm for name, norm in norms.items()
        }

    def save_extra_state(self, cell: int, folder: Path) -> None:
        """Write the cell's auxiliary modules and their optimizers into its checkpoint folder."""
        self.auxiliary_modules.save_cell(cell, folder)

    def load_extra_state(self, cell: int, folder: Path) -> None:
        """Load the cell's auxiliary modules and their optimizers from its checkpoint folder."""
        self.auxiliary_modules.load_cell(cell, folder)

    # ---- evaluation: the loss on the dataset, and on the students' own text if requested ----

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Run and return the Trainer's evaluation; eval_on_policy adds `eval_on_policy_NAME` to its metrics.

        These are means over the running cells: loss, completion length, truncated share and entropy on the
        students' own text.
        """
        self._on_policy_metrics, self._n_evaluated_batches = MetricAccumulator(len(self.cells)), 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._on_policy_metrics.n_batches:
            rows = self._on_policy_metrics.pop_means(self.average_over_ranks)
            running_rows = [row for n, row in enumerate(rows) if n not in self.failures]
            for name in ("loss", "completion_length", "truncated", "entropy"):
                mean = sum(row[name] for row in running_rows) / len(running_rows)
                output.metrics[f"{metric_key_prefix}_on_policy_{name}"] = mean
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (running cells' mean off-policy loss, logits, labels); the latter are None for a pack.

        A batch without any trained token has the loss NaN. Logits and labels are in TRL's layout, and None
        with prediction_loss_only.
        """
        rows = self.adapter.parse_batch(self._prepare_inputs(inputs))
        batch, items = self._build_off_policy_batch(rows)
        with torch.no_grad(), eval_mode(self.pack.model), self.use_float32_attention():
            sums, _ = self.compute_cell_sums(model, batch, items)
            losses = torch.where(items.to(sums.losses.device) > 0, sums.losses, torch.nan)
            loss = losses[self.mask_running_cells(losses.device)].mean()
            if self.args.eval_on_policy:
                self._evaluate_on_policy(model, rows)
            if prediction_loss_only:
                return loss, None, None
            return loss, *self.strategy.compute_predictions(self.adapter, model, rows)

    def _evaluate_on_policy(self, model: nn.Module, rows: Sequences) -> None:
        """Let all students complete the prompts; add the losses, without rewards, to on-policy metrics."""
        purpose, limits = f"evaluation {self._n_evaluated_batches}", self.generation_limits
        self._n_evaluated_batches += 1
        copies = concatenate_blocks([rows] * len(self.seeds), limits.pad_id)
        position = MicroBatchPosition(
            self.state.global_step, 0, 1, self.args.process_index, self.args.world_size, rows.num_rows
        )
        completions = self.sample_completions(copies, range(len(self.cells)), position, purpose)
        batch = build_micro_batch(self.seeds, self.cells, copies, completions, limits.pad_id)
        batch = replace(batch, progress=self._compute_progress(self.state.global_step))
        batch = self.reward_scaler.zero_reward_scales(batch)
        sums, _ = self.compute_cell_sums(model, batch, self._count_items(batch))
        self._on_policy_metrics.add_micro_batch(sums.losses, sums.entropies, batch, limits.end_ids)
