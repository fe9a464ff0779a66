"""The HTML report, comparisons of records, and helpers of the notebooks. No torch."""
