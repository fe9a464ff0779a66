"""Names of the metrics of classifiers, apart from what computes them: numpy loads with that."""

OF_LABELS = ("label_accuracy", "f1_macro", "f1_binary", "matthews")
"""The whole text is the label."""
OF_TAGS = ("tag_accuracy", "tag_f1_macro")
"""The text is one tag for each token, between blanks."""
OF_NUMBERS = ("pearson", "spearman")
"""The text is a number."""
CLASSIFICATION_METRICS = (*OF_LABELS, *OF_TAGS, *OF_NUMBERS)
