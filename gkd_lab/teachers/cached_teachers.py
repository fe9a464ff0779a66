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
from gkd_lab.losses.step_loss import StepBatch
from gkd_lab.losses.teacher_targets import Guide
from gkd_lab.models.classifiers import kind_of
from gkd_lab.models.forward import unwrapped
from gkd_lab.teachers.score_files import ScoreFiles
from gkd_lab.teachers.server import Endpoint, Named
from gkd_lab.teachers.teacher import Said
from gkd_lab.teachers.top_k_distributions import Scores, Stored, joined


class TeacherSource(ABC):
    """Gives a step's guide without a teacher's forward pass; `GKDTrainer` takes it as `teacher_model`.

    name: what messages call it. size: V, entries of its vocabulary.
    tokenizer: the one that its ids are of; None where it is not known.
    knows_any_text: whether it can speak of what a student has just written.
    """

    name: str
    size: int
    tokenizer: Any | None
    knows_any_text: bool

    @abstractmethod
    def guide(self, batch: StepBatch) -> Guide:
        """What the teacher says of M blocks of B*C tokens, on the batch's device."""

    def check(self, student: PreTrainedModel, cells: Sequence[CellArguments], args: Any) -> None:
        """Raises ValueError for what only a model in this process can do."""
        if kind_of(unwrapped(student)) is not None:
            raise ValueError(f"the student classifies, and {self.name} knows of texts alone: give a model")
        if args.seq_kd:
            raise ValueError(f"seq_kd=True lets the teacher write, which {self.name} cannot: give a model")
        if self.knows_any_text:
            return
        lmbda = max(cell.lmbda for cell in cells)
        if lmbda > 0 or args.eval_on_policy:
            which = f"lmbda={lmbda:g} lets" if lmbda > 0 else "eval_on_policy=True lets"
            raise ValueError(
                f"{which} the student write, and {self.name} is of text that was there before: set lmbda=0, "
                "or let the teacher itself read what the student writes"
            )

    # ---- as the trainer asks any teacher ----

    config: PretrainedConfig | None = None

    def at_work(self) -> AbstractContextManager[Any]:
        """It has no weights that could be moved."""
        return nullcontext()

    def head_at_work(self) -> AbstractContextManager[Any]:
        """It has no head."""
        return nullcontext()

    def says(self, batch: StepBatch, asks: Sequence[str] = ()) -> Said:
        """Raises ValueError where more than distributions is asked for."""
        if asks:
            raise ValueError(
                f"an objective reads the teacher's {', '.join(asks)}, and {self.name} knows its "
                "distributions alone: let the teacher itself read the rows, or drop the objective"
            )
        return Said(self.guide(batch))


class StoredTeacher(TeacherSource):
    """The scores in a folder (see `score_files`), of rows that are known by their `Example.number`."""

    name, knows_any_text = "a store of its scores", False

    def __init__(self, folder: str | Path, tokenizer: Any | None = None) -> None:
        self.files, self.tokenizer = ScoreFiles(Path(folder)), tokenizer
        self.size = self.files.layout.vocabulary

    def guide(self, batch: StepBatch) -> Stored:
        """Raises ValueError for a row that was not scored, or with another completion."""
        rows = batch.teacher
        if rows.numbers is None:
            raise ValueError(
                "the teacher's scores are found by the rows' numbers, and these rows have none: give "
                "`Example`s with `number`, the row's place in the data that was scored"
            )
        real = rows.completion_mask.bool()
        found = [
            self._row(number, ids[mask].tolist())
            for number, ids, mask in zip(
                rows.numbers.flatten().tolist(), rows.completion_ids, real, strict=True
            )
        ]
        blocks = len(batch.prompts_of_block)
        scores = padded(found, rows.completion_ids.shape[1], blocks, rows.completion_ids.device)
        return Stored.of(scores, self.size)

    def _row(self, number: int, asked: Sequence[int]) -> Scores:
        tokens, scores = self.files.row(number)
        if tokens.tolist() != list(asked):
            raise ValueError(
                f"row {number} has another completion ({len(asked)} tokens) than the one that the teacher "
                f"scored ({len(tokens)} tokens): the scores in {str(self.files.folder)!r} are of other text"
            )
        return scores


class ServedTeacher(TeacherSource):
    """A decoder-only teacher behind a server, whose tokenizer is the student's own.

    What it names is exact to the digits that it sends. The tail is 1 minus the sum of the named, and so no
    smaller than what float32 tells from 0.

    endpoint: where it is and what it is asked for. tokenizer: the teacher's.
    """

    name, knows_any_text = "a server", True

    def __init__(self, endpoint: Endpoint, tokenizer: Any) -> None:
        self.endpoint, self.tokenizer = endpoint, tokenizer
        self.size = 1 + max(tokenizer.get_vocab().values())

    def check(self, student: PreTrainedModel, cells: Sequence[CellArguments], args: Any) -> None:
        super().check(student, cells, args)
        if student.config.is_encoder_decoder:
            raise ValueError(
                "the student is encoder-decoder, and a server's prompt log-probabilities are of one text: "
                "choose a decoder-only pair, or keep the teacher's scores (`StoredTeacher`)"
            )

    def guide(self, batch: StepBatch) -> Stored:
        """Raises ServerDown and ServerRefused."""
        rows = batch.teacher
        lengths = rows.completion_mask.sum(-1).tolist()
        texts = [
            torch.cat([prompt[before.bool()], ids[mask.bool()]]).tolist()
            for prompt, before, ids, mask in zip(
                rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask, strict=True
            )
        ]
        answers = self.endpoint.scores(texts)
        found = [
            named_scores(one[len(one) - length :], self.endpoint.top_k)
            for one, length in zip(answers, lengths, strict=True)
        ]
        blocks = len(batch.prompts_of_block)
        scores = padded(found, rows.completion_ids.shape[1], blocks, rows.completion_ids.device)
        return Stored.of(scores, self.size)


def named_scores(named: Sequence[Named], top_k: int) -> Scores:
    """What a server said of C tokens, the `top_k` most likely of each, as (C, k)."""
    logs = torch.tensor([[log for _, log in one] for one in named], dtype=torch.float64).view(-1, top_k)
    ids = torch.tensor([[id_ for id_, _ in one] for one in named], dtype=torch.int32).view(-1, top_k)
    tail = (1 - logs.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps).log()
    return Scores(logs.float(), ids, tail.float())


def size_or_model(teacher: TeacherSource | PreTrainedModel) -> Any:
    """What tells how many entries its vocabulary has."""
    return teacher.size if isinstance(teacher, TeacherSource) else teacher


def padded(found: Sequence[Scores], width: int, blocks: int, device: torch.device | str) -> Scores:
    """Scores of M*B rows, each of its own tokens, as those of M blocks of B*C tokens; 0 behind them."""

    whole = joined(found)
    lengths = [len(one.logs) for one in found]

    def put(tensor: Tensor) -> Tensor:
        rows = tensor.new_zeros(len(found), width, *tensor.shape[1:])
        for row, part in zip(rows, tensor.split(lengths), strict=True):
            row[: len(part)] = part
        return rows.view(blocks, -1, *rows.shape[2:]).to(device)

    return whole.map(put)
