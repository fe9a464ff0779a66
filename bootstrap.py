"""Create the environment, install the package and run a command, from a bare Python.

Uses the standard library only, and Python 3.6 can parse it, so that an old Python gets a message instead of a
syntax error. A stamp per set of extras, written last, makes the second run fast; an environment
whose installation was interrupted is created again.
"""

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

USAGE = """usage: python3 bootstrap.py COMMAND

  quickstart         install, run the quickstart experiment, write its report
  test [ARGS]        install with the dev extra, run the tests (ARGS go to pytest)
  check              the same, with ruff, its formatter and mypy before the tests
  install [EXTRAS]   only install, with extras such as dev or peft,ray

The environment is .venv here, or the folder that GKD_LAB_VENV names."""

ROOT = Path(__file__).resolve().parent
VENV = Path(os.path.abspath(os.path.expanduser(os.environ.get("GKD_LAB_VENV") or ROOT / ".venv")))
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
CREATED = VENV / ".gkd-lab-made"  # this script created the environment, so it may replace it
UNFINISHED = VENV / ".gkd-lab-unfinished"  # an installation has started and not ended
LOG = VENV / ".gkd-lab-pip.log"


def say(message):
    """Print a message to stdout."""
    print("gkd-lab: " + message, flush=True)


def refuse(message, status=2):
    """Print a message to stderr and exit."""
    print("gkd-lab: " + message, file=sys.stderr)
    raise SystemExit(status)


def run(*command, log=None):
    """Run a command; return its exit status, 128 + N after signal N. Ctrl-C is left to the command."""
    start, interrupted = time.monotonic(), False
    parts = [str(part) for part in command]
    output = {"stdout": log, "stderr": subprocess.STDOUT} if log else {}
    with subprocess.Popen(parts, cwd=str(ROOT), **output) as child:
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            try:
                status = child.wait(20 if log else None)
                return 128 - status if status < 0 else 130 if status and interrupted else status
            except subprocess.TimeoutExpired:
                say(f"  {time.monotonic() - start:3.0f} s  {latest_step()}")
            except KeyboardInterrupt:
                interrupted = True


def latest_step():
    """Return the last line of pip's log that is neither a detail nor a warning."""
    lines = LOG.read_text().splitlines()
    steps = [line for line in lines if line[:1].isalpha() and not line.startswith("WARNING")]
    return steps[-1].partition(":")[0][:70] if steps else "starting"


def create_environment():
    """Create the environment, unless a complete one exists."""
    import venv

    interrupted = CREATED.exists() and UNFINISHED.exists()
    if PYTHON.exists() and not interrupted:
        return
    if VENV.exists() and not CREATED.exists() and (VENV.is_file() or any(VENV.iterdir())):
        refuse(f"{VENV} exists and is no environment; choose another folder in GKD_LAB_VENV")
    say(f"creating the environment {VENV}")
    if VENV.exists():
        shutil.rmtree(str(VENV))
    VENV.mkdir(parents=True)
    CREATED.touch()
    UNFINISHED.touch()
    venv.create(str(VENV), with_pip=importlib.util.find_spec("ensurepip") is not None)


def build_pip_command():
    """Return the command of the environment's pip; without ensurepip, of this Python's pip applied to it."""
    silence = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.call([str(PYTHON), "-m", "pip", "--version"], **silence) == 0:
        return [PYTHON, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        refuse("this Python has neither ensurepip nor pip: install pip, then run this again", 1)
    return [sys.executable, "-m", "pip", "--python", PYTHON]


def install(names=()):
    """Install this checkout in editable mode, unless it is unchanged since the last installation."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name in names:
        if name not in extras:
            refuse(f"no extra is called {name!r}; there are: {', '.join(extras)}")
    create_environment()
    inputs = [VENV / "pyvenv.cfg", ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    state = hashlib.sha256(b"\0".join([bytes(ROOT), *(p.read_bytes() for p in inputs)])).hexdigest()
    stamp = VENV / "-".join([".gkd-lab-installed", *names])
    if stamp.exists() and stamp.read_text() == state and not UNFINISHED.exists():
        return
    say(f"installing, 3 to 6 minutes the first time; pip writes to {LOG}")
    UNFINISHED.touch()
    target = f".[{','.join(names)}]" if names else "."
    with open(str(LOG), "w") as log:
        command = [*build_pip_command(), "install", "--no-input", "-c", "constraints.txt", "-e", target]
        status = run(*command, log=log)
    if status > 128:
        refuse("the installation was interrupted; run the same command to start again", status)
    UNFINISHED.unlink()  # pip undoes an installation that fails
    if status:
        errors = [line for line in LOG.read_text().splitlines() if line.startswith("ERROR")]
        refuse("\n".join(["pip could not install gkd-lab:", *errors[:5], f"More in {LOG}"]), 1)
    stamp.write_text(state)


def main(command="", *arguments):
    """Run a command of USAGE; return its exit status."""
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    max_arguments = {"quickstart": 0, "test": None, "check": 0, "install": 1}
    if command not in max_arguments:
        refuse(f"no command is called {command!r}\n\n{USAGE}")
    if max_arguments[command] is not None and len(arguments) > max_arguments[command]:
        refuse(f"{command} does not take {arguments[-1]!r}\n\n{USAGE}")
    if command == "install":
        install(sorted(set(",".join(arguments).split(",")) - {""}))
        say(f"installed in {VENV}")
        return 0
    install([] if command == "quickstart" else ["dev"])
    if command == "quickstart":
        gkd_lab = BIN / "gkd-lab"
        return run(gkd_lab, "run", "quickstart") or run(gkd_lab, "report", "quickstart")
    # One process per core with one thread each: these models are too small for more threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Files go to the processes whole, for their fixtures, and in the order of tests/conftest.py.
    tests = ["pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    if command == "test":
        return run(PYTHON, "-m", *(["pytest", *arguments] if arguments else tests))
    steps = [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], tests]
    return max([run(PYTHON, "-m", *step) for step in steps])


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  pip has not checked the version yet
        refuse(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    try:
        sys.exit(main(*sys.argv[1:]))
    except (OSError, subprocess.CalledProcessError) as error:
        refuse(f"the environment {VENV} could not be created: {error}", 1)
    except KeyboardInterrupt:
        refuse("interrupted; run the same command again", 130)
