"""Arithmetic: a step-by-step solution that ends in `#### answer`; only the answer is scored.

A made row is a sum of one-digit numbers. Each step of its solution is the next number and the running sum: 5
added is 8, 9 added is 17. Copying the number makes the task learnable in minutes; with running sums alone a
2-layer model needed several times the steps.
    prompt  3 + 5 + 9 + 1 + 4 + 7 =
    target  5 8 9 17 1 18 4 22 7 29 #### 29
Real rows: GSM8K's `question`, `answer` (without its `<<48/2=24>>` marks unless a calculator is to run),
and SVAMP's `question`, `answer`, where the answer is a bare number and the target `#### 51`.
"""

import random
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from gkd_lab.metrics import extract_answer
from gkd_lab.tasks.made_data import build_generator
from gkd_lab.tasks.scale_defaults import (
    define_pretrained_model,
    define_scratch_model,
    define_smol_models,
    define_students,
)
from gkd_lab.tasks.task import Row, Task, read_text_field

GENERATOR_VERSION = "arithmetic-made-1"
MIN_NUMBERS, MAX_NUMBERS = 6, 10  # in a sum
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"-?[0-9][0-9.,]*")
_SCIENTIFIC_NUMBER = re.compile(r"-?[0-9.]+e\+[0-9]+")  # SVAMP writes 5 of its answers as 2.20906e+07


def is_correct(solution: str, reference: str) -> bool:
    """Return whether the first `#### number` of both texts is equal without commas; False if one has none.

    This is OpenAI's rule for GSM8K.
    """
    answer = extract_answer(solution)
    return answer is not None and answer == extract_answer(reference)


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw GSM8K or SVAMP row as a Row, marks removed; ValueError: missing field, no number."""
    row = parse_row_with_marks(raw)
    solution = _CALCULATOR_MARK.sub("", row.target)
    return Row(row.prompt, solution, (solution,))


def parse_row_with_marks(raw: Mapping[str, Any]) -> Row:
    """Return a raw row as a Row that keeps its `<<48/2=24>>` marks; ValueError as for `parse_row`."""
    question = read_text_field(raw, "question")
    answer = raw.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        raw = {**raw, "answer": f"{answer:.15g}"}
    solution = read_text_field(raw, "answer")
    if _SCIENTIFIC_NUMBER.fullmatch(solution):
        solution = f"{float(solution):.15g}"
    if _NUMBER.fullmatch(solution):
        solution = f"#### {solution}"
    if extract_answer(solution) is None:
        raise ValueError(f"field 'answer' must be a number or end in '#### number', got {solution[-40:]!r}")
    return Row(question, solution, (solution,))


def _draw_chain_sum(random_numbers: random.Random) -> tuple[str, str]:
    """Return a random (prompt, step-by-step solution): a sum of 6 to 10 numbers from 1 to 9."""
    digits = random_numbers.choices(range(1, 10), k=random_numbers.randint(MIN_NUMBERS, MAX_NUMBERS))
    steps = [f"{digit} {total}" for digit, total in zip(digits, accumulate(digits), strict=True)]
    return " + ".join(map(str, digits)) + " =", f"{' '.join(steps[1:])} #### {sum(digits)}"


# The first four chain-of-thought exemplars of Wei et al. (2022), the 4-shot prompt of §A.5.
# ours: they end as GSM8K's solutions do, with marks and `####`, not with "The answer is 6.", so that
# prompt, targets and the rule that reads the answer agree.
EXEMPLARS = (
    {
        "question": "There are 15 trees in the grove. Grove workers will plant trees in the grove today. "
        "After they are done, there will be 21 trees. How many trees did the grove workers plant today?",
        "answer": "There are 15 trees originally. Then there were 21 trees after some more were planted. "
        "So there must have been 21 - 15 = <<21-15=6>>6.\n#### 6",
    },
    {
        "question": "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in "
        "the parking lot?",
        "answer": "There are originally 3 cars. 2 more cars arrive. 3 + 2 = <<3+2=5>>5.\n#### 5",
    },
    {
        "question": "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they "
        "have left in total?",
        "answer": "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had "
        "32 + 42 = <<32+42=74>>74. After eating 35, they had 74 - 35 = <<74-35=39>>39.\n#### 39",
    },
    {
        "question": "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How "
        "many lollipops did Jason give to Denny?",
        "answer": "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave "
        "Denny 20 - 12 = <<20-12=8>>8.\n#### 8",
    },
)

_GREEDY = [{"decoding": "greedy", "split": "test"}]  # Table A.2
_TEACHER_SFT = {"steps": 1000, "batch_size": 64, "learning_rate": 2e-3}
SCALES = {
    "nano": {
        "data": {"source": "made", "train": 20_000, "validation": 500, "test": 1_000},
        "tokenizer": {"kind": "word", "vocab_size": 128},
        "models": {
            "xl": define_scratch_model(2, 128, 4, **_TEACHER_SFT),
            "large": define_scratch_model(2, 96, 4, **_TEACHER_SFT),
            "base": define_scratch_model(2, 64, 4, **_TEACHER_SFT),
            "small": define_scratch_model(2, 48, 4, **_TEACHER_SFT),
        },
        # ours: all 250 by heart. At 3e-3, or with 400 rows, the score depends on the seed (docs/log.md)
        "students": define_students(250, steps=2000, batch_size=32, learning_rate=1e-3),
        "teacher_temperature": 1.0,
        "steps": 400,  # ours: 51 passes over the rows; the paper's GSM8K students have 240
        "batch_size": 32,  # Table A.2
        "learning_rate": 3e-3,  # ours: the best of three over all arms (`rate_choice`)
        "warmup_steps": 20,
        "cooldown_steps": 100,  # the last quarter, as in Table A.2
        "max_input_tokens": 24,
        "max_output_tokens": 24,
        "evaluations": _GREEDY,
        "real": {
            "students": define_students(None, steps=550, batch_size=32, learning_rate=3e-3),
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "data": {"train": None, "validation": 200, "test": 200},
            "max_input_tokens": 192,
            "max_output_tokens": 192,
        },
    },
    "smol": {
        "data": {"source": "openai/gsm8k", "config": "main"},
        "models": define_smol_models(1_000),
        "max_input_tokens": 256,
        "max_output_tokens": 256,
        "evaluations": _GREEDY,
    },
    "paper": {
        "family": "encoder-decoder",  # FLAN-T5 (§4.3)
        # §A.5: 4-shot prompts; the marks are what the external calculator reads.
        # ours: GSM8K's own solutions; those of PaLM-540B that the paper trains on (§4.3) are not public
        "data": {"source": "openai/gsm8k", "config": "main", "shots": 4, "calculator_marks": True},
        "models": {
            # FLAN-T5, fine-tuned for 10K steps on the solutions (§4.3)
            "xl": define_pretrained_model("google/flan-t5-xl", steps=10_000),
            "large": define_pretrained_model("google/flan-t5-large", steps=10_000),
            "base": define_pretrained_model("google/flan-t5-base", steps=10_000),
            "small": define_pretrained_model("google/flan-t5-small", steps=10_000),
        },
        "teacher_temperature": 0.1,  # Table A.2
        "steps": 40_000,  # Table A.2
        "warmup_steps": 2_000,  # Table A.2
        "cooldown_steps": 10_000,  # Table A.2: from 30K to 40K
        "dropout": 0.05,  # Table A.2
        "max_input_tokens": 512,  # Table A.2
        "max_output_tokens": 320,  # Table A.2
        "evaluations": [{**_GREEDY[0], "calculator": True}],  # Table A.2: an external calculator
    },
}

TASK = Task(
    scales=SCALES,
    name="arithmetic",
    family="decoder-only",
    metrics=("accuracy",),
    generators={"made": build_generator(_draw_chain_sum, GENERATOR_VERSION)},
    parse_row=parse_row,
    columns={"prompt": "question", "target": "answer"},
    parse_row_with_marks=parse_row_with_marks,
    exemplars=EXEMPLARS,
    hub_name="openai/gsm8k",
)
