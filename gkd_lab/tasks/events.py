"""Vocabulary of the made event reports (task summarization), and the function that draws a report's facts.

Names, places and numbers are single words that the summary copies. Asides mention another name, city, day or
number, so that the model must choose which one to copy. A row that summarization.py builds from these:
    prompt  The next meeting about it is planned for Saturday. On Sunday evening the theater in Graz gave out
            its yearly prize. It went to a farmer named Nagy and is worth 9 thousand euros. Something like it
            had happened in Ghent 14 weeks earlier.
    target  Farmer Nagy wins 9 thousand euros at Graz theater on Sunday.
Every text is part of the data that records hash: changing one changes the fingerprint of cells.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class EventKind:
    """Templates of one kind of event: first sentences, second sentences, and the summary."""

    leads: tuple[str, ...]
    details: tuple[str, ...]
    summary: str


EVENT_KINDS = (
    EventKind(
        leads=(
            "A fire broke out at the {place} in {city} on {day} {part}.",
            "Flames were seen at the {place} in {city} on {day} {part}.",
        ),
        details=(
            "A {role} named {name} led {count} people out of the building.",
            "Nobody was hurt, because {name}, a {role}, brought {count} people to safety.",
        ),
        summary="{Role} {name} saves {count} people from fire at {city} {place} on {day}.",
    ),
    EventKind(
        leads=(
            "The yearly prize of the {place} in {city} was given out on {day} {part}.",
            "On {day} {part} the {place} in {city} gave out its yearly prize.",
        ),
        details=(
            "The winner is {name}, a {role}, who receives {count} thousand euros.",
            "It went to a {role} named {name} and is worth {count} thousand euros.",
        ),
        summary="{Role} {name} wins {count} thousand euros at {city} {place} on {day}.",
    ),
    EventKind(
        leads=(
            "Nobody worked at the {place} in {city} on {day} {part}.",
            "The {place} in {city} stood still on {day} {part}.",
        ),
        details=(
            "With {name}, a {role}, in front, {count} workers asked for better pay.",
            "A {role} named {name} had called {count} workers to the street.",
        ),
        summary="{Role} {name} leads strike of {count} workers at {city} {place} on {day}.",
    ),
    EventKind(
        leads=(
            "After a long wait the new {place} in {city} could be seen on {day} {part}.",
            "On {day} {part} the doors of the new {place} in {city} were unlocked.",
        ),
        details=(
            "The {role} in charge, {name}, welcomed {count} guests.",
            "There were {count} guests, and a {role} named {name} cut the ribbon.",
        ),
        summary="{Role} {name} opens new {city} {place} with {count} guests on {day}.",
    ),
    EventKind(
        leads=(
            "On {day} {part} someone broke into the {place} in {city}.",
            "The {place} in {city} was found with a broken door on {day} {part}.",
        ),
        details=(
            "A {role} named {name} told the police that {count} paintings were gone.",
            "Of its paintings {count} are missing, said {name}, a {role}.",
        ),
        summary="{Role} {name} reports theft of {count} paintings from {city} {place} on {day}.",
    ),
    EventKind(
        leads=(
            "Heavy wind reached the {place} in {city} on {day} {part}.",
            "On {day} {part} a storm passed over the {place} in {city}.",
        ),
        details=(
            "It broke {count} windows, said {name}, a {role}.",
            "A {role} named {name} counted {count} broken windows.",
        ),
        summary="Storm breaks {count} windows at {city} {place} on {day}, {role} {name} says.",
    ),
    EventKind(
        leads=(
            "Runners from many towns met at the {place} in {city} on {day} {part}.",
            "On {day} {part} the yearly race began at the {place} in {city}.",
        ),
        details=(
            "The fastest was {name}, a {role}, ahead of {count} others.",
            "A {role} named {name} came in before {count} others.",
        ),
        summary="{Role} {name} beats {count} runners in {city} race on {day}.",
    ),
    EventKind(
        leads=(
            "The {place} in {city} locked its doors on {day} {part}.",
            "Since {day} {part} nobody may enter the {place} in {city}.",
        ),
        details=(
            "The repairs will take {count} weeks, said {name}, the {role} in charge.",
            "A {role} named {name} expects {count} weeks of repairs.",
        ),
        summary="{city} {place} closes on {day} for {count} weeks, {role} {name} says.",
    ),
)

ASIDES = (
    "The weather was {weather} and the streets were {streets}.",
    "In the year before there had been only {other_count} visitors.",
    "Something like it had happened in {other_city} {other_count} weeks earlier.",
    "A visitor from {other_city} named {other_name} took photos for the paper.",
    "The next meeting about it is planned for {other_day}.",
    "Coffee and cake were sold for {other_count} euros by {other_name}.",
    "The local radio talked about it for {other_count} minutes.",
    "People in {other_city} heard of it only on {other_day}.",
)

# fmt: off
NAMES = (
    "Keller", "Moreau", "Rossi", "Novak", "Larsen", "Duarte", "Okafor", "Tanaka", "Silva",
    "Weber", "Lindholm", "Kowalski", "Haddad", "Iversen", "Marino", "Petrov", "Ferrari",
    "Dubois", "Schmidt", "Nagy", "Costa", "Jensen", "Virtanen", "Laurent",
)
CITIES = (
    "Turin", "Lyon", "Porto", "Gdansk", "Bergen", "Graz", "Seville", "Malmo", "Ghent",
    "Tampere", "Brno", "Zagreb", "Bilbao", "Leipzig", "Cork", "Utrecht", "Genoa", "Nantes",
    "Aarhus", "Basel", "Varna", "Split", "Riga", "Krakow",
)
ROLES = (
    "teacher", "doctor", "driver", "farmer", "judge", "pilot", "guide", "baker", "nurse",
    "singer",
)
PLACES = (
    "market", "harbor", "museum", "library", "station", "school", "theater", "stadium",
    "hospital", "factory", "castle", "zoo",
)
DAYS = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)
PARTS = (
    "morning", "afternoon", "evening", "night",
)
WEATHERS = (
    "cold", "warm", "mild", "wet", "windy",
)
STREETS = (
    "empty", "full", "quiet", "dark",
)
# fmt: on
COUNTS = range(2, 41)


def draw_facts(random_numbers: random.Random) -> dict[str, str]:
    """Return random facts of one report, slot -> text; the asides' (`other_...`) differ from the event's."""
    choice, sample = random_numbers.choice, random_numbers.sample
    role, place = choice(ROLES), choice(PLACES)
    name, other_name = sample(NAMES, 2)
    city, other_city = sample(CITIES, 2)
    day, other_day = sample(DAYS, 2)
    count, other_count = sample(COUNTS, 2)
    return {
        "name": name,
        "other_name": other_name,
        "city": city,
        "other_city": other_city,
        "day": day,
        "other_day": other_day,
        "count": str(count),
        "other_count": str(other_count),
        "role": role,
        "Role": role.capitalize(),
        "place": place,
        "part": choice(PARTS),
        "weather": choice(WEATHERS),
        "streets": choice(STREETS),
    }
