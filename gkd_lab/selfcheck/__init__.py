"""`gkd-lab selfcheck`: the trainer's invariances, measured on a user's own pair of models."""
