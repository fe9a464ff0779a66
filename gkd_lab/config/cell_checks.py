"""Checks of a resolved cell: values that are valid one by one but cannot work together.

`check_cell` lists all of them; they run before any model is built or loaded. Facts that only a checkpoint
knows, such as the tokens of a loaded model, are checked when it is loaded.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, SftModel, TokenizerSpec
from gkd_lab.config.cell import AnyEvaluation, LmEvalEvaluation, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.layer_maps import UNIFORM, resolve_layer_pairs
from gkd_lab.config.lora import check_lora
from gkd_lab.config.loss_terms import (
    AttentionsConfig,
    CrossEntropyConfig,
    LayerTerm,
    ResolvedDivergence,
    ResolvedReward,
    ResolvedTerm,
    SquaredErrorConfig,
    ULDConfig,
)
from gkd_lab.config.reward_objectives import check_terms_learn
from gkd_lab.config.trl_cells import check_trl_cell

Stack = Literal["decoder", "encoder"]


def check_cell(training: Training, evaluations: Iterable[AnyEvaluation]) -> None:
    """Raise ConfigError if a cell's values, valid one by one, cannot be trained or evaluated together."""
    check_trl_cell(training)
    check_terms_learn(training.objectives, training.source)
    _check_rows_fill_a_batch(training)
    _check_teacher_scores(training)
    _check_layer_terms(training)
    _check_tokenizers(training)
    _check_not_zero_at_start(training)
    _check_served_teacher(training)
    _check_selection(training, evaluations)
    _check_corrupted_text(training)
    if training.lora is not None:
        check_lora(training.lora, training.start)
    if training.start.family in CLASSIFIER_FAMILIES:
        _check_classifier_cell(training, evaluations)
    else:
        _check_no_label_regression(training.objectives)


def _check_rows_fill_a_batch(training: Training) -> None:
    """Raise ConfigError if a cell is known to have fewer rows than one of its batches."""
    rows = training.num_rows
    if rows is not None and rows < training.batch_size:
        raise ConfigError(
            f"batch_size: {training.batch_size} rows, of which there are {rows} to distil on; "
            f"give at most {rows}, or more rows"
        )


def _check_corrupted_text(training: Training) -> None:
    """Raise ConfigError for corrupted text with labels to learn, cached scores or the teacher's text."""
    if training.source.corrupted is None:
        return
    if training.source.text is not None:
        raise ConfigError("source: text and corrupted both replace the data's targets; leave one out")
    if training.teacher_scores is not None:
        raise ConfigError("source.corrupted: teacher_scores hold the data's own targets; leave one out")
    for term in training.objectives:
        if not isinstance(term, ResolvedDivergence):
            raise ConfigError(
                f"source.corrupted: {term.type} would learn the random tokens; use divergences alone"
            )


def _check_selection(training: Training, evaluations: Iterable[AnyEvaluation]) -> None:
    """Raise ConfigError if an evaluation asks for a best checkpoint that no selection keeps."""
    wants_best = any(getattr(evaluation, "checkpoint", "last") == "best" for evaluation in evaluations)
    if wants_best and training.selection is None:
        raise ConfigError(
            "evaluations: checkpoint: best needs a score during training: set `eval_every`, such as 50"
        )
    if training.selection is not None and training.start.family in CLASSIFIER_FAMILIES:
        raise ConfigError("eval_every: classifiers generate no text to score during training; leave it out")


# ---- teachers ----


def _check_teacher_scores(training: Training) -> None:
    """Raise ConfigError if cached teacher scores cannot replace the teacher: lmbda > 0, unfit terms."""
    if training.teacher_scores is None:
        return
    lmbda = training.source.lmbda
    if lmbda > 0:
        raise ConfigError(
            f"lmbda {lmbda:g} trains on student-written text, but teacher_scores are computed before "
            "training: set lmbda to 0, or leave teacher_scores out (`live`)"
        )
    terms = training.objectives
    _check_only_distributions(terms, "teacher_scores hold", "leave teacher_scores out (`live`)")
    if not any(isinstance(term, ResolvedDivergence) and 0 in term.teachers for term in terms):
        raise ConfigError(
            "teacher_scores: they come from the run's own teacher, which no divergence reads here: leave "
            "teacher_scores out (`live`)"
        )
    dtype, is_parked = training.get_teacher_placement(0)
    if training.teacher.model.served is None and (dtype is not None or is_parked):
        name = "parked" if dtype is None else "dtype"
        raise ConfigError(
            f"teacher.{name}: the teacher is not loaded while cells train on cached scores: leave {name} "
            "out, or teacher_scores (`live`)"
        )


def _check_served_teacher(training: Training) -> None:
    """Raise ConfigError if a teacher behind a server is not the first, or cannot give what is needed."""
    if any(model.model.served for model in training.teachers):
        raise ConfigError("teachers: only the first teacher, `teacher`, can be behind a server")
    if training.teacher.model.served is None:
        return
    if training.start.family == "encoder-decoder":
        raise ConfigError(
            f"teacher.server: {training.task} has encoder-decoder models, and a server scores "
            "decoder-only models: choose another task, or cache the scores of a loaded teacher "
            "(`teacher_scores`)"
        )
    for name, value in (("teacher_scores", training.teacher_scores), ("source.text", training.source.text)):
        if value is not None:
            raise ConfigError(
                f"{name}: a teacher behind a server scores the rows of each step; leave {name} out"
            )
    _check_only_distributions(training.objectives, "a server gives", "load the teacher")


def _check_only_distributions(terms: Iterable[ResolvedTerm], scores_source: str, remedy: str) -> None:
    """Raise ConfigError for a term that needs more of a teacher than its output distributions.

    Divergences, cross-entropy and rewards do not. scores_source, remedy: Words of the message.
    """
    for term in terms:
        if not isinstance(term, ResolvedDivergence | CrossEntropyConfig | ResolvedReward):
            raise ConfigError(
                f"objectives: {term.type} reads more of the teacher than its distributions, which are all "
                f"that {scores_source}: {remedy}, or drop the term"
            )


def _check_not_zero_at_start(training: Training) -> None:
    """Raise ConfigError if dropout is 0 and all terms are too, as the student starts as its own teacher."""
    if training.dropout == 0 and all(_is_zero_at_start(term, training) for term in training.objectives):
        raise ConfigError(
            "objectives: every divergence is from `start`, the SFT student, so nothing can be learnt: add a "
            "divergence from another teacher, or a reward"
        )


def _is_zero_at_start(term: ResolvedTerm, training: Training) -> bool:
    """Return whether a term is a divergence from teachers equal to the untrained student, so that it is 0."""
    if (
        not isinstance(term, ResolvedDivergence)
        or term.mixture_temperatures is not None
        or 0 in term.teachers
    ):
        return False
    has_own_weights = all(training.teachers[number - 1] == training.start for number in term.teachers)
    # At another temperature the distribution differs, and in another dtype slightly.
    has_other_dtype = any(training.get_teacher_placement(number)[0] for number in term.teachers)
    has_equal_temperatures = term.teacher_temperature == term.student_temperature
    return has_own_weights and not has_other_dtype and has_equal_temperatures


# ---- tokenizers ----

OTHER_TOKENIZER_REMEDY = (
    "let it read the text in its own tokens, `objectives: [{type: uld}, {type: cross_entropy}]`, or choose "
    "models with one tokenizer"
)


def _check_tokenizers(training: Training) -> None:
    """Raise ConfigError if a term compares scratch-made models token by token across two tokenizers."""
    student = training.start
    for term in training.objectives:
        for teacher in list_compared_teachers(term, training):
            is_made = teacher.model.architecture is not None and student.model.architecture is not None
            if is_made and teacher.tokenizer != student.tokenizer:
                raise ConfigError(
                    f"objectives: {term.type} compares teacher and student token by token, and the teacher's "
                    f"tokenizer ({_describe_tokenizer(teacher.tokenizer)}) is not the student's "
                    f"({_describe_tokenizer(student.tokenizer)}): {OTHER_TOKENIZER_REMEDY}"
                )


def list_compared_teachers(term: ResolvedTerm, training: Training) -> list[SftModel]:
    """Return the teachers that a term compares with the student token by token; [] if it does not."""
    if isinstance(term, CrossEntropyConfig | ResolvedReward | ULDConfig):
        return []
    if isinstance(term, ResolvedDivergence):
        teachers = (training.teacher, *training.teachers)
        return [teachers[number] for number in term.teachers]
    return [training.teacher]


def _describe_tokenizer(tokenizer: TokenizerSpec) -> str:
    """Return a tokenizer's kind and, if stated, size as text: `bpe, 300 entries`."""
    return tokenizer.kind + (f", {tokenizer.vocab_size} entries" if tokenizer.vocab_size else "")


# ---- layers ----


def _check_layer_terms(training: Training) -> None:
    """Raise ConfigError if a layer term names a stack, layer or attention maps that a model lacks.

    The depth of a checkpoint comes from its `config.json`. If that is not local (a hub name, a .gguf file),
    the trainer checks the layers when it loads the model.
    """
    for term in training.objectives:
        if isinstance(term, LayerTerm):
            try:
                _check_layer_term(term, training)
            except ConfigError as error:
                raise ConfigError(f"objectives: {term.divergence}: {error}") from error


def _check_layer_term(term: LayerTerm, training: Training) -> None:
    """Raise ConfigError if the models lack the stack, the attention maps or the layers of one term."""
    family = training.start.family
    if term.stack == "encoder" and family != "encoder-decoder":
        raise ConfigError("stack 'encoder': the models have one stack; the nearest valid value is 'decoder'")
    if isinstance(term, AttentionsConfig) and (family, training.precision) == ("decoder-only", "fp64"):
        raise ConfigError("precision 'fp64': attention maps are NaN beside padding; the nearest is 'fp32'")
    if term.layers != UNIFORM:
        student_layers, teacher_layers = (
            _get_stack_depth(model, term.stack) or sys.maxsize for model in (training.start, training.teacher)
        )
        resolve_layer_pairs(term.layers, student_layers, teacher_layers, lowest_layer=term.first)


def _get_stack_depth(model: SftModel, stack: Stack) -> int | None:
    """Return a model's number of layers in one stack; None if only an unread checkpoint tells."""
    spec = model.model
    if spec.architecture is not None:
        return spec.architecture.layers
    if spec.keep_layers is not None:
        return spec.keep_layers if isinstance(spec.keep_layers, int) else len(spec.keep_layers)
    return None if spec.path is None else _read_checkpoint_depth(Path(spec.path) / "config.json", stack)


_STACK_DEPTH_KEYS: Mapping[Stack, tuple[str, ...]] = {
    "encoder": ("encoder_layers",),  # BART
    "decoder": ("decoder_layers", "num_decoder_layers"),  # BART, T5
}
_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _read_checkpoint_depth(config_file: Path, stack: Stack) -> int | None:
    """Return a stack's number of layers from a config.json; None if it is unreadable or does not say."""
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    for key in (*_STACK_DEPTH_KEYS[stack], *_DEPTH_KEYS):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


# ---- classifiers ----


def _check_classifier_cell(training: Training, evaluations: Iterable[AnyEvaluation]) -> None:
    """Raise ConfigError if a classifier cell generates text, loads a model or has an unfit loss term."""
    family = training.start.family
    models = f"models of {training.task} ({family})"
    lmbda = training.source.lmbda
    if lmbda > 0:
        raise ConfigError(
            f"lmbda {lmbda:g} trains on student-written text, but {models} generate no text: set lmbda to 0"
        )
    for role, model in training.reference_models:
        if model.model.architecture is None:
            raise ConfigError(
                f"{role} {model.model.name}: models of {model.task} are made from scratch: give layers, "
                "width and heads, or use GKDTrainer for loaded classifiers"
            )
    if training.source.text is not None:
        raise ConfigError(f"source teacher: {models} generate no text: leave `source` out")
    if training.teacher_scores is not None:
        raise ConfigError(f"teacher_scores: {models} are not language models: leave teacher_scores out")
    for term in training.objectives:
        _check_classifier_term(term, is_regression=family == "regression")
    for evaluation in evaluations:
        _check_classifier_evaluation(evaluation, training.task)


def _check_classifier_term(term: ResolvedTerm, *, is_regression: bool) -> None:
    """Raise ConfigError for a loss term that a classifier, or a regression, cannot compute."""
    if not isinstance(term, ResolvedDivergence | CrossEntropyConfig | SquaredErrorConfig):
        raise ConfigError(f"objectives: {term.divergence} needs a language model; leave it out")
    if is_regression and not isinstance(term, SquaredErrorConfig):
        raise ConfigError(
            f"objectives: {term.type} compares distributions, and a regression predicts a number: choose "
            "squared_error, against the teacher or labels"
        )
    if not is_regression and isinstance(term, SquaredErrorConfig) and term.against == "labels":
        raise ConfigError(
            "objectives: squared_error against labels needs numbers: for classes choose cross_entropy"
        )


def _check_classifier_evaluation(evaluation: AnyEvaluation, task: str) -> None:
    """Raise ConfigError for lm-eval or a decoding other than greedy, which need generated text."""
    if isinstance(evaluation, LmEvalEvaluation):
        raise ConfigError(f"evaluations: lm_eval needs language models, and those of {task} generate no text")
    if evaluation.decoding != "greedy":
        raise ConfigError(
            f"evaluations: decoding {evaluation.decoding} generates text, and models of {task} predict the "
            "likeliest label: set `decoding: greedy`"
        )


def _check_no_label_regression(terms: Iterable[ResolvedTerm]) -> None:
    """Raise ConfigError for a squared error against labels, for which language models have no numbers."""
    if any(isinstance(term, SquaredErrorConfig) and term.against == "labels" for term in terms):
        raise ConfigError(
            "objectives: squared_error against labels is for a regression: choose cross_entropy"
        )
