"""GKDTrainer: sampling, packed optimization and checkpoints on transformers' Trainer."""
