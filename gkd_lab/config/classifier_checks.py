"""What a cell of classifiers may ask for: they write nothing, and a regression has one number."""

from collections.abc import Iterable

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, SftModel
from gkd_lab.config.cell import AnyEvaluation, LmEvalEvaluation, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.loss_terms import CrossEntropyConfig, ResolvedDivergence, ResolvedTerm, SquaredErrorConfig


def check_classifier_cell(training: Training, evaluations: Iterable[AnyEvaluation]) -> None:
    """Raises SpecError for what has a model write, and for objectives that do not fit its outputs."""
    family = training.start.family
    if family not in CLASSIFIER_FAMILIES:
        _check_label_regression(training.objectives)
        return
    lmbda = training.source.lmbda
    if lmbda > 0:
        raise ConfigError(
            f"lmbda {lmbda:g} lets the student write, and models of {training.task} ({family}) write "
            "nothing: set lmbda to 0"
        )
    for role, model in training.reference_models:
        _check_made_from_scratch(role, model)
    if training.source.text is not None:
        raise ConfigError(f"source teacher: models of {training.task} ({family}) write nothing: leave it out")
    if training.teacher_scores is not None:
        raise ConfigError(
            f"teacher_scores are of language models, and those of {training.task} ({family}) are none: "
            "leave them out"
        )
    for one in training.objectives:
        _check_classifier_term(one, family)
    for evaluation in evaluations:
        _check_classifier_evaluation(evaluation, training.task)


def _check_made_from_scratch(role: str, model: SftModel) -> None:
    if model.model.architecture is None:
        raise ConfigError(
            f"{role} {model.model.name}: models of {model.task} are made from scratch: give layers, width "
            "and heads, or use GKDTrainer for classifiers that are loaded"
        )


def _check_label_regression(objectives: Iterable[ResolvedTerm]) -> None:
    if any(isinstance(one, SquaredErrorConfig) and one.against == "labels" for one in objectives):
        raise ConfigError(
            "objectives: squared_error against labels is for a regression: choose cross_entropy"
        )


def _check_classifier_term(term: ResolvedTerm, family: str) -> None:
    numeric = family == "regression"
    if not isinstance(term, ResolvedDivergence | CrossEntropyConfig | SquaredErrorConfig):
        raise ConfigError(f"objectives: {term.divergence} reads what only a language model has; leave it out")
    if numeric and not isinstance(term, SquaredErrorConfig):
        raise ConfigError(
            f"objectives: {term.type} compares distributions, and a regression has one number: choose "
            "squared_error, against the teacher or labels"
        )
    if not numeric and isinstance(term, SquaredErrorConfig) and term.against == "labels":
        raise ConfigError(
            "objectives: squared_error against labels needs numbers: of classes choose cross_entropy"
        )


def _check_classifier_evaluation(evaluation: AnyEvaluation, task: str) -> None:
    if isinstance(evaluation, LmEvalEvaluation):
        raise ConfigError(f"evaluations: lm_eval asks language models, and those of {task} write nothing")
    if evaluation.decoding != "greedy":
        raise ConfigError(
            f"evaluations: decoding {evaluation.decoding} has a model write, and those of {task} choose the "
            "likeliest label: set `decoding: greedy`"
        )
