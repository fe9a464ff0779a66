"""Judge the simulated tables of `calibration.py` by the rules before issue 16, those of commit 72e5606.

    PYTHONPATH=CHECKOUT python benchmarks/calibration_old.py OUT.json TABLES WORKERS CASE ...

`calibration.py --old CHECKOUT` runs it. The old rules read a list of measurements, and resampled examples
where there is one seed.
"""

import json
import math
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from calibration_cases import CASES
from calibration_simulation import Array, Case, Judged, Model, judge_cases

RESAMPLES = 1000
MEASURES = {"self_bleu": "self_bleu", "entailment": "entailment", "step_seconds": "step_time"}
"""Metric -> what it measures, where that is not a model's quality."""


def judge_scores(case: Case, scores: Array, examples: Array | None) -> Judged:
    """Judge (M, S) scores; (M, S, N) scores of examples are read where there is one seed."""
    judge, claims, measurement_type = _load_old_rules()
    measurements = [
        measurement_type(build_figure_cell(case, model), float(scores[n, seed]), seed, 0.0, str(n), "score")
        for n, model in enumerate(case.models)
        for seed in range(case.seeds)
    ]
    resampled = None
    if examples is not None and case.seeds == 1:
        counts = np.random.default_rng(0).multinomial(
            case.examples, np.full(case.examples, 1 / case.examples), RESAMPLES
        )
        resampled = examples[:, 0] @ counts.T / case.examples

    def resample(measurement: Any) -> Array | None:
        """Return the (R,) resampled scores of a measurement's model."""
        return None if resampled is None else resampled[int(measurement.fingerprint)]

    (verdict,) = judge([claims[case.claim]], measurements, resample)
    effect, low, high = (
        math.nan if value is None else float(value) for value in (verdict.effect, verdict.low, verdict.high)
    )
    return Judged(verdict.verdict, effect, low, high)


@cache
def _load_old_rules() -> tuple[Any, Any, Any]:
    """Import (judge, claims, Measurement) of the checkout; the names do not exist in this one."""
    names = (("judge", "judge"), ("definitions", "CLAIMS"), ("measurements", "Measurement"))
    judge, claims, measurement_type = (
        getattr(import_module(f"gkd_lab.claims.{module}"), name) for module, name in names
    )
    return judge, claims, measurement_type


def build_figure_cell(case: Case, model: Model) -> dict[str, Any]:
    """Return the fields by which the old rules recognise a model."""
    settings, metric = model.settings, model.settings["metric"]
    measure = MEASURES.get(metric, "quality")
    shared = {
        "task": settings["task"],
        "metric": "mmlu" if metric == "acc" else "step_time" if measure == "step_time" else metric,
        "measure": measure,
        "student": settings.get("student", "small"),
        "pair": "smaller",
        "decoding": settings["decoding"],
        "temperature": settings.get("temperature"),
        "learning_rate": settings.get("learning_rate"),
        "train_share": _compute_train_share(case, model),
        "role": settings.get("role", "cell"),
    }
    if model.is_reference:
        return shared
    is_seqkd = settings.get("divergence") == "cross_entropy"
    loss = "seqkd" if is_seqkd else "jsd with a reward" if settings.get("reward") else "jsd"
    alpha = settings.get("distillation_share")
    return {**shared, "lmbda": settings["lmbda"], "loss": loss, "beta": settings["beta"], "alpha": alpha}


def _compute_train_share(case: Case, model: Model) -> float | None:
    """Return a model's training rows / the largest number of the case; None without the axis."""
    rows = [other.settings.get("train_rows") for other in case.models]
    counts = [count for count in rows if count is not None]
    return model.settings["train_rows"] / max(counts) if counts else None


def main() -> None:
    """Judge the named cases and write their verdicts as JSON."""
    out, tables, workers, *names = sys.argv[1:]
    cases = [case for case in CASES if case.name in names]
    judged = judge_cases(cases, judge_scores, int(tables), int(workers))
    Path(out).write_text(json.dumps(judged))


if __name__ == "__main__":
    main()
