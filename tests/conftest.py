"""No test asks a network, a tracker or the settings of the machine that it runs on."""

import gc
import os

import pytest

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
}
os.environ.update(OFFLINE)
os.environ.pop("GKD_LAB_OUTPUTS", None)


@pytest.fixture(scope="module", autouse=True)
def exclude_loaded_objects_from_garbage_collection() -> None:
    """Let `gc.collect`, which every training and evaluation calls, skip the objects of imported libraries."""
    gc.collect()
    gc.freeze()
