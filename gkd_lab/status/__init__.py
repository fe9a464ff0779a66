"""Status, plan and verification of an experiment's cells. No torch."""
