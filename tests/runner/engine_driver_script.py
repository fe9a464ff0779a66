"""Run an experiment as `gkd-lab run EXP --executor slurm|ray` does, with the units of stub_units.py.

    python engine_driver_script.py ENGINE EXPERIMENT OUTPUTS PACK OPTIONS

OPTIONS is JSON: fields of `SlurmOptions`, `detach` and `cancel`.
"""

import json
import sys
from pathlib import Path

from gkd_lab import experiments
from gkd_lab.cli.cluster_run import ClusterRequest, build_unit_words, run_on_ray, run_on_slurm
from gkd_lab.cli.exit_status import exit_for_error
from gkd_lab.config import ConfigError
from gkd_lab.config.packs import parse_pack_limit
from gkd_lab.runner.engines.slurm_script import SlurmOptions

STUB_PROGRAM = (sys.executable, str(Path(__file__).with_name("stub_units.py")))


def main() -> None:
    engine, name, outputs, pack = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    options = json.loads(sys.argv[5])
    detach, cancel = options.pop("detach", False), options.pop("cancel", False)
    request = ClusterRequest(
        grid=experiments.load(name, outputs=outputs),
        limit=parse_pack_limit(pack),
        outputs=outputs,
        options=SlurmOptions(**{**options, "sbatch": tuple(options.get("sbatch", ()))}),
        words=build_unit_words(name, None, (), outputs, pack, ()),
        detach=detach,
        cancel=cancel,
        program=STUB_PROGRAM,
        poll_seconds=1.0,
    )
    try:
        (run_on_slurm if engine == "slurm" else run_on_ray)(request)
    except ConfigError as error:
        exit_for_error(error)


if __name__ == "__main__":
    import typer

    try:
        main()
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
