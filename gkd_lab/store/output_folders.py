"""Check and create the folders that a request names for its files."""

import tempfile
from pathlib import Path

from gkd_lab.config import ConfigError


def check_outputs_folder(outputs: Path) -> None:
    """Raise ConfigError if the outputs folder is a file; a missing folder is fine."""
    if outputs.exists() and not outputs.is_dir():
        raise ConfigError(f"--outputs {str(outputs)!r} is a file; expected a folder, or none yet")


def create_outputs_folder(outputs: Path) -> Path:
    """Create the outputs folder, test that it is writable, and return it. Raises ConfigError."""
    return create_writable_folder(
        outputs, "--outputs", "choose another folder with --outputs or GKD_LAB_OUTPUTS"
    )


def create_writable_folder(folder: Path, option: str, advice: str) -> Path:
    """Create a folder, test that it is writable, and return it.

    Raises ConfigError that begins with the option that names the folder, and ends with the advice.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b".")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{option} {str(folder)!r}: cannot write there: {reason}; {advice}") from error
    return folder
