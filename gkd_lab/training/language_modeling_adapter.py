"""Language modelling: rows are prompts with completions, and the student can write completions itself.

Shapes: N rows, C completion tokens, T tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.encoding.batches import Collator
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.encoding.trl_batch import build_trl_batch, parse_collated_batch
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.terms import are_rows_routed, needs_text_reader, required_teachers
from gkd_lab.models.forward import Sequences, compute_completion_logits, compute_position_ids
from gkd_lab.teachers.load_teachers import TeacherSet
from gkd_lab.teachers.teacher import TeacherInterface
from gkd_lab.teachers.text_teacher import TeacherPrompts, TextTeacher, TwoTokenizerEncoder
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.rollout import GenerationLimits
from gkd_lab.training.sampling import collect_end_ids


class LanguageModelingAdapter:
    """Task adapter of decoder-only and encoder-decoder language models.

    Raises:
        ValueError: for teachers with another tokenizer that are compared token by token, and for rows of
            `uld` that would be collated in another process.
    """

    can_generate = True
    compute_metrics = None

    def __init__(
        self,
        student: PreTrainedModel,
        tokenizer: Any,
        teachers: TeacherSet,
        cells: Sequence[CellArguments],
        args: GKDConfig,
        formatting_func: Callable[[Any], Any] | None,
        teacher_prompts: TeacherPrompts | None,
        *,
        is_stream: bool,
    ) -> None:
        self.cells, self.is_encoder_decoder = cells, bool(student.config.is_encoder_decoder)
        compared = required_teachers(cell.list_terms() for cell in cells) + [0] * args.seq_kd
        vocabulary_size = teachers.count_shared_vocabulary(student, tokenizer, compared)
        end_ids = collect_end_ids(student, tokenizer)
        self.limits = GenerationLimits(args.max_new_tokens, end_ids, tokenizer.pad_token_id, vocabulary_size)
        self.encode_row = RowEncoder(
            tokenizer,
            end_ids=end_ids.tolist(),
            is_encoder_decoder=self.is_encoder_decoder,
            max_length=args.max_length,
            max_new_tokens=args.max_new_tokens,
            formatting_func=formatting_func,
            reads_teacher=are_rows_routed(cell.list_terms() for cell in cells),
        )
        self._tokenizers = tokenizer, teachers.tokenizer
        self._text_encoder: TwoTokenizerEncoder | None = None
        if needs_text_reader(cell.list_terms() for cell in cells):
            _check_collation(args, is_stream=is_stream)
            self._text_encoder = TwoTokenizerEncoder(
                self.encode_row, teachers.tokenizer, teachers.first.config, teacher_prompts
            )
        self.collate = Collator(
            self._text_encoder or self.encode_row, self.limits.pad_id, self.is_encoder_decoder
        )

    def parse_batch(self, batch: Mapping[str, Any]) -> Sequences:
        """Convert a batch of our or TRL's collator to `Sequences`; ValueError for an unknown form."""
        return parse_collated_batch(batch, self.limits.pad_id, is_encoder_decoder=self.is_encoder_decoder)

    def build_trl_fields(self, rows: Sequences) -> dict[str, Tensor]:
        """Return TRL's batch tensors: `input_ids`, `attention_mask`, `labels`, `prompts` with their mask."""
        return build_trl_batch(rows, is_encoder_decoder=self.is_encoder_decoder)

    def compute_logits_and_labels(self, model: Any, rows: Sequences) -> tuple[Tensor, Tensor]:
        """Run the model; return unshifted logits (N, T, V) and labels (N, T), -100 where nothing is trained.

        A decoder-only model's logits at position t predict the label at t + 1, an encoder-decoder's at t.
        """
        batch = self.build_trl_fields(rows)
        if self.is_encoder_decoder:
            return compute_completion_logits(model, rows), batch["labels"]
        mask = batch["attention_mask"]
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=compute_position_ids(mask),
            use_cache=False,
        )
        return outputs.logits, batch["labels"]

    def reorder_teacher_labels(self, teachers: Sequence[TeacherInterface]) -> None:
        """Do nothing: student and teachers already share their token ids."""

    def create_text_teacher(self, teacher: TeacherInterface) -> TextTeacher | None:
        """Wrap `teacher` to read texts in its own tokens; return None if no loss term (`uld`) needs that."""
        if self._text_encoder is None:
            return None
        student_tokenizer, teacher_tokenizer = self._tokenizers
        end_ids, prompts = self.limits.end_ids.tolist(), self._text_encoder.teacher_prompts
        return TextTeacher(teacher, teacher_tokenizer, student_tokenizer, end_ids, prompts)


def _check_collation(args: GKDConfig, *, is_stream: bool) -> None:
    """Raise ValueError if rows of `uld` would be collated in another process than the training one."""
    if args.dataloader_num_workers:
        raise ValueError(
            "uld keeps the teacher's prompts where rows are collated: set dataloader_num_workers to 0"
        )
    if is_stream and args.world_size > 1 and args.accelerator_config.dispatch_batches is not False:
        raise ValueError(
            "uld keeps the teacher's prompts where rows are collated, and of a stream only the first process "
            'collates: set accelerator_config={"dispatch_batches": False}'
        )
