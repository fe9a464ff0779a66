"""Which tokenizer a model that is made gets, and what can be learnt from a teacher of other tokens."""

from gkd_lab.config.cell import SftModel, TokenizerSpec, Training
from gkd_lab.config.errors import SpecError
from gkd_lab.config.loss_terms import (
    AnyObjective,
    CrossEntropyObjective,
    Objective,
    RewardObjective,
    UldObjective,
)
from gkd_lab.config.settings import Settings, TokenizerSettings

SMALLEST_BPE = 300
"""All bytes, the special tokens and a few merges."""
WAY_OUT = (
    "let it read the text in its own tokens, `objectives: [{type: uld}, {type: cross_entropy}]`, or choose a "
    "pair of one tokenizer"
)
_OF_TEXT = (CrossEntropyObjective, RewardObjective, UldObjective)


def tokenizer_of(role: str, settings: Settings) -> TokenizerSpec:
    """`tokenizer`, or for a teacher `teacher_tokenizer` where that is stated; its kind may be left out."""
    assert settings.tokenizer is not None, "every scale states a tokenizer"
    asked = settings.teacher_tokenizer if role == "teacher" else None
    if asked is None:
        return TokenizerSpec(**settings.tokenizer.model_dump())
    return TokenizerSpec(**{**asked.model_dump(), "kind": asked.kind or settings.tokenizer.kind})


def check_sizes(settings: Settings) -> None:
    """Raises SpecError for a byte-level tokenizer that would not hold the bytes."""
    for name in ("tokenizer", "teacher_tokenizer"):
        asked: TokenizerSettings | None = getattr(settings, name)
        if asked is not None and asked.kind == "bpe" and (asked.vocab_size or 1024) < SMALLEST_BPE:
            raise SpecError(
                f"{name}.vocab_size: {asked.vocab_size} is too small for bpe: {SMALLEST_BPE} at least"
            )


def check_tokenizers(training: Training) -> None:
    """Raises SpecError where an objective compares token by token and the tokens are not the same.

    Of models that are made; what a checkpoint's tokens are shows only when it is loaded.
    """
    for one in training.objectives:
        for teacher in _compared(one, training):
            if _differ(teacher, training.start):
                raise SpecError(
                    f"objectives: {one.type} compares teacher and student token by token, and the teacher's "
                    f"tokenizer ({_named(teacher.tokenizer)}) is not the student's "
                    f"({_named(training.start.tokenizer)}): {WAY_OUT}"
                )


def _compared(one: AnyObjective, training: Training) -> list[SftModel]:
    if isinstance(one, _OF_TEXT):
        return []
    listed = (training.teacher, *training.teachers)
    return [listed[n] for n in one.teachers] if isinstance(one, Objective) else [training.teacher]


def _differ(teacher: SftModel, student: SftModel) -> bool:
    made = teacher.model.architecture is not None and student.model.architecture is not None
    return made and teacher.tokenizer != student.tokenizer


def _named(tokenizer: TokenizerSpec) -> str:
    return tokenizer.kind + (f", {tokenizer.vocab_size} entries" if tokenizer.vocab_size else "")
