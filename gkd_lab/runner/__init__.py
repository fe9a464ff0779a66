"""Run an experiment: artifacts, packs of cells, evaluation, workers and trackers."""
