"""Grids on a real Ray of two pretended nodes: placing, retries after each kind of end, cancelling, attaching.

The units train nothing (`stub_units.py`), except in the last test. Scenarios run at once, each in a folder
and with a driver of its own. Skipped where Ray is not installed or does not start: its raylet gives up on a
busy machine.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from gkd_lab.store import Store
from gkd_lab.store.files import read_json_lines
from gkd_lab.tables.table import build_wide_table, encode_table

from .ray_cluster import HOSTS, RayCluster, run_ray_cluster
from .stub_units import FAILING_FILE
from .tiny_experiments import options, tiny_grid
from .unit_scenarios import HERE, Scenario, run_locally

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]


def end_unit(scenario: Scenario, number: int) -> None:
    """A signal to the process of a unit, which is not the cluster's doing."""
    driver = scenario.start_driver()
    os.kill(scenario.wait_for_step(7), number)
    status, output = scenario.finish(driver)
    assert status == 0, output


def read_queue_column(scenario: Scenario) -> list[str]:
    """Return what `status` shows of the queue for each unit of a grid."""
    root = str(HERE.parents[1])
    process = subprocess.run(
        [sys.executable, "-m", "gkd_lab", "status", f"{scenario.grid.name}.yaml"],
        cwd=scenario.folder,
        env={"PYTHONPATH": root, **scenario.cluster.environment, "COLUMNS": "400"},
        capture_output=True,
        text=True,
    )
    lines = process.stdout.splitlines()
    (header,) = (number for number, line in enumerate(lines) if line.startswith("unit "))
    column = lines[header].index("queue")
    return [line[column:].split(maxsplit=1)[0] for line in lines[header + 1 :] if line.strip()]


def kill_worker(scenario: Scenario) -> None:
    """Ray's worker dies, and its child with it: another one goes on from the last checkpoint."""
    driver = scenario.start_driver()
    child = psutil.Process(scenario.wait_for_step(7))
    worker = child.parent()
    assert worker is not None
    worker.kill()
    child.wait(60)
    status, output = scenario.finish(driver)
    assert status == 0, output


def lose_node(scenario: Scenario) -> None:
    driver = scenario.start_driver(gpus=1)
    scenario.wait_until(
        lambda: any(scenario.read_runs(unit).host.endswith(HOSTS[1]) for unit in scenario.units)
    )
    time.sleep(2)
    scenario.cluster.kill_node(HOSTS[1])
    status, output = scenario.finish(driver)
    assert status == 0, output


def leave_and_attach(scenario: Scenario) -> str:
    """Ctrl-C, then a driver that is killed, then one that ends; the jobs are the same throughout."""
    first = scenario.start_driver()
    scenario.wait_for_step(3)
    first.send_signal(signal.SIGINT)
    status, output = scenario.finish(first)
    assert status == 130, output
    second = scenario.start_driver()
    scenario.wait_until(lambda: "attached to" in scenario.log.read_text())
    second.kill()
    second.wait()
    status, output = scenario.finish(scenario.start_driver())
    assert status == 0, output
    return output


def cancel_units(scenario: Scenario) -> None:
    """Cancelled, a unit saves, and stays cancelled until the next run."""
    driver = scenario.start_driver()
    scenario.wait_for_step(2)
    assert read_queue_column(scenario)[-1] == "RUNNING"
    scenario.wait_for_step(7)
    status, output = scenario.finish(scenario.start_driver(cancel=True))
    assert status == 0, output
    status, output = scenario.finish(driver)
    assert status == 1, output
    assert f"({scenario.get_pack().id}): was cancelled; run again to go on" in output
    step = scenario.get_step()
    assert (scenario.get_record().steps_folder / f"checkpoint-{step}").exists()
    assert read_queue_column(scenario)[-1] == "CANCELLED"
    time.sleep(10)
    assert len(scenario.read_starts()) == 1
    status, output = scenario.finish(scenario.start_driver())
    assert status == 0, output
    assert scenario.read_starts()[-1]["step"] == step


def fail_teacher(scenario: Scenario) -> str:
    failing = scenario.grid.cells[0].training.teacher
    (scenario.folder / FAILING_FILE).write_text(failing.fingerprint)
    status, output = scenario.finish(scenario.start_driver())
    assert status == 1, output
    for cell in scenario.grid.cells:
        expected = "missing" if cell.training.teacher == failing else "done"
        assert scenario.get_record(cell).read_state() == expected
    return output


def use_every_device(scenario: Scenario) -> None:
    status, output = scenario.finish(scenario.start_driver(gpus=1))
    assert status == 0, output


def limit_jobs(scenario: Scenario) -> None:
    status, output = scenario.finish(scenario.start_driver(max_jobs=1))
    assert status == 0, output


TEACHERS = [{"layers": 1, "width": width, "heads": 2, "sft": {"steps": 4}} for width in (16, 24)]
FOUR_CELLS = {"grid": {"lmbda": [0, 1], "beta": [0, 1]}}
STARTS: dict[str, tuple[Callable[[Scenario], Any], dict[str, Any]]] = {
    "cancel": (cancel_units, {}),
    "worker killed": (kill_worker, {}),
    "kill -9": (lambda scenario: end_unit(scenario, signal.SIGKILL), {}),
    "SIGTERM": (lambda scenario: end_unit(scenario, signal.SIGTERM), {}),
    "driver killed": (leave_and_attach, {}),
    "failed teacher": (
        fail_teacher,
        {"changes": {"grid": {"teacher": TEACHERS, "lmbda": [0], "beta": [0.5]}}},
    ),
    "max jobs": (limit_jobs, {"changes": {**FOUR_CELLS, "name": "limited"}, "pack": "off"}),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    try:
        with run_ray_cluster() as running_cluster:
            yield running_cluster
    except TimeoutError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scenarios(
    cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Scenario, "Future[Any]"]]]:
    """Start all scenarios; name -> scenario and the end of what it does."""
    root = tmp_path_factory.mktemp("ray")
    with ThreadPoolExecutor(len(STARTS)) as pool:
        started = {}
        for name, (work, fields) in STARTS.items():
            scenario = Scenario(cluster, root / name.replace(" ", "-"), engine="ray", **fields)
            started[name] = scenario, pool.submit(work, scenario)
        yield started


@pytest.fixture(scope="module")
def expected_table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of the units run one after another on this machine."""
    scenario = Scenario(None, tmp_path_factory.mktemp("local"))
    run_locally(scenario)
    return scenario.read_table()


@pytest.mark.parametrize("name", ["kill -9", "SIGTERM", "worker killed", "driver killed", "cancel"])
def test_each_end_of_a_unit_leads_to_the_table_of_a_local_run(
    name: str, scenarios: dict[str, tuple[Scenario, "Future[Any]"]], expected_table: bytes
) -> None:
    scenario, future = scenarios[name]
    future.result()
    scenario.assert_each_step_was_logged_once()
    if name != "driver killed":
        scenario.assert_resumed()
    assert scenario.read_table() == expected_table


def test_driver_can_be_left_and_killed_while_the_tasks_go_on(
    scenarios: dict[str, tuple[Scenario, "Future[Any]"]],
) -> None:
    scenario, future = scenarios["driver killed"]
    output = future.result()
    assert "jobs go on; attach: `gkd-lab " in output and " --cancel`" in output
    assert "0 units submitted to Ray, attached to 1 that run or wait" in output
    submitted = [row["unit"] for row in read_json_lines(scenario.files.jobs_file) if "ended" not in row]
    assert sorted(submitted) == sorted(unit.id for unit in scenario.units)
    assert scenario.read_runs().requeues == 0


def test_failed_teacher_fails_only_its_own_cells(
    scenarios: dict[str, tuple[Scenario, "Future[Any]"]],
) -> None:
    _, future = scenarios["failed teacher"]
    output = future.result()
    assert "broken on purpose; 1 cell was not run" in output
    assert "not finished" not in output


def test_one_job_at_a_time(scenarios: dict[str, tuple[Scenario, "Future[Any]"]]) -> None:
    scenario, future = scenarios["max jobs"]
    future.result()
    files = [scenario.files.folder / "runs" / f"{unit.id}.jsonl" for unit in scenario.units]
    rows = [row for file in files for row in read_json_lines(file)]
    events = [row["event"] for row in sorted(rows, key=lambda row: float(row["time"]))]
    assert events == ["start", "end"] * len(scenario.units)


def test_four_units_run_on_four_nodes_and_devices(
    cluster: RayCluster, tmp_path: Path, scenarios: dict[str, tuple[Scenario, "Future[Any]"]]
) -> None:
    wait([future for _, future in scenarios.values()])  # their units would take devices
    scenario = Scenario(cluster, tmp_path, changes=FOUR_CELLS, pack="off", engine="ray")
    use_every_device(scenario)
    packs = [unit for unit in scenario.units if unit.kind == "pack"]
    runs = [scenario.read_runs(unit) for unit in packs]
    places = {(run.host.split()[-1], run.device) for run in runs}
    assert places == {(host, device) for host in HOSTS for device in ("0", "1")}


@pytest.mark.parametrize(
    ("engine_options", "address", "message"),
    [
        ({"gpus": 9}, None, "no node has 9 GPUs"),
        ({"mem": "900G"}, None, "no node has 0 GPUs, 900.0 GiB"),
        ({}, "127.0.0.2:1", "start one with `ray start --head`"),
    ],
    ids=["devices", "memory", "address"],
)
def test_refused_requests_are_found_before_anything_is_submitted(
    engine_options: dict[str, Any], address: str | None, message: str, cluster: RayCluster, tmp_path: Path
) -> None:
    scenario = Scenario(cluster, tmp_path, engine="ray")
    if address is not None:
        scenario.variables["RAY_ADDRESS"] = address
    status, output = scenario.finish(scenario.start_driver(**engine_options))
    assert status == 2, output
    assert message in output and len(output.splitlines()) == 1
    assert scenario.files.read_jobs() == {}


def test_table_of_real_units_equals_that_of_a_local_run(cluster: RayCluster, tmp_path: Path) -> None:
    """Submitted with --detach, and followed by a second run."""
    from gkd_lab.runner.run import run_grid

    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0, 1], "beta": [0, 1]})
    root = str(HERE.parents[1])
    python_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**cluster.environment, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gkd_lab", "run", "tiny.yaml", "--executor", "ray", "--pack", "2"]
    for words in (["--detach"], []):
        process = subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert process.returncode == 0, process.stderr
    assert "all 4 cells are done" in process.stderr
    local = Store(tmp_path / "local")
    assert run_grid(grid, options(local.root, pack=2)).failures == []
    table = encode_table(build_wide_table(grid, Store(tmp_path / "outputs")), "csv")
    assert table == encode_table(build_wide_table(grid, local), "csv")


def test_units_of_a_lost_node_go_on_on_another(cluster: RayCluster, tmp_path: Path) -> None:
    """Last, as it leaves one node."""
    scenario = Scenario(cluster, tmp_path, changes=FOUR_CELLS, pack="off", engine="ray")
    lose_node(scenario)
    scenario.assert_each_step_was_logged_once()
    restarted = [unit for unit in scenario.units if scenario.read_runs(unit).requeues]
    assert restarted and all(scenario.read_runs(unit).host.endswith(HOSTS[0]) for unit in restarted)
