"""The `evaluations` of an experiment file, and how they resolve to the evaluations of a cell."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from gkd_lab.config.artifact_specs import Decoding, LengthPenaltyForm
from gkd_lab.config.cell import AnyEvaluation, Evaluation, LmEvalEvaluation, Split
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.lm_eval_task import get_lm_eval_version, resolve_lm_eval_task
from gkd_lab.config.settings import DataSettings, Section


class EvaluationSettings(Section):
    """One way of decoding a split and scoring the completions."""

    decoding: Decoding = "greedy"
    temperature: PositiveFloat | None = Field(default=None, description="sampling only; default 1")
    num_beams: PositiveInt | None = Field(default=None, description="beam search only; default 4")
    length_penalty: float | None = Field(default=None, description="beam search only; default 0.6")
    length_penalty_form: LengthPenaltyForm = Field(
        default="transformers",
        description="beam search only; divisor of scores: length^p, or with `wu` ((5 + length) / 6)^p as T5X",
    )
    split: Split = "test"
    examples: PositiveInt | None = Field(default=None, description="number of first rows; default all")
    max_output_tokens: PositiveInt | None = None
    seed: NonNegativeInt = 0
    samples: PositiveInt | None = Field(
        default=None, description="completions per prompt; sampling only; default 1"
    )
    calculator: bool = Field(
        default=False, description="compute the results of `<<48/2=24>>` marks; not for beam search"
    )
    checkpoint: Literal["last", "best"] = Field(
        default="last", description="`best`: the weights that `eval_every` selected on validation rows"
    )
    metrics: tuple[str, ...] | None = Field(default=None, description="default: the task's metrics")


class LmEvalSettings(Section):
    """Tasks of lm-eval; each is an evaluation."""

    lm_eval: tuple[str, ...] = Field(
        min_length=1, description="names of tasks, such as mmlu, and YAML files that describe one"
    )
    limit: PositiveInt | None = Field(default=None, description="documents per task; default all")
    num_fewshot: NonNegativeInt | None = Field(default=None, description="default: the task's own number")
    metric: str | None = Field(
        default=None, description="score to show first, such as `exact_match,strict-match`; default acc"
    )


def _tag_evaluation(value: Any) -> str:
    """Return the class name of evaluation settings, raw or parsed: `LmEvalSettings` if `lm_eval` is set."""
    fields = value if isinstance(value, dict) else vars(value) if isinstance(value, Section) else {}
    return "LmEvalSettings" if "lm_eval" in fields else "EvaluationSettings"


AnyEvaluationSettings = Annotated[
    Annotated[EvaluationSettings, Tag("EvaluationSettings")]
    | Annotated[LmEvalSettings, Tag("LmEvalSettings")],
    Discriminator(_tag_evaluation),
]


def parse_evaluation_settings(values: dict[str, Any]) -> EvaluationSettings | LmEvalSettings:
    """Return LmEvalSettings if `values` has `lm_eval`, else EvaluationSettings. May raise ValidationError."""
    return (LmEvalSettings if "lm_eval" in values else EvaluationSettings).model_validate(values)


def resolve_evaluations(
    settings: AnyEvaluationSettings, metrics: tuple[str, ...], max_output_tokens: int, data: DataSettings
) -> Iterator[AnyEvaluation]:
    """Yield the evaluations of one settings entry: one for a decoding, or one per lm-eval task.

    metrics, max_output_tokens: Defaults of the task. data: Bounds the number of examples. Raises ConfigError.
    """
    if isinstance(settings, LmEvalSettings):
        yield from resolve_lm_eval_evaluations(settings)
    else:
        yield _resolve_decoding_evaluation(
            settings, metrics, max_output_tokens, getattr(data, settings.split)
        )


def resolve_lm_eval_evaluations(
    settings: LmEvalSettings, *, trusted: bool = False
) -> Iterator[LmEvalEvaluation]:
    """Yield one evaluation per distinct lm-eval task; only `trusted` task files may run code.

    Raises ConfigError for a task file that cannot be used.
    """
    for name in dict.fromkeys(settings.lm_eval):
        task = resolve_lm_eval_task(name, trusted=trusted)
        yield LmEvalEvaluation(
            lm_eval=get_lm_eval_version(),
            task=task.name,
            content=task.content,
            path=task.path,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            metric=settings.metric,
        )


def _resolve_decoding_evaluation(
    settings: EvaluationSettings, metrics: tuple[str, ...], max_output_tokens: int, rows: int | None
) -> Evaluation:
    """Return the evaluation of settings: defaults filled in, fields that the decoding ignores None."""
    _check_decoding_settings(settings, settings.metrics or metrics)
    limits = [limit for limit in (settings.examples, rows) if limit is not None]
    samples, beams = settings.decoding == "sample", settings.decoding == "beam"
    length_penalty = 0.6 if settings.length_penalty is None else settings.length_penalty
    return Evaluation(
        decoding=settings.decoding,
        temperature=(settings.temperature or 1.0) if samples else None,
        num_beams=(settings.num_beams or 4) if beams else None,
        length_penalty=length_penalty if beams else None,
        length_penalty_form=settings.length_penalty_form if beams else "transformers",
        split=settings.split,
        examples=min(limits, default=None),
        max_output_tokens=settings.max_output_tokens or max_output_tokens,
        seed=settings.seed if samples else None,
        samples=settings.samples if (settings.samples or 1) > 1 else None,
        calculator=settings.calculator,
        checkpoint=settings.checkpoint,
        metrics=settings.metrics or metrics,
    )


def _check_decoding_settings(settings: EvaluationSettings, metrics: tuple[str, ...]) -> None:
    """Raise ConfigError for samples, self_bleu or calculator that do not fit the decoding."""
    samples = settings.samples or 1
    if samples > 1 and settings.decoding != "sample":
        raise ConfigError(
            f"evaluations: samples: {settings.decoding} decoding gives the same text {samples} times; set "
            "`decoding: sample`, or leave `samples` out"
        )
    if "self_bleu" in metrics and samples == 1:
        raise ConfigError(
            "evaluations: self_bleu compares several completions of one prompt; set `decoding: sample` and, "
            "for example, `samples: 8`"
        )
    if settings.calculator and settings.decoding == "beam":
        raise ConfigError(
            "evaluations: calculator: beam search cannot use it; set `decoding: greedy` or `sample`, or "
            "leave `calculator` out"
        )
