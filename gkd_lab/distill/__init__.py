"""The paper: divergences, who writes the sequence, and the one trainer."""
