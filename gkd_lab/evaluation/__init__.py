"""Judging a trained model: decoding, and the metrics as `evaluate.Metric`s."""
