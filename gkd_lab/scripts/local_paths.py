"""Names that may be a path of this machine or a name of the hub, and the path that was probably meant."""

from gkd_lab.config.errors import suggest_sibling


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a path: one of the hub has a single slash and no such start."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def suggest_path(name: str) -> str:
    """Return ` (did you mean PATH?)` with the nearest name beside a path that does not exist, or nothing."""
    nearest = suggest_sibling(name)
    return "" if nearest is None else f" (did you mean {nearest!r}?)"
