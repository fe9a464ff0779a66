"""Plain functions over strings: predictions and references in, scores with signatures out.

No torch and no `evaluate` here; the wrapped forms live in gkd_lab/evaluation/evaluate_metrics.py.
"""

from gkd_lab.metrics.answers import extract_answer
from gkd_lab.metrics.text_metrics import METRICS, Score, Scorer, score, score_many

__all__ = ["METRICS", "Score", "Scorer", "extract_answer", "score", "score_many"]
