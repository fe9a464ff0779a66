"""The first sentence of a description, and the questions of all experiments."""

import pytest

from gkd_lab import experiments
from gkd_lab.config.first_sentence import extract_first_sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Vary lmbda. Cost: 4 cells.", "Vary lmbda"),
        (
            "Soft targets (Hinton et al. 2015) against labels. Cost 1.",
            "Soft targets (Hinton et al. 2015) against labels",
        ),
        (
            "As in (Hinton et al. (2015), Sec. 3. It says so) here. Next.",
            "As in (Hinton et al. (2015), Sec. 3. It says so) here",
        ),
        ("Compare with Fig. 3 and Eq. 4. Next.", "Compare with Fig. 3 and Eq. 4"),
        ("Distil as G. Hinton did. Next.", "Distil as G. Hinton did"),
        ("Take e.g. XSum, i.e. news. Next.", "Take e.g. XSum, i.e. news"),
        ("Is 0.5 better than 1.0? Yes.", "Is 0.5 better than 1.0?"),
        ("A line\n  and another. Next.", "A line and another"),
        ("no stop at all", "no stop at all"),
        ("It ends with the text.", "It ends with the text"),
        ("", ""),
    ],
)
def test_a_sentence_ends_at_its_own_stop(text: str, sentence: str) -> None:
    assert extract_first_sentence(text) == sentence


@pytest.mark.parametrize("name", experiments.list_experiment_files())
def test_the_question_of_each_experiment_is_one_whole_sentence(name: str) -> None:
    experiment, _ = experiments.outline_experiment(name)
    question, description = experiment.question, " ".join(experiment.description.split())
    assert description.startswith(question) and len(question) > 20
    assert question.count("(") == question.count(")")
    assert not question.lower().endswith((" al", " fig", " eq", " vs", "e.g", "i.e"))
    rest = description.removeprefix(question)
    assert rest[:1] in (".", "", " ") and (not rest.strip(". ") or rest.lstrip(". ")[0].isupper())
