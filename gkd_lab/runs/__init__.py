"""Doing it: artifacts, packs of cells, evaluation, and the order in which an experiment is run."""
