"""Counters of energy are read where there are any, also when they begin again."""

from pathlib import Path

from gkd_lab.store.usage import UsageMeter


def counter(powercap: Path, zone: str, microjoules: int) -> None:
    folder = powercap / zone
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")


def test_energy_is_that_of_the_packages_and_a_counter_may_begin_again(tmp_path: Path) -> None:
    for zone, start in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_000_000), ("intel-rapl:0:0", 0)):
        counter(tmp_path, zone, start)
    meter = UsageMeter(tmp_path)
    for zone, now in (
        ("intel-rapl:0", 3_500_000),
        ("intel-rapl:1", 1_000_000),
        ("intel-rapl:0:0", 2_000_000),
    ):
        counter(tmp_path, zone, now)
    assert meter.read_usage()["cpu_joules"] == 2.5 + 2.0


def test_without_counters_there_are_only_times(tmp_path: Path) -> None:
    found = UsageMeter(tmp_path).read_usage()
    assert set(found) == {"seconds", "cpu_seconds"}
    assert min(found.values()) >= 0
