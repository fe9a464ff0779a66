"""Names of the metrics of classifiers, apart from what computes them: numpy loads with that."""

LABEL_METRICS = ("label_accuracy", "f1_macro", "f1_binary", "matthews")
"""The whole text is the label."""
TAG_METRICS = ("tag_accuracy", "tag_f1_macro")
"""The text is one tag for each token, between blanks."""
CORRELATION_METRICS = ("pearson", "spearman")
"""The text is a number."""
CLASSIFICATION_METRICS = (*LABEL_METRICS, *TAG_METRICS, *CORRELATION_METRICS)
