"""What a cell of classifiers may ask for: they write nothing, and a regression has one number."""

from collections.abc import Iterable

from gkd_lab.config.cell import CLASSIFIERS, AnyEvaluation, HarnessEvaluation, SftModel, Training
from gkd_lab.config.errors import SpecError
from gkd_lab.config.loss_terms import AnyObjective, CrossEntropyObjective, Objective, SquaredErrorObjective


def check_classes(training: Training, evaluations: Iterable[AnyEvaluation]) -> None:
    """Raises SpecError for what has a model write, and for objectives that do not fit its outputs."""
    family = training.start.family
    if family not in CLASSIFIERS:
        _check_writers(training.objectives)
        return
    lmbda = training.source.lmbda
    if lmbda > 0:
        raise SpecError(
            f"lmbda {lmbda:g} lets the student write, and models of {training.task} ({family}) write "
            "nothing: set lmbda to 0"
        )
    for role, model in training.models:
        _check_made(role, model)
    if training.source.text is not None:
        raise SpecError(f"source teacher: models of {training.task} ({family}) write nothing: leave it out")
    if training.teacher_scores is not None:
        raise SpecError(
            f"teacher_scores are of language models, and those of {training.task} ({family}) are none: "
            "leave them out"
        )
    for one in training.objectives:
        _check_objective(one, family)
    for evaluation in evaluations:
        _check_evaluation(evaluation, training.task)


def _check_made(role: str, model: SftModel) -> None:
    if model.model.architecture is None:
        raise SpecError(
            f"{role} {model.model.name}: models of {model.task} are made from scratch: give layers, width "
            "and heads, or use GKDTrainer for classifiers that are loaded"
        )


def _check_writers(objectives: Iterable[AnyObjective]) -> None:
    if any(isinstance(one, SquaredErrorObjective) and one.against == "labels" for one in objectives):
        raise SpecError("objectives: squared_error against labels is for a regression: choose cross_entropy")


def _check_objective(one: AnyObjective, family: str) -> None:
    numeric = family == "regression"
    if not isinstance(one, Objective | CrossEntropyObjective | SquaredErrorObjective):
        raise SpecError(f"objectives: {one.divergence} reads what only a language model has; leave it out")
    if numeric and not isinstance(one, SquaredErrorObjective):
        raise SpecError(
            f"objectives: {one.type} compares distributions, and a regression has one number: choose "
            "squared_error, against the teacher or labels"
        )
    if not numeric and isinstance(one, SquaredErrorObjective) and one.against == "labels":
        raise SpecError(
            "objectives: squared_error against labels needs numbers: of classes choose cross_entropy"
        )


def _check_evaluation(evaluation: AnyEvaluation, task: str) -> None:
    if isinstance(evaluation, HarnessEvaluation):
        raise SpecError(f"evaluations: lm_eval asks language models, and those of {task} write nothing")
    if evaluation.decoding != "greedy":
        raise SpecError(
            f"evaluations: decoding {evaluation.decoding} has a model write, and those of {task} choose the "
            "likeliest label: set `decoding: greedy`"
        )
