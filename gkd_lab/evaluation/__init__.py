"""Evaluate trained models: decoding, a calculator, classification, lm-eval, and metrics for `evaluate`."""
