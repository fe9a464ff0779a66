"""Means, paired differences, intervals and tests over a table. No torch."""
