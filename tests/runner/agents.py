"""wandb's command line connected to the test server, with a `gkd-lab` command on the path of its agents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from ..wandb_server import Server

# The polling interval of the client is a constant of 5 s; nothing else is changed.
WANDB_SCRIPT = """
import sys
from wandb import wandb_agent
from wandb.cli.cli import cli
wandb_agent.Agent.POLL_INTERVAL = 0.2
cli(sys.argv[1:])
"""
GKD_LAB_SCRIPT = """#!{python}
import sys
sys.path.insert(0, {root!r})
from gkd_lab.cli import main
main()
"""


class Shell:
    """Shell of a user in `folder`: records in `folder/outputs`, wandb logged in to the server."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.outputs = folder / "outputs"
        program = folder / "bin" / "gkd-lab"
        program.parent.mkdir(parents=True)
        program.write_text(GKD_LAB_SCRIPT.format(python=sys.executable, root=str(Path(__file__).parents[2])))
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
        """Create a sweep by `gkd-lab sweep` and `wandb sweep`; return its path for `wandb agent`."""
        sweep_command = self.gkd_lab("sweep", name)
        assert sweep_command.returncode == 0, sweep_command.stderr
        sweep_file = self.folder / "sweep.yaml"
        sweep_file.write_text(yaml.safe_dump({**yaml.safe_load(sweep_command.stdout), **changes}))
        create_command = self._run([sys.executable, "-c", WANDB_SCRIPT, "sweep", str(sweep_file)])
        match = re.search(r"wandb agent (\S+)", create_command.stderr)
        assert match, create_command.stderr
        return match[1]

    def agent(self, sweep: str) -> subprocess.CompletedProcess[str]:
        """Run `wandb agent` to the end of the sweep."""
        return self._run([sys.executable, "-c", WANDB_SCRIPT, "agent", sweep])

    def agent_beside(self, sweep: str) -> "subprocess.Popen[bytes]":
        """Start `wandb agent` in the background."""
        return subprocess.Popen(
            [sys.executable, "-c", WANDB_SCRIPT, "agent", sweep],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=600
        )
