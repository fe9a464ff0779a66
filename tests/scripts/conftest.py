"""Fixtures of the user's commands: a folder with a pair and data, and a hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .hub_server import HubServer, run_hub
from .user_pair import write_user_folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with run_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a pair and data, as the current one."""
    write_user_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
