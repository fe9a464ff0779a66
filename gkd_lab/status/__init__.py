"""State, cost and integrity of an experiment's cells. No torch.

overview        `build_overview`: progress, packs and estimated times of a grid
cell_status     progress of one cell
time_estimates  training times from finished cells, else from FLOPs
render          tables and lines as plain text
power_listing   text of `plan --power`
terminal        tables in a terminal, `status --watch`
verify          `verify_records`: compare records with their fingerprints, hashes and scores
"""
