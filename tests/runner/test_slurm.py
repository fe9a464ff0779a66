"""Grids on a real Slurm of pretended nodes: placing, requeues after each kind of end, cancelling, attaching.

The units train nothing (`stub_units.py`), except in the last test. All scenarios run at once, each in its own
folder and with its own driver, since most of their time is waiting; each test waits for the end of one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.store import Store
from gkd_lab.tables.table import build_wide_table, encode_table

from .slurm_cluster import Cluster, find_missing_program, run_cluster
from .stub_units import FAILING_FILE
from .tiny_experiments import options, tiny_grid
from .unit_scenarios import PACK, Scenario, run_locally

missing_program = find_missing_program()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_program is not None, reason=f"Slurm is not installed: no {missing_program}"),
]

HERE = Path(__file__).parent
CANCELLED_SECONDS = 180
"""Time for which a cancelled unit is watched."""


def kill_unit(scenario: Scenario, number: int) -> None:
    """A signal to the process of a unit, which is not the cluster's doing."""
    driver = scenario.start_driver()
    os.kill(scenario.wait_for_step(7), number)
    status, output = scenario.finish(driver)
    assert status == 0, output


def preempt_unit(scenario: Scenario) -> None:
    scenario.variables["GKD_STUB_SECONDS"] = "1"
    driver = scenario.start_driver(partition="low", gpus=2)
    scenario.wait_for_step(3)
    words = ["--partition=high", "--gres=gpu:2", "--mem=100M", "--output=/dev/null", "--wrap=sleep 1"]
    scenario.cluster.run("sbatch", *words)
    status, output = scenario.finish(driver)
    assert status == 0, output


def run_into_time_limit(scenario: Scenario) -> None:
    scenario.variables["GKD_STUB_SECONDS"] = "1.6"  # 64 s, of which a minute is allowed
    status, output = scenario.finish(scenario.start_driver(time="1"))
    assert status == 0, output
    assert not any(scenario.files.deaths_folder.iterdir()), "a time limit is no death"


def lose_node(scenario: Scenario) -> None:
    driver = scenario.start_driver(partition="fragile")
    scenario.wait_for_step(7)
    host = scenario.read_runs().host
    scenario.cluster.kill_node(host)
    status, output = scenario.finish(driver)
    assert status == 0, output
    assert scenario.read_runs().host in {"n3", "n4"} - {host}


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


def cancel_unit(scenario: Scenario) -> None:
    """Cancelled by `scancel`, a unit saves, and stays cancelled until the next run."""
    driver = scenario.start_driver()
    scenario.wait_for_step(7)
    job = scenario.files.read_jobs()[scenario.get_pack().id].job
    scenario.cluster.run("scancel", job)
    cancelled = time.monotonic()
    status, output = scenario.finish(driver)
    assert status == 1, output
    assert f"({scenario.get_pack().id}): was cancelled; run again to go on (job {job}, log " in output
    step = scenario.get_step()
    assert (scenario.get_record().steps_folder / f"checkpoint-{step}").exists()
    while time.monotonic() < cancelled + CANCELLED_SECONDS:
        assert len(scenario.read_starts()) == 1
        words = ["squeue", "-h", "-r", "-t", "all", "-o", "%T", "-j", job]
        assert scenario.cluster.run(*words).strip() in ("COMPLETING", "CANCELLED")
        time.sleep(2)
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


def die_every_time(scenario: Scenario) -> str:
    scenario.variables["GKD_STUB_KILL"] = "8"
    status, output = scenario.finish(scenario.start_driver())
    assert status == 1, output
    return output


def use_every_device(scenario: Scenario) -> None:
    status, output = scenario.finish(scenario.start_driver(gpus=1))
    assert status == 0, output


def limit_jobs(scenario: Scenario) -> int:
    """Return the largest number of a grid's jobs that were seen to run at once."""
    driver = scenario.start_driver(max_jobs=2)
    largest = 0
    while driver.poll() is None:
        names = scenario.cluster.run("squeue", "-h", "-r", "-t", "running", "-o", "%j").split()
        largest = max(largest, sum(scenario.grid.name in name for name in names))
        time.sleep(0.3)
    status, output = scenario.finish(driver)
    assert status == 0, output
    return largest


TEACHERS = [{"layers": 1, "width": width, "heads": 2, "sft": {"steps": 4}} for width in (16, 24)]
TWO_TEACHERS = {"grid": {"teacher": TEACHERS, "lmbda": [0], "beta": [0.5]}}
FOUR_CELLS = {"grid": {"lmbda": [0, 1], "beta": [0, 1]}}
STARTS: dict[str, tuple[Callable[[Scenario], Any], dict[str, Any]]] = {
    "scancel": (cancel_unit, {}),
    "time limit": (run_into_time_limit, {}),
    "slurmd killed": (lose_node, {}),
    "preemption": (preempt_unit, {}),
    "kill -9": (lambda scenario: kill_unit(scenario, signal.SIGKILL), {}),
    "SIGTERM": (lambda scenario: kill_unit(scenario, signal.SIGTERM), {}),
    "driver killed": (leave_and_attach, {}),
    "failed teacher": (
        fail_teacher,
        {"changes": {"grid": {"teacher": TEACHERS, "lmbda": [0], "beta": [0.5]}}},
    ),
    "dies every time": (die_every_time, {}),
    "devices": (use_every_device, {"changes": FOUR_CELLS, "pack": "off"}),
    "max jobs": (limit_jobs, {"changes": {**FOUR_CELLS, "name": "limited"}, "pack": "off"}),
}


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster for the tests of this file, if it is named: a run of all tests starts no daemons."""
    if request.config.args == request.config.getini("testpaths"):  # also in a process of xdist
        pytest.skip("starts a Slurm cluster of its own: run .ci/slurm")
    with run_cluster() as running_cluster:
        yield running_cluster


@pytest.fixture(scope="module")
def scenarios(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Scenario, "Future[Any]"]]]:
    """Start all scenarios; name -> scenario and the end of what it does."""
    root = tmp_path_factory.mktemp("slurm")
    with ThreadPoolExecutor(len(STARTS)) as pool:
        started = {}
        for name, (work, fields) in STARTS.items():
            scenario = Scenario(cluster, root / name.replace(" ", "-"), **fields)
            started[name] = scenario, pool.submit(work, scenario)
        yield started


@pytest.fixture(scope="module")
def expected_table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of the units run one after another on this machine."""
    scenario = Scenario(Cluster(Path()), tmp_path_factory.mktemp("local"))
    run_locally(scenario)
    return scenario.read_table()


@pytest.mark.parametrize(
    "name",
    ["kill -9", "SIGTERM", "preemption", "driver killed", "slurmd killed", "time limit", "scancel"],
)
def test_each_end_of_a_unit_leads_to_the_table_of_a_local_run(
    name: str, scenarios: dict[str, tuple[Scenario, "Future[Any]"]], expected_table: bytes
) -> None:
    scenario, future = scenarios[name]
    future.result()
    scenario.assert_each_step_was_logged_once()
    if name != "driver killed":
        scenario.assert_resumed()
    assert scenario.read_table() == expected_table


def test_driver_can_be_left_and_killed_while_the_jobs_go_on(
    scenarios: dict[str, tuple[Scenario, "Future[Any]"]],
) -> None:
    scenario, future = scenarios["driver killed"]
    output = future.result()
    assert "jobs go on; attach: `gkd-lab " in output and "cancel: `scancel " in output
    assert output.count("0 units submitted to Slurm, attached to 1 that run or wait") == 2
    rows = [json.loads(line) for line in scenario.files.jobs_file.read_text().splitlines()]
    submitted = [row["unit"] for row in rows if "ended" not in row]
    assert sorted(submitted) == sorted(unit.id for unit in scenario.units)
    assert scenario.read_runs().requeues == 0


def test_failed_teacher_fails_only_its_own_cells(
    scenarios: dict[str, tuple[Scenario, "Future[Any]"]],
) -> None:
    _, future = scenarios["failed teacher"]
    output = future.result()
    assert "broken on purpose; 1 cell was not run" in output
    assert "not finished" not in output


def test_unit_that_dies_every_time_is_requeued_three_times(
    scenarios: dict[str, tuple[Scenario, "Future[Any]"]],
) -> None:
    scenario, future = scenarios["dies every time"]
    output = future.result()
    assert [start["step"] for start in scenario.read_starts()] == [0, 5, 5, 5]
    assert "was killed, and started again 3 times" in output


def test_four_units_run_on_four_nodes_and_devices(
    scenarios: dict[str, tuple[Scenario, "Future[Any]"]],
) -> None:
    scenario, future = scenarios["devices"]
    future.result()
    packs = [unit for unit in scenario.units if unit.kind == "pack"]
    runs = [scenario.read_runs(unit) for unit in packs]
    assert {(run.host, run.device) for run in runs} == {(n, d) for n in ("n1", "n2") for d in ("0", "1")}


def test_max_jobs_limits_the_jobs_of_all_arrays(
    scenarios: dict[str, tuple[Scenario, "Future[Any]"]],
) -> None:
    _, future = scenarios["max jobs"]
    assert future.result() == 2


@pytest.mark.parametrize(
    ("slurm_options", "message"),
    [
        ({"partition": "mian"}, "Slurm has no such partition; did you mean 'main'"),
        ({"partition": "short", "time": "60"}, "the partition short allows 10: set --time 10"),
        ({"gpus": 9}, "--gpus"),
    ],
    ids=["partition", "time limit", "devices"],
)
def test_refused_requests_are_found_before_anything_is_submitted(
    slurm_options: dict[str, Any], message: str, cluster: Cluster, tmp_path: Path
) -> None:
    scenario = Scenario(cluster, tmp_path)
    status, output = scenario.finish(scenario.start_driver(**slurm_options))
    assert status == 2, output
    assert message in output and len(output.splitlines()) == 1
    assert scenario.files.read_jobs() == {}


def test_silent_controller_is_reported(cluster: Cluster, tmp_path: Path) -> None:
    scenario = Scenario(cluster, tmp_path)
    for file in cluster.folder.glob("*.conf"):
        text = file.read_text().replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=1 # ")
        (tmp_path / file.name).write_text(text)
    scenario.variables["SLURM_CONF"] = str(tmp_path / "slurm.conf")
    status, output = scenario.finish(scenario.start_driver())
    assert status == 2, output
    assert "Slurm's controller does not answer" in output and len(output.splitlines()) == 1


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root may hide a folder")
def test_folder_that_the_nodes_do_not_see_is_reported(cluster: Cluster, tmp_path: Path) -> None:
    """The driver runs in a mount namespace of its own, where the outputs folder is a file system apart."""
    tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0, 1], "beta": [0.5]})
    (tmp_path / "hidden").mkdir()
    words = [
        sys.executable,
        str(HERE / "engine_driver_script.py"),
        "slurm",
        "tiny.yaml",
        "hidden/outputs",
        PACK,
        "{}",
    ]
    environment = {**cluster.environment, "PYTHONPATH": str(HERE.parents[1])}
    script = f'mount -t tmpfs none {tmp_path}/hidden && exec "$@"'
    command = ["unshare", "--mount", "bash", "-c", script, "bash", *words]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    assert "does not see" in process.stderr and "take a file system that the nodes share" in process.stderr


def test_table_of_real_units_equals_that_of_a_local_run(cluster: Cluster, tmp_path: Path) -> None:
    """Submitted with --detach, and followed by a second run."""
    from gkd_lab.runner.run import run_grid

    grid = tiny_grid(tmp_path, "arithmetic", grid={"lmbda": [0, 1], "beta": [0, 1]})
    environment = {**cluster.environment, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gkd_lab", "run", "tiny.yaml", "--executor", "slurm", "--pack", "2"]
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
