"""The paper's figures, drawn from a table with matplotlib. No torch."""
