"""Encode dataset rows as token ids, and collate them into batches."""
