"""Records become one tidy table. No torch."""
