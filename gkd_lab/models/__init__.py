"""Pairs of models: making, loading, forward passes of both families, and packing many cells in one model."""
