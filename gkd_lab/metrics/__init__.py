"""Metrics of texts: predictions and references in, scores with signatures out. No torch, no `evaluate`.

METRICS is the registry; gkd_lab/evaluation/evaluate_metrics.py wraps the metrics for `evaluate`.
"""

from gkd_lab.metrics.answers import extract_answer
from gkd_lab.metrics.score import MetricInput, Score
from gkd_lab.metrics.text_metrics import METRICS, Metric, Scorer, score, score_many

__all__ = ["METRICS", "Metric", "MetricInput", "Score", "Scorer", "extract_answer", "score", "score_many"]
