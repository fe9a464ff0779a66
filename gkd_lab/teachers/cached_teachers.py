"""Teachers without a model in this process: cached logits of fixed text, or a server.

Shapes: M blocks of B rows, C completion tokens, k named tokens of each distribution.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import MicroBatch
from gkd_lab.losses.teacher_targets import TeacherLogits
from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.forward import unwrap_model
from gkd_lab.teachers.score_files import ScoreReader
from gkd_lab.teachers.server import TeacherServer, TokenLogProbs
from gkd_lab.teachers.teacher import TeacherOutput
from gkd_lab.teachers.top_k_distributions import TopKScores, TopKTeacherLogits, concatenate_scores


class ModelFreeTeacher(ABC):
    """A `TeacherInterface` without a forward pass; `GKDTrainer` takes it as `teacher_model`.

    description: Its name in messages.
    vocabulary_size: V.
    tokenizer: The tokenizer of its ids; None: unknown.
    can_score_new_text: Whether it can score what a student has just sampled.
    """

    description: str
    vocabulary_size: int
    tokenizer: Any | None
    can_score_new_text: bool
    config: PretrainedConfig | None = None

    @abstractmethod
    def compute_logits(self, batch: MicroBatch) -> TeacherLogits:
        """Return the teacher's logits for M blocks of B*C tokens, on the batch's device."""

    def check_compatibility(
        self, student: PreTrainedModel, cells: Sequence[CellArguments], *, seq_kd: bool, eval_on_policy: bool
    ) -> None:
        """Raise ValueError for a run that needs a teacher model: a classifier, seq_kd, or new text to score.

        New text, sampled in training or evaluation, is no problem if `can_score_new_text`.
        """
        if get_classifier_kind(unwrap_model(student)) is not None:
            raise ValueError(
                f"the student classifies, and {self.description} knows of texts alone: give a model"
            )
        if seq_kd:
            raise ValueError(
                f"seq_kd=True lets the teacher write, which {self.description} cannot: give a model"
            )
        if self.can_score_new_text:
            return
        lmbda = max(cell.lmbda for cell in cells)
        if lmbda > 0 or eval_on_policy:
            setting = f"lmbda={lmbda:g}" if lmbda > 0 else "eval_on_policy=True"
            raise ValueError(
                f"{setting} lets the student write, and {self.description} covers only the text that it was "
                "made for: set lmbda=0, or give the teacher's model"
            )

    def activate(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: there are no weights to move."""
        return nullcontext()

    def activate_head(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: there is no head to move."""
        return nullcontext()

    def compute_output(self, batch: MicroBatch, output_names: Sequence[str] = ()) -> TeacherOutput:
        """Return the micro-batch's logits; ValueError if hidden states or attention maps are requested."""
        if output_names:
            raise ValueError(
                f"an objective reads the teacher's {', '.join(output_names)}, and {self.description} has "
                "distributions alone: give the teacher's model, or drop the objective"
            )
        return TeacherOutput(self.compute_logits(batch))


class CachedTeacher(ModelFreeTeacher):
    """Scores from a folder (see `score_files`), looked up by `Example.row_index`."""

    description, can_score_new_text = "a store of its scores", False

    def __init__(self, folder: str | Path, tokenizer: Any | None = None) -> None:
        self.score_reader, self.tokenizer = ScoreReader(Path(folder)), tokenizer
        self.vocabulary_size = self.score_reader.layout.vocabulary

    def compute_logits(self, batch: MicroBatch) -> TopKTeacherLogits:
        """Return the stored logits of the batch's rows, found by `row_index`, on the batch's device.

        Raises ValueError for a row without an index, or that was not scored with this completion.
        """
        rows = batch.teacher
        if rows.row_indices is None:
            raise ValueError(
                "the teacher's scores are found by the rows' `row_index`, and these rows have none: give "
                "`Example`s with the row's position in the data that was scored"
            )
        row_ids = zip(rows.completion_ids, rows.completion_mask.bool(), strict=True)
        row_scores = [
            self._read_row(number, ids[is_real].tolist())
            for number, (ids, is_real) in zip(rows.row_indices.flatten().tolist(), row_ids, strict=True)
        ]
        return _build_logits(row_scores, batch, self.vocabulary_size)

    def _read_row(self, number: int, completion_ids: Sequence[int]) -> TopKScores:
        """Return the stored scores of row `number`, (C, k); ValueError if they are of another completion."""
        tokens, scores = self.score_reader.read_row(number)
        if tokens.tolist() != list(completion_ids):
            raise ValueError(
                f"row {number} has another completion ({len(completion_ids)} tokens) than the one that the "
                f"teacher scored ({len(tokens)} tokens): the scores in {str(self.score_reader.folder)!r} "
                "are of other text"
            )
        return scores


class ServerTeacher(ModelFreeTeacher):
    """A decoder-only teacher behind a server, with the student's own tokenizer.

    The named tokens are exact to the digits that the server sends. The tail is 1 minus their sum, and at
    least the float32 epsilon.
    """

    description, can_score_new_text = "a server", True

    def __init__(self, server: TeacherServer, tokenizer: Any) -> None:
        self.server, self.tokenizer = server, tokenizer
        self.vocabulary_size = 1 + max(tokenizer.get_vocab().values())

    def check_compatibility(
        self, student: PreTrainedModel, cells: Sequence[CellArguments], *, seq_kd: bool, eval_on_policy: bool
    ) -> None:
        """Raise ValueError for an encoder-decoder student, a classifier or seq_kd; new text is fine."""
        super().check_compatibility(student, cells, seq_kd=seq_kd, eval_on_policy=eval_on_policy)
        if student.config.is_encoder_decoder:
            raise ValueError(
                "the student is encoder-decoder, and a server's prompt log-probabilities are of one text: "
                "choose a decoder-only pair, or cache the teacher's scores (`CachedTeacher`)"
            )

    def compute_logits(self, batch: MicroBatch) -> TopKTeacherLogits:
        """Send each row's prompt and completion to the server; return the completions' top-k logits.

        Raises ServerUnavailable and ServerRejection.
        """
        rows = batch.teacher
        lengths = rows.completion_mask.sum(-1).tolist()
        texts = [
            torch.cat([prompt[prompt_mask.bool()], ids[mask.bool()]]).tolist()
            for prompt, prompt_mask, ids, mask in zip(
                rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask, strict=True
            )
        ]
        row_scores = [
            build_top_k_scores(tokens[len(tokens) - length :], self.server.top_k)
            for tokens, length in zip(self.server.request_scores(texts), lengths, strict=True)
        ]
        return _build_logits(row_scores, batch, self.vocabulary_size)


def build_top_k_scores(tokens: Sequence[TokenLogProbs], top_k: int) -> TopKScores:
    """Convert C lists of `top_k` (id, log-probability) pairs to scores, (C, k); the tail is 1 - their sum."""
    log_probs = torch.tensor([[log_prob for _, log_prob in token] for token in tokens], dtype=torch.float64)
    log_probs = log_probs.view(-1, top_k)
    ids = torch.tensor([[id_ for id_, _ in token] for token in tokens], dtype=torch.int32).view(-1, top_k)
    tail = (1 - log_probs.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps).log()
    return TopKScores(log_probs.float(), ids, tail.float())


def _build_logits(
    row_scores: Sequence[TopKScores], batch: MicroBatch, vocabulary_size: int
) -> TopKTeacherLogits:
    """Return logits of M blocks of B*C tokens from M*B rows' scores, with zeros behind each row's own."""
    completions, blocks = batch.teacher.completion_ids, len(batch.prompts_of_block)
    lengths = [len(scores.log_probs) for scores in row_scores]

    def pad_rows(tensor: Tensor) -> Tensor:
        """Arrange one tensor of all rows' tokens as (M, B*C, ...), with zeros behind each row's own."""
        rows = tensor.new_zeros(len(row_scores), completions.shape[1], *tensor.shape[1:])
        for row, part in zip(rows, tensor.split(lengths), strict=True):
            row[: len(part)] = part
        return rows.view(blocks, -1, *rows.shape[2:]).to(completions.device)

    scores = concatenate_scores(row_scores).apply(pad_rows)
    return TopKTeacherLogits.create(scores, vocabulary_size)
