"""Summarization into one sentence: made event reports (events.py), installed docstrings, or real documents.

A made report has 3 to 5 sentences; its summary names who, what, where, when and how many.
    prompt  The weather was cold. A fire broke out at the museum in Turin on Monday morning. A
            driver named Keller led 12 people out of the building. The next meeting is on Friday.
    target  Driver Keller saves 12 people from fire at Turin museum on Monday.
The source `docstrings` pairs the prose of a docstring with its first line (docstrings.py). Real rows have
`document`, `summary` and optionally a list of `references`, as SciTLDR and XSum do.
"""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gkd_lab.tasks import events
from gkd_lab.tasks.made_data import assign_split, build_generator
from gkd_lab.tasks.scale_defaults import (
    define_pretrained_model,
    define_scratch_model,
    define_smol_models,
    define_students,
)
from gkd_lab.tasks.task import Row, RowGenerator, Split, Task, read_references, read_text_field

GENERATOR_VERSION = "summarization-made-1"


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw row with `document`, `summary`, optional `references` as a Row; ValueError otherwise."""
    document, summary = read_text_field(raw, "document"), read_text_field(raw, "summary")
    return Row(document, summary, read_references(raw, summary))


def _draw_report(random_numbers: random.Random) -> tuple[str, str]:
    """Return a random (event report, one-sentence summary), with 1 to 3 asides in the report."""
    facts = events.draw_facts(random_numbers)
    kind = random_numbers.choice(events.EVENT_KINDS)
    sentences = [random_numbers.choice(kind.leads), random_numbers.choice(kind.details)]
    asides = random_numbers.sample(events.ASIDES, random_numbers.randint(1, 3))
    for aside in asides:
        sentences.insert(random_numbers.randint(0, len(sentences)), aside)
    return " ".join(sentences).format_map(facts), kind.summary.format_map(facts)


def read_docstring_rows(split: Split, cache: Path | None = None) -> Iterator[Row]:
    """Yield the docstring rows (body -> first line) of `split`, in a fixed order that mixes the packages."""
    from gkd_lab.tasks import docstrings  # loads ast, inspect and more

    for body, first_line in docstrings.load_pairs(cache):
        if assign_split(body) == split:
            yield Row(body, first_line, (first_line,))


def get_docstrings_version(cache: Path | None = None) -> str:
    """Return the packages' versions and the SHA-256 of all pairs as one text."""
    from gkd_lab.tasks import docstrings

    return docstrings.compute_version(cache)


_GREEDY = [{"decoding": "greedy", "split": "test"}]
_TEACHER_SFT = {"steps": 900, "batch_size": 32, "learning_rate": 2e-3}
SCALES = {
    "nano": {
        "data": {"source": "made", "train": 20_000, "validation": 500, "test": 500},
        "tokenizer": {"kind": "bpe", "vocab_size": 768},
        "models": {
            # ours: width 64, because width 128 stays on a plateau where it copies the wrong name
            "xl": define_scratch_model(2, 64, 4, **_TEACHER_SFT),
            "large": define_scratch_model(2, 64, 4, **_TEACHER_SFT),
            "base": define_scratch_model(2, 56, 4, **_TEACHER_SFT),
            "small": define_scratch_model(2, 48, 4, **_TEACHER_SFT),
        },
        "students": define_students(400, steps=1000, batch_size=32, learning_rate=2e-3),
        "teacher_temperature": 1.0,  # Table A.1, for greedy evaluation (§A.4)
        "steps": 200,  # ours: 8 passes over the rows; the paper's XSum students have 6
        "batch_size": 16,
        "learning_rate": 3e-3,  # ours: the best of three over all arms (`rate_choice`)
        "warmup_steps": 20,
        "cooldown_steps": 50,
        "max_input_tokens": 96,
        "max_output_tokens": 32,
        "evaluations": _GREEDY,
        "real": {
            "students": define_students(None, steps=250, batch_size=32, learning_rate=2e-3),
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "data": {"train": None, "validation": 200, "test": 200},
            "max_input_tokens": 256,
            "max_output_tokens": 64,  # Table A.1
        },
    },
    "smol": {
        "data": {"source": "EdinburghNLP/xsum"},
        "models": define_smol_models(1_000),
        "max_input_tokens": 512,
        "max_output_tokens": 64,  # Table A.1
        "evaluations": _GREEDY,
    },
    "paper": {
        "data": {"source": "EdinburghNLP/xsum"},
        "models": {
            # T5 v1.1 LM-adapted, fine-tuned on XSum (§4.1)
            "xl": define_pretrained_model("google/t5-xl-lm-adapt", steps=8_000),
            "large": define_pretrained_model("google/t5-large-lm-adapt", steps=38_000),
            "base": define_pretrained_model("google/t5-base-lm-adapt", steps=50_000),
            "small": define_pretrained_model("google/t5-small-lm-adapt", steps=100_000),
        },
        "teacher_temperature": 1.0,  # Table A.1, for greedy evaluation
        "steps": 40_000,  # Table A.1
        "warmup_steps": 2_000,  # Table A.1
        "cooldown_steps": 10_000,  # Table A.1: from 30K to 40K
        "dropout": 0.0,  # Table A.1
        "max_input_tokens": 1024,  # Table A.1
        "max_output_tokens": 64,  # Table A.1
        "per_student": {
            # Table A.1: 1e-3 for T5-small, but 3e-4 with reverse KL
            "small": {"learning_rate": 1e-3, "reverse_kl": {"learning_rate": 3e-4}},
        },
        "evaluations": [{**_GREEDY[0], "split": "validation"}],  # Table A.1
    },
}

TASK = Task(
    scales=SCALES,
    name="summarization",
    family="encoder-decoder",
    metrics=("rouge2", "rouge1", "rougeL"),
    generators={
        "made": build_generator(_draw_report, GENERATOR_VERSION),
        "docstrings": RowGenerator(
            lambda _, split, cache: read_docstring_rows(split, cache),
            get_docstrings_version,
            is_endless=False,
        ),
    },
    parse_row=parse_row,
    columns={"prompt": "document", "target": "summary", "references": "references"},
    hub_name="EdinburghNLP/xsum",
)
