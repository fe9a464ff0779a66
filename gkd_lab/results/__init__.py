"""Reading runs back: table, statistics, figures, report. pandas lives here, no torch.

Nothing is imported on the way in, so that `rows`, which must answer at once, loads no pandas.
"""
