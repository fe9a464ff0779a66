"""Dataset rows to token ids and batches."""
