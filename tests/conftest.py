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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, so that no process ends with one while the others wait."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(scope="module", autouse=True)
def exclude_loaded_objects_from_garbage_collection() -> None:
    """Let `gc.collect`, which every training and evaluation calls, skip the objects of imported libraries."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After a run of all tests, say which committed tables are not what today's code would make."""
    if terminalreporter.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    from gkd_lab.tables.staleness import list_stale_tables

    stale_tables = list_stale_tables()
    if stale_tables:
        terminalreporter.section("tables in analysis/tables that are stale")
        for name, reasons in stale_tables.items():
            terminalreporter.line(f"{name}: {'; '.join(reasons)}")
