"""What a section of an experiment asks to be judged: ways of decoding, and tasks of lm-eval."""

from collections.abc import Iterator

from gkd_lab.config.cell import AnyEvaluation, Evaluation, HarnessEvaluation
from gkd_lab.config.errors import SpecError
from gkd_lab.config.lm_eval_task import lm_eval_version, lm_task
from gkd_lab.config.settings import AnyEvaluationSettings, DataSettings, EvaluationSettings, HarnessSettings


def evaluations_asked(
    asked: AnyEvaluationSettings, metrics: tuple[str, ...], limit: int, rows: DataSettings
) -> Iterator[AnyEvaluation]:
    """One way of decoding, or each task of lm-eval. Raises SpecError."""
    if isinstance(asked, HarnessSettings):
        yield from harness_evaluations(asked)
    else:
        yield _evaluation(asked, metrics, limit, getattr(rows, asked.split))


def harness_evaluations(asked: HarnessSettings, *, trusted: bool = False) -> Iterator[HarnessEvaluation]:
    """An evaluation for each task of lm-eval; `trusted` task files may run code. Raises SpecError."""
    for name in dict.fromkeys(asked.lm_eval):
        task = lm_task(name, trusted=trusted)
        yield HarnessEvaluation(
            lm_eval=lm_eval_version(),
            task=task.name,
            content=task.content,
            path=task.path,
            limit=asked.limit,
            num_fewshot=asked.num_fewshot,
            metric=asked.metric,
        )


def _evaluation(
    asked: EvaluationSettings, metrics: tuple[str, ...], limit: int, rows: int | None
) -> Evaluation:
    _check_evaluation(asked, asked.metrics or metrics)
    counts = [count for count in (asked.examples, rows) if count is not None]
    sampled, beamed = asked.decoding == "sample", asked.decoding == "beam"
    return Evaluation(
        decoding=asked.decoding,
        temperature=(asked.temperature or 1.0) if sampled else None,
        num_beams=(asked.num_beams or 4) if beamed else None,
        length_penalty=(0.6 if asked.length_penalty is None else asked.length_penalty) if beamed else None,
        split=asked.split,
        examples=min(counts, default=None),
        max_output_tokens=asked.max_output_tokens or limit,
        seed=asked.seed if sampled else None,
        samples=asked.samples if (asked.samples or 1) > 1 else None,
        calculator=asked.calculator,
        metrics=asked.metrics or metrics,
    )


def _check_evaluation(asked: EvaluationSettings, metrics: tuple[str, ...]) -> None:
    samples = asked.samples or 1
    if samples > 1 and asked.decoding != "sample":
        raise SpecError(
            f"evaluations: samples: {samples} texts of a {asked.decoding} search would be one text "
            f"{samples} times; set `decoding: sample`, or leave `samples` out"
        )
    if "self_bleu" in metrics and samples == 1:
        raise SpecError(
            "evaluations: self_bleu compares several texts of one prompt; "
            "set `decoding: sample` and `samples: 8`, say"
        )
    if asked.calculator and asked.decoding == "beam":
        raise SpecError(
            "evaluations: calculator: tokens of beams cannot be chosen for them; "
            "set `decoding: greedy` or `sample`, or leave `calculator` out"
        )
