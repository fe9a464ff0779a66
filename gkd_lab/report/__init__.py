"""Text about runs and their scores. No torch.

html_report    `write_report`: one HTML page of a grid, from `summary_text`, `samples` and the figures
comparison     `compare_records`: two records, their difference with its interval over examples
comparison_text  prints a comparison, or writes it as JSON
notebooks      functions of the notebooks in `analysis/`
"""
