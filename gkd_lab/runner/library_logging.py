"""Silence the notes and progress bars of third-party libraries; their errors stay visible."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Show only errors of transformers, datasets, accelerate and trl, and none of their progress bars."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\..*")
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("transformers", "datasets", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
