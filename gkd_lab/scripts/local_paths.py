"""Names that may be a path of this machine or a name of the hub, and the path that was probably meant."""

import difflib
from pathlib import Path


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a path: one of the hub has a single slash and no such start."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def suggest_path(name: str) -> str:
    """Return ` (did you mean PATH?)` with the nearest name beside a path that does not exist, or nothing."""
    path = Path(name).expanduser()
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {str(path.parent / nearest[0])!r}?)" if nearest else ""
