"""What the libraries below say of themselves, kept off a user's screen; warnings that matter stay."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Errors only from transformers and datasets, no progress bars but ours, no notes on renamed fields."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\..*")
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("transformers", "datasets", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
