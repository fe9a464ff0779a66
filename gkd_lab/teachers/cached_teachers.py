"""Teachers that are no model of this process: scores that were kept of fixed text, or a server's.

Shapes: M blocks of B rows, C completion tokens, k tokens named of each distribution.
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
    """Gives a step's guide without a teacher's forward pass; `GKDTrainer` takes it as `teacher_model`.

    name: what messages call it. size: V, entries of its vocabulary.
    tokenizer: the one that its ids are of; None where it is not known.
    knows_any_text: whether it can speak of what a student has just written.
    """

    description: str
    vocabulary_size: int
    tokenizer: Any | None
    can_score_new_text: bool

    @abstractmethod
    def compute_logits(self, batch: MicroBatch) -> TeacherLogits:
        """What the teacher says of M blocks of B*C tokens, on the batch's device."""

    def check_compatibility(
        self, student: PreTrainedModel, cells: Sequence[CellArguments], args: Any
    ) -> None:
        """Raises ValueError for what only a model in this process can do."""
        if get_classifier_kind(unwrap_model(student)) is not None:
            raise ValueError(
                f"the student classifies, and {self.description} knows of texts alone: give a model"
            )
        if args.seq_kd:
            raise ValueError(
                f"seq_kd=True lets the teacher write, which {self.description} cannot: give a model"
            )
        if self.can_score_new_text:
            return
        lmbda = max(cell.lmbda for cell in cells)
        if lmbda > 0 or args.eval_on_policy:
            which = f"lmbda={lmbda:g} lets" if lmbda > 0 else "eval_on_policy=True lets"
            raise ValueError(
                f"{which} the student write, and {self.description} is of text that was there before: set lmbda=0, "
                "or let the teacher itself read what the student writes"
            )

    # ---- as the trainer asks any teacher ----

    config: PretrainedConfig | None = None

    def activate(self) -> AbstractContextManager[Any]:
        """It has no weights that could be moved."""
        return nullcontext()

    def activate_head(self) -> AbstractContextManager[Any]:
        """It has no head."""
        return nullcontext()

    def compute_output(self, batch: MicroBatch, output_names: Sequence[str] = ()) -> TeacherOutput:
        """Raises ValueError where more than distributions is asked for."""
        if output_names:
            raise ValueError(
                f"an objective reads the teacher's {', '.join(output_names)}, and {self.description} knows its "
                "distributions alone: let the teacher itself read the rows, or drop the objective"
            )
        return TeacherOutput(self.compute_logits(batch))


class CachedTeacher(ModelFreeTeacher):
    """The scores in a folder (see `score_files`), of rows that are known by their `Example.number`."""

    description, can_score_new_text = "a store of its scores", False

    def __init__(self, folder: str | Path, tokenizer: Any | None = None) -> None:
        self.score_reader, self.tokenizer = ScoreReader(Path(folder)), tokenizer
        self.vocabulary_size = self.score_reader.layout.vocabulary

    def compute_logits(self, batch: MicroBatch) -> TopKTeacherLogits:
        """Raises ValueError for a row that was not scored, or with another completion."""
        rows = batch.teacher
        if rows.row_indices is None:
            raise ValueError(
                "the teacher's scores are found by the rows' numbers, and these rows have none: give "
                "`Example`s with `number`, the row's place in the data that was scored"
            )
        real = rows.completion_mask.bool()
        found = [
            self._read_row(number, ids[mask].tolist())
            for number, ids, mask in zip(
                rows.row_indices.flatten().tolist(), rows.completion_ids, real, strict=True
            )
        ]
        blocks = len(batch.prompts_of_block)
        scores = pad_scores(found, rows.completion_ids.shape[1], blocks, rows.completion_ids.device)
        return TopKTeacherLogits.create(scores, self.vocabulary_size)

    def _read_row(self, number: int, asked: Sequence[int]) -> TopKScores:
        tokens, scores = self.score_reader.read_row(number)
        if tokens.tolist() != list(asked):
            raise ValueError(
                f"row {number} has another completion ({len(asked)} tokens) than the one that the teacher "
                f"scored ({len(tokens)} tokens): the scores in {str(self.score_reader.folder)!r} are of other text"
            )
        return scores


class ServerTeacher(ModelFreeTeacher):
    """A decoder-only teacher behind a server, whose tokenizer is the student's own.

    What it names is exact to the digits that it sends. The tail is 1 minus the sum of the named, and so no
    smaller than what float32 tells from 0.

    endpoint: where it is and what it is asked for. tokenizer: the teacher's.
    """

    description, can_score_new_text = "a server", True

    def __init__(self, server: TeacherServer, tokenizer: Any) -> None:
        self.server, self.tokenizer = server, tokenizer
        self.vocabulary_size = 1 + max(tokenizer.get_vocab().values())

    def check_compatibility(
        self, student: PreTrainedModel, cells: Sequence[CellArguments], args: Any
    ) -> None:
        super().check_compatibility(student, cells, args)
        if student.config.is_encoder_decoder:
            raise ValueError(
                "the student is encoder-decoder, and a server's prompt log-probabilities are of one text: "
                "choose a decoder-only pair, or keep the teacher's scores (`CachedTeacher`)"
            )

    def compute_logits(self, batch: MicroBatch) -> TopKTeacherLogits:
        """Raises ServerDown and ServerRefused."""
        rows = batch.teacher
        lengths = rows.completion_mask.sum(-1).tolist()
        texts = [
            torch.cat([prompt[before.bool()], ids[mask.bool()]]).tolist()
            for prompt, before, ids, mask in zip(
                rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask, strict=True
            )
        ]
        answers = self.server.request_scores(texts)
        found = [
            build_top_k_scores(one[len(one) - length :], self.server.top_k)
            for one, length in zip(answers, lengths, strict=True)
        ]
        blocks = len(batch.prompts_of_block)
        scores = pad_scores(found, rows.completion_ids.shape[1], blocks, rows.completion_ids.device)
        return TopKTeacherLogits.create(scores, self.vocabulary_size)


def build_top_k_scores(named: Sequence[TokenLogProbs], top_k: int) -> TopKScores:
    """What a server said of C tokens, the `top_k` most likely of each, as (C, k)."""
    logs = torch.tensor([[log for _, log in one] for one in named], dtype=torch.float64).view(-1, top_k)
    ids = torch.tensor([[id_ for id_, _ in one] for one in named], dtype=torch.int32).view(-1, top_k)
    tail = (1 - logs.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps).log()
    return TopKScores(logs.float(), ids, tail.float())


def get_vocabulary_size(teacher: ModelFreeTeacher | PreTrainedModel) -> Any:
    """What tells how many entries its vocabulary has."""
    return teacher.vocabulary_size if isinstance(teacher, ModelFreeTeacher) else teacher


def pad_scores(
    found: Sequence[TopKScores], width: int, blocks: int, device: torch.device | str
) -> TopKScores:
    """Scores of M*B rows, each of its own tokens, as those of M blocks of B*C tokens; 0 behind them."""

    whole = concatenate_scores(found)
    lengths = [len(one.log_probs) for one in found]

    def put(tensor: Tensor) -> Tensor:
        rows = tensor.new_zeros(len(found), width, *tensor.shape[1:])
        for row, part in zip(rows, tensor.split(lengths), strict=True):
            row[: len(part)] = part
        return rows.view(blocks, -1, *rows.shape[2:]).to(device)

    return whole.apply(put)
