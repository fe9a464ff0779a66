"""Files of a model or data set of the hub that this machine has already, by the layout of the hub's client.

Nothing is asked of the network. https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import os
from pathlib import Path
from typing import Literal


def is_hub_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids to ask the hub, by the values that its client takes for true."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def find_cached_snapshot(kind: Literal["model", "dataset"], name: str, revision: str | None) -> Path | None:
    """Return the folder of a commit's files in the local hub cache; None if it has none of them.

    It holds the files that were fetched, which may be some of the commit's alone.
    """
    from huggingface_hub import constants

    folder = f"{kind}s--{name.replace('/', '--')}"
    snapshot = Path(constants.HF_HUB_CACHE, folder, "snapshots", revision or "none")
    return snapshot if snapshot.is_dir() and any(snapshot.iterdir()) else None
