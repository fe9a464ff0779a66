"""Instruction following: questions of several kinds, scored by exact match, also on held-out kinds.

Made rows are from reasoning-gym. `train` and `validation` have the kinds of HELD_IN, `test` those of
HELD_OUT: the evaluation `greedy@validation` measures trained instructions and `greedy` new ones, such as sums
in other words or a common multiple instead of a divisor.
    prompt  Find the Greatest Common Divisor (GCD) of these numbers: 56, 36. Give only the GCD ...
    target  4
Real rows: `inputs`, `targets` (FLAN), or `question`, `answer` with or without `choices` (MMLU, BBH).
"""

import random
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gkd_lab.tasks.made_data import draw_rows
from gkd_lab.tasks.scale_defaults import (
    define_pretrained_model,
    define_scratch_model,
    define_smol_models,
    define_students,
)
from gkd_lab.tasks.task import Row, RowGenerator, Split, Task, read_text_field

REASONING_GYM_VERSION = "0.1.25"
"""Required release of reasoning-gym: its texts change between releases."""
GENERATOR_VERSION = f"instruction-made-1+reasoning-gym-{REASONING_GYM_VERSION}"

_TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
QuestionKinds = Mapping[str, Mapping[str, Any]]
HELD_IN: QuestionKinds = {
    "chain_sum": _TWO_DIGITS,
    "family_relationships": {"min_family_size": 3, "max_family_size": 3},
    "gcd": {"max_value": 40},
    "number_filtering": {
        "min_numbers": 2,
        "max_numbers": 3,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 20,
    },
}
HELD_OUT: QuestionKinds = {
    "basic_arithmetic": {
        **_TWO_DIGITS,
        "operators": ("+", "-"),
        "allow_parentheses": False,
        "allow_negation": False,
    },
    "lcm": {"max_value": 20},
}


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw FLAN, MMLU or BBH row as a Row; ValueError: no field, or the answer is not a choice."""
    if "inputs" in raw or "targets" in raw:
        prompt, target = read_text_field(raw, "inputs"), read_text_field(raw, "targets")
    else:
        prompt, target = read_text_field(raw, "question"), read_text_field(raw, "answer")
    if raw.get("choices") is not None:
        prompt = _append_choices(prompt, target, raw["choices"])
    return Row(prompt, target, (target,))


def _append_choices(question: str, answer: str, choices: Any) -> str:
    """Return the question with one lettered choice per line and `Answer:` (Hendrycks et al. 2021)."""
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"field 'choices' must be a list of texts, got {choices!r:.60}")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    if answer not in set(letters):
        raise ValueError(f"field 'answer' must be one of {', '.join(letters)}, got {answer!r:.60}")
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([question, *lines, "Answer:"])


def check_reasoning_gym() -> None:
    """Raise ValueError unless the required release of reasoning-gym is installed."""
    try:
        installed = version("reasoning-gym")
    except PackageNotFoundError:
        installed = "none"
    if installed != REASONING_GYM_VERSION:
        raise ValueError(
            f"the made rows of instruction need reasoning-gym {REASONING_GYM_VERSION} (installed: "
            f"{installed}): pip install 'gkd-lab[reasoning]'"
        )


@cache
def _create_generator(kind: str, split: Split) -> Any:
    """Return reasoning-gym's endless data set of one kind of question; cached."""
    from reasoning_gym import create_dataset  # loads sympy and more

    settings = (HELD_OUT if split == "test" else HELD_IN)[kind]
    return create_dataset(kind, seed=0, size=1, **settings)


def generate_rows(seed: int, split: Split) -> Iterator[Row]:
    """Yield rows of the split's kinds of questions without end, each kind with equal probability."""
    kinds = tuple(HELD_OUT if split == "test" else HELD_IN)

    def draw_pair(random_numbers: random.Random) -> tuple[str, str]:
        """Return a random (question, answer)."""
        generator = _create_generator(random_numbers.choice(kinds), split)
        # An item depends on its number alone, which may exceed the size that a data set states.
        item = generator[random_numbers.getrandbits(48)]
        return " ".join(item["question"].split()), item["answer"]

    return draw_rows(draw_pair, GENERATOR_VERSION, seed, split, split_by_prompt=split != "test")


_GREEDY = {"decoding": "greedy"}
SCALES = {
    "nano": {
        "data": {"source": "made", "train": 10_000, "validation": 300, "test": 300},
        "tokenizer": {"kind": "bpe", "vocab_size": 512},
        "models": {
            "xl": define_scratch_model(2, 64, 4, steps=1500, batch_size=32, learning_rate=2e-3),
            "large": define_scratch_model(2, 64, 4, steps=200, batch_size=32, learning_rate=2e-3),
            "base": define_scratch_model(2, 56, 4, steps=200, batch_size=32, learning_rate=2e-3),
            "small": define_scratch_model(2, 48, 4, steps=200, batch_size=32, learning_rate=2e-3),
        },
        # A student has its rows by heart, and scores half of what its teacher does on the trained kinds.
        "students": define_students(500, steps=1500, batch_size=32, learning_rate=1e-3),
        "teacher_temperature": 1.0,  # Table A.4
        "steps": 300,  # ours: 9.6 passes over the rows
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "cooldown_steps": 75,
        "max_input_tokens": 64,
        "max_output_tokens": 16,
        # Known kinds first, then new ones: the first evaluation is the one that figures show.
        "evaluations": [{**_GREEDY, "split": "validation"}, {**_GREEDY, "split": "test"}],
        "real": {
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "data": {"train": None, "validation": 200, "test": 200},
            "students": define_students(None, steps=200, batch_size=32, learning_rate=2e-3),
            "max_input_tokens": 256,
            "max_output_tokens": 64,
            "evaluations": [{**_GREEDY, "split": "test"}],
        },
    },
    "smol": {
        "data": {"source": "Muennighoff/flan"},
        "models": define_smol_models(2_000),
        "max_input_tokens": 512,
        "max_output_tokens": 128,
        "evaluations": [{**_GREEDY, "split": "test"}],
    },
    "paper": {
        "data": {"source": "Muennighoff/flan"},  # FLAN2021 (§4.4): `inputs`, `targets`, `task`
        "models": {
            # FLAN-T5 as released, without fine-tuning (§4.4)
            "xl": define_pretrained_model("google/flan-t5-xl"),
            "large": define_pretrained_model("google/flan-t5-large"),
            "base": define_pretrained_model("google/flan-t5-base"),
            "small": define_pretrained_model("google/flan-t5-small"),
        },
        "student": "base",  # Fig. A.11
        "beta": 1.0,  # reverse KL, the best on FLAN (Fig. A.11)
        "teacher_temperature": 1.0,  # Table A.4
        "steps": 50_000,  # Table A.4
        "batch_size": 128,  # Table A.4
        "learning_rate": 1e-4,  # Table A.4
        "warmup_steps": 0,  # Table A.4: none
        "cooldown_steps": 0,  # Table A.4 lists none
        "dropout": 0.0,  # Table A.4
        "max_input_tokens": 2048,  # Table A.4
        "max_output_tokens": 256,  # Table A.4
        # Fig. A.11: few-shot, direct answers, greedy; the shots of Chung et al. (2022), 5 and 3.
        # ours: MMLU by the likelihood of each choice, because lm-eval has no score for all 57 subjects
        # of its generated form
        "evaluations": [
            {"lm_eval": ["mmlu"], "num_fewshot": 5, "metric": "acc"},
            {"lm_eval": ["bbh_fewshot"], "metric": "exact_match"},
        ],
    },
}

TASK = Task(
    scales=SCALES,
    name="instruction",
    family="encoder-decoder",
    metrics=("exact_match",),
    generators={
        "made": RowGenerator(
            lambda seed, split, _: generate_rows(seed, split),
            lambda _: GENERATOR_VERSION,
            check_dependencies=check_reasoning_gym,
        )
    },
    parse_row=parse_row,
    columns={"prompt": "inputs", "target": "targets"},
    hub_name="Muennighoff/flan",
)
