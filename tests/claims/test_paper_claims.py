"""Verdicts on the paper's own numbers (section 6 of the paper's summary)."""

import re
import typing

import pytest

from gkd_lab.claims import paper
from gkd_lab.claims.definitions import CLAIMS
from gkd_lab.claims.judge import judge_paper
from gkd_lab.claims.model_scores import load_paper_scores
from gkd_lab.claims.verdict_text import format_detail
from gkd_lab.claims.verdicts import ClaimVerdict
from gkd_lab.config.experiment import ClaimId, FigureName

VERDICTS = {verdict.claim.id: verdict for verdict in judge_paper()}

EXPECTED = {
    "C1": ("fails", "54 of 55"),
    "C2": ("fails", "52 of 55"),
    "C3": ("fails", "48 of 55"),
    "C4": ("holds", "2 of 2"),
    "C4b": ("fails", "0 of 2"),
    "C5": ("fails", "2 of 3"),
    "C6": ("holds", "4 of 4"),
    "C6b": ("fails", "2 of 3"),
    "C7": ("fails", "3 of 4"),
    "C8": ("fails", "0 of 1"),
    "C9": ("holds", "2 of 2"),
    "C10": ("holds", "1 of 1"),
    "C11": ("holds", "2 of 2"),
    "C12": ("holds", "2 of 3"),
    "C13": ("fails", "2 of 3"),
    "C14": ("holds", "9 of 9"),
    "C15": ("holds", "7 of 7"),
    "C16": ("holds", "1 of 3"),
    "C17": ("holds", "0 of 2"),
    "C18": ("fails", "0 of 1"),
    "C19": ("holds", "4 of 4"),
    "C20": ("holds", "2 of 2"),
    "C21": ("holds", "1 of 1"),
    "C22": ("holds", "2 of 2"),
    "C23": ("holds", "2 of 2"),
    "C24": ("holds", "3 of 3"),
    "C25": ("fails", "3 of 4"),
}


def get_detail(name: str) -> str:
    return format_detail(VERDICTS[name])


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items())
def test_the_verdict_is_that_of_the_papers_numbers(name: str, expected: tuple[str, str]) -> None:
    verdict: ClaimVerdict = VERDICTS[name]
    assert (verdict.verdict, format_detail(verdict).split(";")[0]) == expected
    assert len(verdict.columns) == int(expected[1].split()[-1])


def test_every_claim_is_named_and_may_be_named_in_an_experiment() -> None:
    assert tuple(CLAIMS) == typing.get_args(ClaimId)
    assert {f"C{n}" for n in range(1, 29)} <= set(CLAIMS)
    assert set(EXPECTED) | {"C26", "C27", "C28"} == set(CLAIMS)
    named = {figure for claim in CLAIMS.values() for figure in claim.figures}
    assert named <= set(paper.load_figures())
    assert named - {"text A.3"} <= set(typing.get_args(FigureName))


def test_every_detail_says_k_of_n() -> None:
    assert all(re.match(r"\d+ of \d+\b", format_detail(verdict)) for verdict in VERDICTS.values())


def test_details_list_the_cells_that_fail_or_tie() -> None:
    assert get_detail("C1") == "54 of 55; fails: summarization, base, sampling, forward KL (-0.20)"
    assert "arithmetic, large, greedy, reverse KL (-0.20)" in get_detail("C2")
    assert "ties: summarization, small, sampling, forward KL (+0.00)" in get_detail("C2")
    assert get_detail("C3").count(" | ") == 5  # six ties, one after the other
    assert "fails: small (-0.50)" in get_detail("C5")
    assert "fails: small (-0.30)" in get_detail("C6b")
    assert re.search(r"γ = 0.3 \(.*reverse KL -0.06", get_detail("C7"))
    assert "ties: large (against reverse KL +0.00)" in get_detail("C12")
    assert "fails: large (against forward KL -0.50)" in get_detail("C13")
    assert re.search(r"arithmetic, greedy \(.*base .*large -0.90", get_detail("C25"))


def test_variants_are_reported_beside_the_verdict() -> None:
    assert "without reverse KL: 0 of 1; ties" in get_detail("C8")
    assert "besides, λ = 0.5: 0 of 2" in get_detail("C9") and "besides, λ = 0: 0 of 2" in get_detail("C9")
    assert re.search(r"sampling \(.*ImitKD -0.12, .*f-distill -0.24", get_detail("C15"))
    assert "supervised KD with all data -0.21" in get_detail("C18")
    assert "besides, with 25 %: 1 of 1" in get_detail("C18")
    assert "on-policy GKD with forward KL: 0 of 1" in get_detail("C24")


def test_the_ratio_of_gains_is_given_by_both_formulas() -> None:
    of_the_mean, of_the_best = get_detail("C16").split("besides")
    for text, ratios in ((of_the_mean, ("2.11", "2.76", "1.91")), (of_the_best, ("1.80", "1.73", "1.65"))):
        assert all(f" {ratio} (said" in text for ratio in ratios)
    assert "1.55 (said: 1.53 times ImitKD)" in get_detail("C17")
    assert "2.59 (said: 2.62 times f-distill)" in get_detail("C17")


def test_measurements_have_numbers_and_no_verdict() -> None:
    assert re.fullmatch(r"3 of 3 measured, .*small 1.80, base 2.00, large 2.20", get_detail("C26"))
    assert VERDICTS["C26"].effect == pytest.approx(2.0)
    assert "forward KL +2.93, JSD(0.1) +3.52" in get_detail("C28") and "reverse KL +1.63" in get_detail("C28")
    assert get_detail("C27").startswith("0 of 0; cannot be judged: ")
    assert {VERDICTS[name].verdict for name in ("C26", "C27", "C28")} == {"undecided"}


def test_the_figures_of_a_claim_have_each_figure_cell_once() -> None:
    """Two figures that show the same cell would make its column ambiguous."""
    for claim in CLAIMS.values():
        trained = [model for model in load_paper_scores(claim.figures).models if model["role"] == "cell"]
        rows = paper.load_values()
        shown = rows["figure"].isin(claim.figures) & (rows["role"] == "cell")
        assert len(trained) == shown.sum(), claim.id
        assert all(len(model.scores) == 1 for model in trained)


def test_only_differences_within_the_rounding_error_are_ties() -> None:
    """13.2 against 13.1 is printed apart (C1 holds there); 13.1 against 13.1 is not."""
    key = ("small", "sample", 0.0)
    fields = ("student", "decoding", "beta")
    (small,) = (c for c in VERDICTS["C1"].columns if tuple(c.shared[name] for name in fields) == key)
    assert small.outcome == "holds"
    assert small.weakest.effect == pytest.approx(0.1)
