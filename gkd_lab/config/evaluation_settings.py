"""What a section of an experiment asks to be judged: ways of decoding, and tasks of lm-eval."""

from collections.abc import Iterator

from gkd_lab.config.cell import AnyEvaluation, Evaluation, LmEvalEvaluation
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.lm_eval_task import get_lm_eval_version, resolve_lm_eval_task
from gkd_lab.config.settings import AnyEvaluationSettings, DataSettings, EvaluationSettings, LmEvalSettings


def resolve_evaluations(
    settings: AnyEvaluationSettings, metrics: tuple[str, ...], max_output_tokens: int, rows: DataSettings
) -> Iterator[AnyEvaluation]:
    """One way of decoding, or each task of lm-eval. Raises SpecError."""
    if isinstance(settings, LmEvalSettings):
        yield from resolve_lm_eval_evaluations(settings)
    else:
        yield _resolve_decoding_evaluation(
            settings, metrics, max_output_tokens, getattr(rows, settings.split)
        )


def resolve_lm_eval_evaluations(
    settings: LmEvalSettings, *, trusted: bool = False
) -> Iterator[LmEvalEvaluation]:
    """An evaluation for each task of lm-eval; `trusted` task files may run code. Raises SpecError."""
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
    _check_decoding_settings(settings, settings.metrics or metrics)
    counts = [count for count in (settings.examples, rows) if count is not None]
    sampled, beamed = settings.decoding == "sample", settings.decoding == "beam"
    return Evaluation(
        decoding=settings.decoding,
        temperature=(settings.temperature or 1.0) if sampled else None,
        num_beams=(settings.num_beams or 4) if beamed else None,
        length_penalty=(0.6 if settings.length_penalty is None else settings.length_penalty)
        if beamed
        else None,
        split=settings.split,
        examples=min(counts, default=None),
        max_output_tokens=settings.max_output_tokens or max_output_tokens,
        seed=settings.seed if sampled else None,
        samples=settings.samples if (settings.samples or 1) > 1 else None,
        calculator=settings.calculator,
        metrics=settings.metrics or metrics,
    )


def _check_decoding_settings(settings: EvaluationSettings, metrics: tuple[str, ...]) -> None:
    samples = settings.samples or 1
    if samples > 1 and settings.decoding != "sample":
        raise ConfigError(
            f"evaluations: samples: {samples} texts of a {settings.decoding} search would be one text "
            f"{samples} times; set `decoding: sample`, or leave `samples` out"
        )
    if "self_bleu" in metrics and samples == 1:
        raise ConfigError(
            "evaluations: self_bleu compares several texts of one prompt; "
            "set `decoding: sample` and `samples: 8`, say"
        )
    if settings.calculator and settings.decoding == "beam":
        raise ConfigError(
            "evaluations: calculator: tokens of beams cannot be chosen for them; "
            "set `decoding: greedy` or `sample`, or leave `calculator` out"
        )
