"""No test asks a network, a tracker or the settings of the machine that it runs on."""

import os

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
