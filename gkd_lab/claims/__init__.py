"""Claims C1 to C28 of the paper, judged on its own numbers and on tables. No torch."""
