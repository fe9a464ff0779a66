"""The paper's claims C1 to C28, judged on a table. No torch."""
