"""Results table: one row per cell and reference model, built from the records. No torch."""
