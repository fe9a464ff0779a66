"""Which tokenizer a model that is made gets, and what can be learnt from a teacher of other tokens."""

from gkd_lab.config.artifact_specs import SftModel, TokenizerSpec
from gkd_lab.config.cell import Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.loss_terms import (
    CrossEntropyConfig,
    ResolvedDivergence,
    ResolvedReward,
    ResolvedTerm,
    ULDConfig,
)
from gkd_lab.config.settings import Settings, TokenizerSettings

MIN_BPE_VOCAB_SIZE = 300
"""All bytes, the special tokens and a few merges."""
OTHER_TOKENIZER_REMEDY = (
    "let it read the text in its own tokens, `objectives: [{type: uld}, {type: cross_entropy}]`, or choose a "
    "pair of one tokenizer"
)
_TOKENIZER_FREE_TERMS = (CrossEntropyConfig, ResolvedReward, ULDConfig)


def resolve_tokenizer(role: str, settings: Settings) -> TokenizerSpec:
    """`tokenizer`, or for a teacher `teacher_tokenizer` where that is stated; its kind may be left out."""
    assert settings.tokenizer is not None, "every scale states a tokenizer"
    asked = settings.teacher_tokenizer if role == "teacher" else None
    if asked is None:
        return TokenizerSpec(**settings.tokenizer.model_dump())
    return TokenizerSpec(**{**asked.model_dump(), "kind": asked.kind or settings.tokenizer.kind})


def check_vocab_sizes(settings: Settings) -> None:
    """Raises SpecError for a byte-level tokenizer that would not hold the bytes."""
    for name in ("tokenizer", "teacher_tokenizer"):
        asked: TokenizerSettings | None = getattr(settings, name)
        if asked is not None and asked.kind == "bpe" and (asked.vocab_size or 1024) < MIN_BPE_VOCAB_SIZE:
            raise ConfigError(
                f"{name}.vocab_size: {asked.vocab_size} is too small for bpe: {MIN_BPE_VOCAB_SIZE} at least"
            )


def check_tokenizers(training: Training) -> None:
    """Raises SpecError where an objective compares token by token and the tokens are not the same.

    Of models that are made; what a checkpoint's tokens are shows only when it is loaded.
    """
    for one in training.objectives:
        for teacher in _list_compared_teachers(one, training):
            if _has_other_tokenizer(teacher, training.start):
                raise ConfigError(
                    f"objectives: {one.type} compares teacher and student token by token, and the teacher's "
                    f"tokenizer ({_describe_tokenizer(teacher.tokenizer)}) is not the student's "
                    f"({_describe_tokenizer(training.start.tokenizer)}): {OTHER_TOKENIZER_REMEDY}"
                )


def _list_compared_teachers(term: ResolvedTerm, training: Training) -> list[SftModel]:
    if isinstance(term, _TOKENIZER_FREE_TERMS):
        return []
    listed = (training.teacher, *training.teachers)
    return [listed[n] for n in term.teachers] if isinstance(term, ResolvedDivergence) else [training.teacher]


def _has_other_tokenizer(teacher: SftModel, student: SftModel) -> bool:
    made = teacher.model.architecture is not None and student.model.architecture is not None
    return made and teacher.tokenizer != student.tokenizer


def _describe_tokenizer(tokenizer: TokenizerSpec) -> str:
    return tokenizer.kind + (f", {tokenizer.vocab_size} entries" if tokenizer.vocab_size else "")
