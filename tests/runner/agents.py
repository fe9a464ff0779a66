"""wandb's own command line against the server of the tests, and a `gkd-lab` on the path of its agents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from ..wandb_server import Server

# The interval is a constant of the client's, 5 s; nothing else of it is changed.
WANDB = """
import sys
from wandb import wandb_agent
from wandb.cli.cli import cli
wandb_agent.Agent.POLL_INTERVAL = 0.2
cli(sys.argv[1:])
"""
GKD_LAB = """#!{python}
import sys
sys.path.insert(0, {root!r})
from gkd_lab.cli import main
main()
"""


class Shell:
    """A user's shell in `folder`: records in `folder/outputs`, wandb logged in at the server."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.outputs = folder / "outputs"
        program = folder / "bin" / "gkd-lab"
        program.parent.mkdir(parents=True)
        program.write_text(GKD_LAB.format(python=sys.executable, root=str(Path(__file__).parents[2])))
        program.chmod(0o755)
        self.environment = {
            **server.environment(folder / "home"),
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "GKD_LAB_OUTPUTS": str(self.outputs),
            "OMP_NUM_THREADS": "1",
            "WANDB_AGENT_DISABLE_FLAPPING": "true",
        }
        (folder / "home").mkdir()

    def gkd_lab(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._run(["gkd-lab", *words])

    def sweep(self, name: str, **changes: object) -> str:
        """`gkd-lab sweep NAME > sweep.yaml; wandb sweep sweep.yaml`; returns what an agent is given."""
        printed = self.gkd_lab("sweep", name)
        assert printed.returncode == 0, printed.stderr
        place = self.folder / "sweep.yaml"
        place.write_text(yaml.safe_dump({**yaml.safe_load(printed.stdout), **changes}))
        done = self._run([sys.executable, "-c", WANDB, "sweep", str(place)])
        found = re.search(r"wandb agent (\S+)", done.stderr)
        assert found, done.stderr
        return found[1]

    def agent(self, sweep: str) -> subprocess.CompletedProcess[str]:
        """`wandb agent`, to the end of the sweep."""
        return self._run([sys.executable, "-c", WANDB, "agent", sweep])

    def agent_beside(self, sweep: str) -> "subprocess.Popen[bytes]":
        """The same, while this process goes on."""
        return subprocess.Popen(
            [sys.executable, "-c", WANDB, "agent", sweep],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=600
        )
