"""Tasks and metrics start at once: nothing heavy is imported before it is used."""

import subprocess
import sys

BLOCKED = ("torch", "transformers", "datasets", "evaluate", "pandas", "pyarrow", "numpy", "babel")


def test_tasks_and_metrics_work_without_heavy_packages() -> None:
    code = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # importing it raises ImportError
import gkd_lab.metrics, gkd_lab.tasks
task = gkd_lab.tasks.get_task("arithmetic")
rows = gkd_lab.tasks.load_rows(task, "made", split="test", count=3)
texts = [row.target for row in rows]
score = gkd_lab.metrics.score("accuracy", texts, [row.references for row in rows])
assert score.value == 100, score
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
