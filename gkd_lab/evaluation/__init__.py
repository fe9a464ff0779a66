"""Judging a trained model: decoding, the metrics as `evaluate.Metric`s, lm-eval."""
