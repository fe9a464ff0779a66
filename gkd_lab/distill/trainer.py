"""Generalized knowledge distillation of K cells at once: Algorithm 1 of the paper on transformers' Trainer.

K = 1 with a plain model is a pack of one; nothing here asks which. Shapes: K cells, S distinct seeds,
B rows of a micro-batch, C completion tokens.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from gkd_lab.distill import checkpoints
from gkd_lab.distill.averages import Averages
from gkd_lab.distill.batches import Example, KeyedBatches, collate, encode
from gkd_lab.distill.config import CellArguments, GKDConfig, shared_seeds
from gkd_lab.distill.sampling import end_ids, evaluating, write
from gkd_lab.distill.steps import StepBatch, blocks, cell_losses, joined, step_batch, trained_items
from gkd_lab.distill.streams import is_on_policy, key, uniforms
from gkd_lab.models.forward import Sequences, completion_logits
from gkd_lab.models.packing import Pack

CellLog = Callable[[int, dict[str, float]], None]


class AllCellsFailed(FloatingPointError):
    """No cell is left to train; `GKDTrainer.failures` says why for each."""


class GKDTrainer(Trainer):
    """Distils `teacher_model` into one student, or into the K students of a `pack`.

    Args:
        model: The student; or leave it out and give `pack`.
        teacher_model: Frozen here. Its vocabulary must be the student's.
        args: Common to all cells.
        train_dataset: `Example`s, or rows with the texts `prompt` and `completion`.
        processing_class: The tokenizer of both models.
        pack, cells: K students in one model, and what differs between them.
        log_cell: Called with (cell, row) whenever the Trainer logs.
        on_failure: Called with (cell, why) at once when a cell's loss or gradient is no number.
    """

    optimizer: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | None = None,
        args: GKDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        pack: Pack | None = None,
        cells: Sequence[CellArguments] | None = None,
        log_cell: CellLog | None = None,
        on_failure: Callable[[int, str], None] | None = None,
    ) -> None:
        if args is None:
            args = GKDConfig(output_dir="gkd_output")
        if pack is None:
            if model is None:
                raise ValueError("give the student as `model`, or several of them as `pack`")
            pack = Pack.alone(model)
        if args.seq_kd:
            raise ValueError("seq_kd is not built yet: train on the teacher's text as `completion` instead")
        if teacher_model is None:
            raise ValueError("give the teacher as `teacher_model`")
        _check_vocabularies(pack.model, teacher_model)
        self.pack = pack
        self.cells = tuple(cells or [CellArguments.of(args)])
        if len(self.cells) != pack.size:
            raise ValueError(f"{len(self.cells)} cells for a pack of {pack.size} models")
        self.seeds = shared_seeds(self.cells)
        self.log_cell = log_cell
        self.on_failure = on_failure
        self.failures: dict[int, str] = {}
        self._tokenizer = processing_class
        self._logged = Averages(len(self.cells))
        self._views: list[dict[str, nn.Parameter]] = []
        args.remove_unused_columns = False
        if args.disable_dropout:
            _disable_dropout(pack.model)
        super().__init__(
            model=pack.model,
            args=args,
            data_collator=self._collate,
            train_dataset=self._examples(train_dataset, args.max_length),
            eval_dataset=self._examples(eval_dataset, args.max_length),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Our losses are divided by the whole step's items, whatever the number of micro-batches.
        self.loss_is_scaled_for_ga = True
        self.teacher = teacher_model.to(args.device).eval().requires_grad_(False)
        self._end_ids = end_ids(pack.model, processing_class)

    # ---- data ----

    def _examples(self, dataset: Any, limit: int | None) -> list[Example] | None:
        """Token ids of a data set of texts; prompt and target are cut at `limit` tokens each."""
        if dataset is None or (len(dataset) and isinstance(dataset[0], Example)):
            return dataset
        examples, _ = encode(
            self._tokenizer,
            [(row["prompt"], row["completion"]) for row in dataset],
            is_encoder_decoder=self.pack.model.config.is_encoder_decoder,
            max_input_tokens=limit or sys.maxsize,
            max_output_tokens=limit or sys.maxsize,
        )
        return examples

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        encoder_decoder = self.pack.model.config.is_encoder_decoder
        pad_id = self._tokenizer.pad_token_id
        return vars(collate(examples, pad_id, is_encoder_decoder=encoder_decoder))

    def get_train_dataloader(self) -> DataLoader:
        """Batches of (S*B) rows in the order that each cell's seed gives."""
        batches = KeyedBatches(len(self.train_dataset), self.args.per_device_train_batch_size, self.seeds)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    # ---- one step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """All micro-batches of one optimizer step: toss the coin, let students write, count items."""
        fetched = [Sequences(**batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        step = self.state.global_step
        torch.manual_seed(key(self.args.seed, step, "dropout"))  # dropout of this step, resumed or not
        writing = [
            n
            for n, cell in enumerate(self.cells)
            if n not in self.failures and is_on_policy(cell.lmbda, cell.seed, step)
        ]
        pad_id = self._tokenizer.pad_token_id
        batches = []
        for position, fixed in enumerate(fetched):
            written = self._written(fixed, writing, step, position, len(fetched))
            batches.append(step_batch(self.seeds, self.cells, fixed, written, pad_id))
        counts = [trained_items(b, len(self.cells), self.args.loss_normalization) for b in batches]
        items = torch.stack(counts).sum(0).to(device)
        if self.args.world_size > 1:
            # The gradient is averaged over ranks, so each divides by the mean count.
            items = self.accelerator.reduce(items, reduction="mean")
        return [{"batch": batch, "items": items} for batch in batches], items

    def _written(
        self, fixed: Sequences, writing: list[int], step: int, position: int, batches: int
    ) -> dict[int, Sequences]:
        """What the students of the cells `writing` answer to the prompts of `fixed`, cell -> (B) rows."""
        if not writing:
            return {}
        prompts = dict(zip(self.seeds, blocks(fixed, len(self.seeds)), strict=True))
        of_cells = [prompts[self.cells[n].seed] for n in writing]
        rows = of_cells[0].rows
        world, limit = self.args.world_size, self.args.max_new_tokens
        first = (position * world + self.args.process_index) * rows
        noise = {
            seed: uniforms(seed, step, "sampling", batches * world * rows, limit)
            for seed in {self.cells[n].seed for n in writing}
        }
        drawn = torch.cat([noise[self.cells[n].seed][first : first + rows] for n in writing])
        temperature = torch.tensor([self.cells[n].temperature for n in writing])
        pad_id = self._tokenizer.pad_token_id
        with self.pack.only(writing) as model, self.compute_loss_context_manager():
            answers = write(
                model,
                joined(of_cells, pad_id),
                max_new_tokens=limit,
                end_ids=self._end_ids,
                pad_id=pad_id,
                uniforms=drawn,
                temperature=temperature.repeat_interleave(rows)[:, None],
            )
        return dict(zip(writing, blocks(answers, len(writing)), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum of the cells' losses: their gradients do not meet, so each cell gets its own."""
        batch, items = inputs["batch"], inputs["items"]
        student = completion_logits(model, batch.student)
        with torch.no_grad():
            teacher = completion_logits(self.teacher, batch.teacher)
        losses = cell_losses(student, teacher, batch, self.cells, items, self.args.loss_normalization)
        self._note_losses(losses.detach(), batch)
        alive = self._alive(losses.device)
        total = torch.where(alive, losses, 0).sum()
        return (total, {"losses": losses}) if return_outputs else total

    def _alive(self, device: torch.device) -> Tensor:
        return torch.tensor([n not in self.failures for n in range(len(self.cells))], device=device)

    def _note_losses(self, losses: Tensor, batch: StepBatch) -> None:
        for n in (~losses.isfinite()).nonzero().flatten().tolist():
            self._fail(n, f"the loss is {losses[n].item()}")
        self._logged.add_losses(losses, batch, self._end_ids.to(losses.device))

    def _fail(self, cell: int, why: str) -> None:
        """Freeze a cell; its neighbours go on."""
        if cell not in self.failures:
            self.failures[cell] = f"{why} at step {self.state.global_step + 1}"
            if self.on_failure is not None:
                self.on_failure(cell, self.failures[cell])
        if len(self.failures) == len(self.cells):
            raise AllCellsFailed("; ".join(sorted(set(self.failures.values()))))

    # ---- optimizer: one parameter group a cell, on views of the pack's weights ----

    def create_optimizer(self, model: Any = None) -> Any:
        """A packed model's optimizer sees each cell's weights in their own shapes, one group a cell."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if not self.pack.is_packed:
            optimizer = super().create_optimizer(model)
            for group in optimizer.param_groups:
                group["lr"] = self.cells[0].learning_rate
            return optimizer
        self._views = [
            {name: nn.Parameter(view) for name, view in self.pack.parameters_of(n).items()}
            for n in range(self.pack.size)
        ]
        decayed = set(self.get_decay_parameter_names(self.pack.unpack(0)))
        groups = []
        for cell, views in zip(self.cells, self._views, strict=True):
            for decays in (True, False):
                parameters = [view for name, view in views.items() if (name in decayed) == decays]
                decay = self.args.weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": cell.learning_rate, "weight_decay": decay})
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clipping is per cell and is done where the norms are taken."""
        return None if self.pack.is_packed else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if not self.pack.is_packed:
            norm = super()._get_grad_norm(model, grad_norm)
            self._logged.add_norms(torch.as_tensor(norm, dtype=torch.float64).reshape(1))
            return norm
        norms = self._clip_each_cell()
        self._logged.add_norms(norms)
        return norms[self._alive(norms.device)].mean()

    def _clip_each_cell(self) -> Tensor:
        """Norm of each cell's gradient before clipping, (K,); hands the clipped ones to the optimizer."""
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        squares = torch.stack([g.flatten(1).square().sum(1) for _, g in named])
        norms = squares.sum(0).sqrt()
        for n in (~norms.isfinite()).nonzero().flatten().tolist():
            self._fail(n, f"the gradient's norm is {norms[n].item()}")
        limit = self.args.max_grad_norm
        if limit and limit > 0:
            scale = (limit / (norms + 1e-6)).clamp_max(1)
            for _, g in named:
                g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
        for n, views in enumerate(self._views):
            for name, gradient in named:
                views[name].grad = None if n in self.failures else gradient[n]
        return norms

    # ---- logs and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's own log, and a row for each cell; a single cell's row is part of the log."""
        if "loss" in logs and self._logged.steps:
            rows = self._logged.take()
            for n, (cell, row) in enumerate(zip(self.cells, rows, strict=True)):
                factor = logs["learning_rate"] / (self.cells[0].learning_rate or 1)
                row["learning_rate"] = cell.learning_rate * factor
                if self.log_cell is not None and n not in self.failures:
                    self.log_cell(n, {"step": self.state.global_step, **row})
            if len(rows) == 1:
                logs = {**rows[0], **logs}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Each cell's own folder, all of them before any older one goes."""
        if not self.pack.is_packed:
            super()._save_checkpoint(model, trial)
            return
        step = self.state.global_step
        for n, cell in enumerate(self.cells):
            if n in self.failures:
                continue
            with checkpoints.appearing(checkpoints.folder_of(cell.output_dir, step)) as folder:
                checkpoints.save(folder, self.pack.parameters_of(n), self._views[n], self.optimizer)
                self.state.save_to_json(str(folder / "trainer_state.json"))
        for cell in self.cells:
            checkpoints.keep_only(cell.output_dir, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.pack.is_packed:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        for n, folder in self._folders_like(resume_from_checkpoint):
            self.pack.load(n, checkpoints.weights(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.pack.is_packed:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            for n, folder in self._folders_like(checkpoint):
                checkpoints.load_optimizer(folder, self._views[n], self.optimizer)
            checkpoints.set_schedule(self.lr_scheduler, self.optimizer, self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: random choices are keyed by the step, and a stored state would replace its dropout."""

    def _folders_like(self, checkpoint: str) -> Iterator[tuple[int, Path]]:
        step = checkpoints.step_of(Path(checkpoint))
        for n, cell in enumerate(self.cells):
            yield n, checkpoints.folder_of(cell.output_dir, step)

    # ---- evaluation: the loss on fixed data ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Mean over the cells of the loss on the data's own targets."""
        fixed = Sequences(**self._prepare_inputs(inputs))
        copies = joined([fixed] * len(self.seeds), self._tokenizer.pad_token_id)
        batch = step_batch(self.seeds, self.cells, copies, {}, self._tokenizer.pad_token_id)
        items = trained_items(batch, len(self.cells), self.args.loss_normalization)
        with torch.no_grad(), evaluating(model), self.compute_loss_context_manager():
            losses = cell_losses(
                completion_logits(model, batch.student),
                completion_logits(self.teacher, batch.teacher),
                batch,
                self.cells,
                items.to(fixed.prompt_ids.device),
                self.args.loss_normalization,
            )
        return losses[self._alive(losses.device)].mean(), None, None

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not estimated: the Trainer's rule knows neither the teacher nor the sampling."""
        return 0


def _check_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has {sizes[0]} tokens and the teacher {sizes[1]}: their distributions cannot be "
            "compared; use a pair with one tokenizer"
        )


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
