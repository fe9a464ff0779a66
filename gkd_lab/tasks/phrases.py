"""Phrases of the made translation sentences, in English and German (task translation).

Numbers and ordinals are from num2words; dates, units, money, countries and languages from babel. Genders,
conjugation, dative plurals and times of day are written out here, as neither library has them. `draw_slots`
draws a phrase for each slot of the templates in translation.py, which make rows such as:
    prompt  The ship leaves at quarter to five on Saturday
    target  Das Schiff fährt am Samstag um Viertel vor fünf ab
"""

import random
from datetime import date
from functools import cache

from babel import Locale
from babel.dates import format_date
from babel.numbers import format_percent, get_currency_name
from babel.units import format_unit
from num2words import num2words

Translation = tuple[str, str]  # English, German

TERRITORIES = ("FR", "IT", "ES", "PL", "JP", "BR", "GR", "NO", "EG", "CA")
LANGUAGES = ("fr", "it", "es", "pl", "ja", "pt", "el", "no", "sv", "ru")
CURRENCIES = ("EUR", "USD", "CHF")
LARGEST_NUMBER = 39  # every number word is one word of the vocabulary
LAST_DAY = 28  # so that every month has it
PERCENTAGES = (10, 20, 25, 30, 40, 50, 75, 90)

VEHICLES: tuple[Translation, ...] = (
    ("the train", "der Zug"),
    ("the bus", "der Bus"),
    ("the ferry", "die Fähre"),
    ("the ship", "das Schiff"),
)
GOODS: tuple[Translation, ...] = (
    ("tickets", "Karten"),
    ("books", "Bücher"),
    ("apples", "Äpfel"),
    ("chairs", "Stühle"),
    ("lamps", "Lampen"),
    ("bottles", "Flaschen"),
)
MEASURED_GOODS: tuple[tuple[str, Translation], ...] = (
    ("mass-kilogram", ("flour", "Mehl")),
    ("mass-kilogram", ("sugar", "Zucker")),
    ("volume-liter", ("milk", "Milch")),
    ("volume-liter", ("water", "Wasser")),
)
PERIODS = ("duration-day", "duration-week", "duration-month", "duration-year")

# English and German forms of each person; `sie` is "she" and "they", told apart by the verb.
_SINGULAR = {"have": "has", "need": "needs", "come": "comes", "want": "wants"}
_PLURAL = {verb: verb for verb in _SINGULAR}
_GERMAN_VERBS = ("haben", "werden", "lernen", "brauchen", "kommen", "wollen")
_ICH = ("habe", "werde", "lerne", "brauche", "komme", "will")
_ER = ("hat", "wird", "lernt", "braucht", "kommt", "will")
PERSONS = tuple(
    ({"who": english, **forms}, {"who": german, **dict(zip(_GERMAN_VERBS, verbs, strict=True))})
    for english, forms, german, verbs in (
        ("I", _PLURAL, "ich", _ICH),
        ("he", _SINGULAR, "er", _ER),
        ("she", _SINGULAR, "sie", _ER),
        ("we", _PLURAL, "wir", _GERMAN_VERBS),
        ("they", _PLURAL, "sie", _GERMAN_VERBS),
    )
)


def _replace_narrow_spaces(text: str) -> str:
    """Return the text with no-break spaces (U+00A0, U+202F) replaced by plain ones."""
    return text.replace("\u00a0", " ").replace("\u202f", " ")


@cache
def translate_number(value: int) -> Translation:
    """Return a cardinal number in English and German words: 21 is ("twenty-one", "einundzwanzig")."""
    return num2words(value, lang="en"), num2words(value, lang="de")


@cache
def translate_ordinal(value: int) -> Translation:
    """Return an ordinal in English and German (weak nominative) words: 3 is ("third", "dritte")."""
    return num2words(value, lang="en", to="ordinal"), num2words(value, lang="de", to="ordinal")


@cache
def translate_date(month: int, day: int) -> Translation:
    """Return a date without its year, English and German: ("March 7", "7. März")."""
    value = date(2024, month, day)
    return format_date(value, "MMMM d", "en"), format_date(value, "d. MMMM", "de")


@cache
def translate_weekday(index: int) -> Translation:
    """Return a weekday, 0 is Monday, in English and German: ("Monday", "Montag")."""
    value = date(2024, 1, 1 + index)  # 1 January 2024 was a Monday
    return format_date(value, "EEEE", "en"), format_date(value, "EEEE", "de")


@cache
def translate_quantity(value: float, unit: str) -> Translation:
    """Return a decimal with its unit, English and German: ("2.5 kilometers", "2,5 Kilometer")."""
    return format_unit(value, unit, "long", locale="en"), format_unit(value, unit, locale="de")


@cache
def translate_period(value: int, unit: str) -> Translation:
    """Return at least 2 units of time, English and German (dative): ("two days", "zwei Tagen")."""
    english, german = translate_quantity(value, unit)
    german_unit = german.split()[1]
    dative = german_unit if german_unit.endswith("n") else german_unit + "n"
    return f"{translate_number(value)[0]} {english.split()[1]}", f"{translate_number(value)[1]} {dative}"


@cache
def translate_money(value: int, currency: str, cents: int = 0) -> Translation:
    """Return an amount of 2 or more: ("two euros and ten cents", "zwei Euro und zehn Cent")."""
    english, german = (
        f"{translate_number(value)[place]} {get_currency_name(currency, count=value, locale=locale)}"
        for place, locale in enumerate(("en", "de"))
    )
    if not cents:
        return english, german
    return (
        f"{english} and {translate_number(cents)[0]} cents",
        f"{german} und {translate_number(cents)[1]} Cent",
    )


@cache
def translate_percent(value: int) -> Translation:
    """Return a percentage, English and German: ("25%", "25 %")."""
    return format_percent(value / 100, locale="en"), _replace_narrow_spaces(
        format_percent(value / 100, locale="de")
    )


@cache
def translate_clock_time(hour: int, minute: int) -> Translation:
    """Return a time of day in words, hour 2 to 12: 3:30 is ("half past three", "halb vier")."""
    (english, german), following = translate_number(hour), translate_number(hour % 12 + 1)
    if minute == 0:
        return f"{english} o'clock", f"{german} Uhr"
    if minute == 15:
        return f"quarter past {english}", f"Viertel nach {german}"
    if minute == 30:
        return f"half past {english}", f"halb {following[1]}"
    if minute == 45:
        return f"quarter to {following[0]}", f"Viertel vor {following[1]}"
    return f"{english} {translate_number(minute)[0]}", f"{german} Uhr {translate_number(minute)[1]}"


@cache
def translate_country(code: str) -> Translation:
    """Return a country's English and German names: FR is ("France", "Frankreich")."""
    return Locale("en").territories[code], Locale("de").territories[code]


@cache
def translate_language(code: str) -> Translation:
    """Return a language's English and German names: fr is ("French", "Französisch")."""
    return Locale("en").languages[code], Locale("de").languages[code]


def _draw_money(random_numbers: random.Random) -> Translation:
    """Return a random amount of money in words, (English, German); of euros mostly with cents."""
    currency = random_numbers.choice(CURRENCIES)
    cents = random_numbers.choice((0, 10, 20, 25, 30, 35)) if currency == "EUR" else 0
    return translate_money(random_numbers.randint(2, LARGEST_NUMBER), currency, cents)


def _draw_measure(random_numbers: random.Random) -> Translation:
    """Return a random amount of a good: ("2.5 kilograms of flour", "2,5 Kilogramm Mehl")."""
    unit, (english_good, german_good) = random_numbers.choice(MEASURED_GOODS)
    english, german = translate_quantity(random_numbers.randint(1, 9) + 0.5, unit)
    return f"{english} of {english_good}", f"{german} {german_good}"


def draw_slots(random_numbers: random.Random) -> tuple[dict[str, str], dict[str, str]]:
    """Return random phrases for the templates as (English, German), each slot -> phrase."""
    choice, randint = random_numbers.choice, random_numbers.randint
    english, german = (dict(forms) for forms in choice(PERSONS))
    translations = {
        "number": translate_number(randint(2, LARGEST_NUMBER)),
        "ordinal": translate_ordinal(randint(2, 7)),
        "date": translate_date(randint(1, 12), randint(1, LAST_DAY)),
        "weekday": translate_weekday(randint(0, 6)),
        "time": translate_clock_time(randint(2, 12), choice((0, 10, 15, 20, 25, 30, 35, 45))),
        "period": translate_period(randint(2, 12), choice(PERIODS)),
        "money": _draw_money(random_numbers),
        "measure": _draw_measure(random_numbers),
        "distance": translate_quantity(randint(1, 9) + 0.5, "length-kilometer"),
        "percent": translate_percent(choice(PERCENTAGES)),
        "country": translate_country(choice(TERRITORIES)),
        "language": translate_language(choice(LANGUAGES)),
        "vehicle": choice(VEHICLES),
        "goods": choice(GOODS),
    }
    for slot, (english_phrase, german_phrase) in translations.items():
        english[slot], german[slot] = english_phrase, german_phrase
    return english, german
