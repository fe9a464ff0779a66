"""Made phrases against German worked out by hand, and the two forms of real rows."""

import random
import re
from string import Formatter

import pytest

from gkd_lab.tasks import get_task, load_rows, phrases
from gkd_lab.tasks.translation import SENTENCE_TEMPLATES, get_generator_version, parse_row

TRANSLATION = get_task("translation")


EUROS = "zwei Euro und fünfunddreißig Cent"
GOLDEN = [
    ("10% of the people in Spain speak Greek", "10 % der Menschen in Spanien sprechen Griechisch"),
    (
        "The fifth letter from Spain came eleven days ago",
        "Der fünfte Brief aus Spanien kam vor elf Tagen",
    ),
    ("I have been learning Greek for six weeks", "Ich lerne seit sechs Wochen Griechisch"),
    ("He has been learning Japanese for four years", "Er lernt seit vier Jahren Japanisch"),
]


def test_made_rows_are_golden() -> None:
    rows = load_rows(TRANSLATION, "made", split="train", count=4)
    assert [(row.prompt, row.target) for row in rows] == GOLDEN


@pytest.mark.parametrize(
    ("pair", "english", "german"),
    [
        (phrases.translate_number(21), "twenty-one", "einundzwanzig"),
        (phrases.translate_number(16), "sixteen", "sechzehn"),
        (phrases.translate_number(30), "thirty", "dreißig"),
        (phrases.translate_ordinal(3), "third", "dritte"),
        (phrases.translate_ordinal(7), "seventh", "siebte"),
        (phrases.translate_date(3, 7), "March 7", "7. März"),
        (phrases.translate_weekday(2), "Wednesday", "Mittwoch"),
        (phrases.translate_quantity(2.5, "length-kilometer"), "2.5 kilometers", "2,5 Kilometer"),
        (phrases.translate_period(2, "duration-day"), "two days", "zwei Tagen"),
        (phrases.translate_period(3, "duration-week"), "three weeks", "drei Wochen"),
        (phrases.translate_period(5, "duration-month"), "five months", "fünf Monaten"),
        (phrases.translate_period(12, "duration-year"), "twelve years", "zwölf Jahren"),
        (phrases.translate_money(2, "EUR", 35), "two euros and thirty-five cents", EUROS),
        (phrases.translate_money(31, "USD"), "thirty-one US dollars", "einunddreißig US-Dollar"),
        (phrases.translate_money(20, "CHF"), "twenty Swiss francs", "zwanzig Schweizer Franken"),
        (phrases.translate_percent(25), "25%", "25 %"),
        (phrases.translate_clock_time(3, 0), "three o'clock", "drei Uhr"),
        (phrases.translate_clock_time(3, 30), "half past three", "halb vier"),
        (phrases.translate_clock_time(12, 30), "half past twelve", "halb eins"),
        (phrases.translate_clock_time(9, 15), "quarter past nine", "Viertel nach neun"),
        (phrases.translate_clock_time(12, 45), "quarter to one", "Viertel vor eins"),
        (phrases.translate_clock_time(8, 25), "eight twenty-five", "acht Uhr fünfundzwanzig"),
        (phrases.translate_country("GR"), "Greece", "Griechenland"),
        (phrases.translate_language("sv"), "Swedish", "Schwedisch"),
    ],
)
def test_german_phrases_are_correct(pair: tuple[str, str], english: str, german: str) -> None:
    assert pair == (english, german)


# (template, person, slots in both languages, the sentences they must make)
BY_HAND = [
    (2, 2, {"date": ("March 7", "7. März"), "country": ("Japan", "Japan")},
     "on March 7 she will travel to Japan", "am 7. März wird sie nach Japan reisen"),
    (2, 4, {"date": ("March 7", "7. März"), "country": ("Japan", "Japan")},
     "on March 7 they will travel to Japan", "am 7. März werden sie nach Japan reisen"),
    (4, 1, {"vehicle": phrases.VEHICLES[2], "time": phrases.translate_clock_time(6, 30)},
     "he heard that the ferry arrives at half past six",
     "er hat gehört, dass die Fähre um halb sieben ankommt"),
    (8, 0, {"ordinal": phrases.translate_ordinal(2), "measure": ("1.5 liters of milk", "1,5 Liter Milch")},
     "I need 1.5 liters of milk for the second cake",
     "für den zweiten Kuchen brauche ich 1,5 Liter Milch"),
    (9, 0, {"ordinal": phrases.translate_ordinal(5), "country": phrases.translate_country("EG"),
            "period": phrases.translate_period(2, "duration-day")},
     "the fifth letter from Egypt came two days ago",
     "der fünfte Brief aus Ägypten kam vor zwei Tagen"),
    (10, 3, {"weekday": phrases.translate_weekday(4), "goods": phrases.GOODS[1],
             "money": phrases.translate_money(21, "CHF")},
     "if we come on Friday, the books cost twenty-one Swiss francs",
     "wenn wir am Freitag kommen, kosten die Bücher einundzwanzig Schweizer Franken"),
    (11, 0, {"number": phrases.translate_number(12), "goods": phrases.GOODS[3],
             "country": phrases.translate_country("FR"), "weekday": phrases.translate_weekday(0)},
     "I want to buy twelve chairs in France on Monday",
     "ich will am Montag in Frankreich zwölf Stühle kaufen"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "person", "slots", "english", "german"), BY_HAND)
def test_whole_sentences_are_correct(
    template: int, person: int, slots: dict[str, phrases.Translation], english: str, german: str
) -> None:
    for side, expected in enumerate((english, german)):
        values = {name: pair[side] for name, pair in slots.items()}
        sentence = SENTENCE_TEMPLATES[template][side].format_map(phrases.PERSONS[person][side] | values)
        assert sentence == expected


def test_templates_use_existing_slots_in_both_languages() -> None:
    english_slots, german_slots = phrases.draw_slots(random.Random(0))
    for english, german in SENTENCE_TEMPLATES:
        assert _slots(english) <= set(english_slots)
        assert _slots(german) <= set(german_slots)


def _slots(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def test_sentences_are_short_and_the_vocabulary_small() -> None:
    rows = load_rows(TRANSLATION, "made", split="train", count=5000)
    lengths = [len(text.split()) for row in rows for text in (row.prompt, row.target)]
    words = {word for row in rows for word in re.findall(r"\w+", f"{row.prompt} {row.target}")}
    assert set(lengths) <= set(range(5, 15))
    assert len(words) < 400
    assert not any("\u00a0" in row.target or "{" in row.target for row in rows)


def test_the_version_names_the_libraries_that_write_the_words() -> None:
    assert re.fullmatch(r"translation-made-1\+babel-[\d.]+\+num2words-[\d.]+", get_generator_version())


def test_both_formats_of_a_real_row_give_the_same_row() -> None:
    pair = {"en": "a house", "de": "ein Haus"}
    assert parse_row(pair) == parse_row({"translation": pair})
    assert (parse_row(pair).prompt, parse_row(pair).references) == ("a house", ("ein Haus",))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"en": "a", "fr": "b"}, "no field 'de'"),
        ({"en": "a", "de": "  "}, "field 'de' is empty"),
        ({"translation": "a ||| b"}, "field 'translation' must"),
        ({"en": "a", "de": 3}, "got int 3"),
    ],
)
def test_an_invalid_row_is_refused_with_the_reason(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_row(raw)
