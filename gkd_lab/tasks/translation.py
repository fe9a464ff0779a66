"""Translation from English to German: made sentences (phrases.py) or real pairs.

A made row has 5 to 14 words per language, of about 400 different words. The languages differ as real ones do:
verbs at the end, inverted number words, cases, dates, half hours.
    prompt  The ferry from Norway arrives at half past three on March 7
    target  Die Fähre aus Norwegen kommt am 7. März um halb vier an
Real rows: `en`, `de`, or the hub's `{"translation": {"en": ..., "de": ...}}` (WMT14 de-en). No prefix is
added: an instruction that a model needs belongs to the model.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gkd_lab.tasks.made_data import build_generator
from gkd_lab.tasks.scale_defaults import (
    define_pretrained_model,
    define_scratch_model,
    define_smol_models,
    define_students,
)
from gkd_lab.tasks.task import Row, Task, read_text_field

GENERATOR_VERSION = "translation-made-1"

# Sentences in both languages; phrases.py draws their slots.
SENTENCE_TEMPLATES = (
    ("{vehicle} leaves at {time} on {weekday}", "{vehicle} fährt am {weekday} um {time} ab"),
    (
        "{vehicle} from {country} arrives at {time} on {date}",
        "{vehicle} aus {country} kommt am {date} um {time} an",
    ),
    (
        "on {date} {who} will travel to {country}",
        "am {date} {werden} {who} nach {country} reisen",
    ),
    (
        "{who} bought {number} {goods} for {money}",
        "{who} {haben} {number} {goods} für {money} gekauft",
    ),
    (
        "{who} heard that {vehicle} arrives at {time}",
        "{who} {haben} gehört, dass {vehicle} um {time} ankommt",
    ),
    (
        "{percent} of the people in {country} speak {language}",
        "{percent} der Menschen in {country} sprechen {language}",
    ),
    (
        "{who} {have} been learning {language} for {period}",
        "{who} {lernen} seit {period} {language}",
    ),
    (
        "the {ordinal} house is {distance} from the station",
        "das {ordinal} Haus ist {distance} vom Bahnhof entfernt",
    ),
    (
        "{who} {need} {measure} for the {ordinal} cake",
        "für den {ordinal}n Kuchen {brauchen} {who} {measure}",
    ),
    (
        "the {ordinal} letter from {country} came {period} ago",
        "der {ordinal} Brief aus {country} kam vor {period}",
    ),
    (
        "if {who} {come} on {weekday}, the {goods} cost {money}",
        "wenn {who} am {weekday} {kommen}, kosten die {goods} {money}",
    ),
    (
        "{who} {want} to buy {number} {goods} in {country} on {weekday}",
        "{who} {wollen} am {weekday} in {country} {number} {goods} kaufen",
    ),
)


def parse_row(raw: Mapping[str, Any]) -> Row:
    """Return a raw row with `en` and `de` (perhaps under `translation`) as a Row; ValueError otherwise."""
    pair = raw.get("translation", raw)
    if not isinstance(pair, Mapping):
        raise ValueError(f"field 'translation' must hold 'en' and 'de', got {pair!r:.60}")
    target = read_text_field(pair, "de")
    return Row(read_text_field(pair, "en"), target, (target,))


def _capitalize_first_letter(text: str) -> str:
    """Return the text with its first letter capitalized and the others unchanged."""
    return text[0].upper() + text[1:]


def _draw_sentence_pair(random_numbers: random.Random) -> tuple[str, str]:
    """Return a random (English sentence, German translation) from a template."""
    from gkd_lab.tasks.phrases import draw_slots  # loads babel and num2words

    english, german = random_numbers.choice(SENTENCE_TEMPLATES)
    english_slots, german_slots = draw_slots(random_numbers)
    return (
        _capitalize_first_letter(english.format_map(english_slots)),
        _capitalize_first_letter(german.format_map(german_slots)),
    )


def get_generator_version() -> str:
    """Return the versions of the generator, babel and num2words, which write its words, as one text."""
    from importlib.metadata import version

    return f"{GENERATOR_VERSION}+babel-{version('babel')}+num2words-{version('num2words')}"


_BEAM = [{"decoding": "beam", "num_beams": 4, "length_penalty": 0.6, "split": "test"}]
_TEACHER_SFT = {"steps": 900, "batch_size": 32, "learning_rate": 2e-3}
SCALES = {
    "nano": {
        "data": {"source": "made", "train": 20_000, "validation": 500, "test": 500},
        "tokenizer": {"kind": "bpe", "vocab_size": 640},
        "models": {
            "xl": define_scratch_model(2, 64, 4, **_TEACHER_SFT),
            "large": define_scratch_model(2, 64, 4, **_TEACHER_SFT),
            "base": define_scratch_model(2, 56, 4, **_TEACHER_SFT),
            "small": define_scratch_model(2, 48, 4, **_TEACHER_SFT),
        },
        "students": define_students(500, steps=1200, batch_size=32, learning_rate=2e-3),
        "teacher_temperature": 1.0,  # Table A.3
        "steps": 300,  # ours: 9.6 passes over the rows
        "batch_size": 16,
        "learning_rate": 3e-3,  # ours: the best of three over all arms (`rate_choice`)
        "warmup_steps": 20,
        "cooldown_steps": 75,
        "max_input_tokens": 32,
        "max_output_tokens": 32,
        "evaluations": _BEAM,
        "real": {
            "students": define_students(None, steps=180, batch_size=32, learning_rate=2e-3),
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "data": {"train": None, "validation": 200, "test": 200},
            "max_input_tokens": 80,  # Table A.3
            "max_output_tokens": 80,  # Table A.3
        },
    },
    "smol": {
        "data": {"source": "wmt/wmt14", "config": "de-en"},
        "models": define_smol_models(2_000),  # ours: SmolLM2 knows no German
        "max_input_tokens": 128,
        "max_output_tokens": 128,
        "evaluations": [{"decoding": "greedy", "split": "test"}],
    },
    "paper": {
        "data": {"source": "wmt/wmt14", "config": "de-en"},
        "models": {
            # T5 v1.1 LM-adapted, fine-tuned on WMT (§4.2)
            "xl": define_pretrained_model("google/t5-xl-lm-adapt", steps=50_000),
            "large": define_pretrained_model("google/t5-large-lm-adapt", steps=110_000),
            "base": define_pretrained_model("google/t5-base-lm-adapt", steps=250_000),
            "small": define_pretrained_model("google/t5-small-lm-adapt", steps=250_000),
        },
        "teacher_temperature": 1.0,  # Table A.3
        "steps": 100_000,  # Table A.3
        "warmup_steps": 5_000,  # Table A.3
        "cooldown_steps": 0,  # Table A.3 lists none
        "dropout": 0.0,  # Table A.3
        "max_input_tokens": 80,  # Table A.3
        "max_output_tokens": 80,  # Table A.3
        # Table A.3: validation, beam search as Raffel et al. 2020 (beam 4, length penalty 0.6 as Wu et al.)
        "evaluations": [{**_BEAM[0], "length_penalty_form": "wu", "split": "validation"}],
    },
}

TASK = Task(
    scales=SCALES,
    name="translation",
    family="encoder-decoder",
    metrics=("bleu", "chrf"),
    generators={
        "made": replace(
            build_generator(_draw_sentence_pair, GENERATOR_VERSION),
            get_version=lambda _: get_generator_version(),
        )
    },
    parse_row=parse_row,
    columns={"prompt": "en", "target": "de"},
    hub_name="wmt/wmt14",
)
