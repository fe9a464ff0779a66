"""The paper's claims, C1 to C28, each a short declaration that runs on the paper's numbers and on a table.

Sections and figures are those of the ICLR 2024 text. What a declaration takes from the paper (the
divergence that stands for GKD, the share of the data) is written out in it.
"""

from dataclasses import dataclass

from gkd_lab.claims.check_kinds import (
    Above,
    ChangeAlong,
    GainTimes,
    Measured,
    Monotone,
    Narrowing,
    Order,
    SpanBelowEffect,
)
from gkd_lab.claims.checks import START, TEACHER, Cells, Check, at_least, other_than
from gkd_lab.claims.place_names import said


@dataclass(frozen=True)
class Claim:
    """One claim: what it says, where, on which figures it rests, and how it is checked."""

    id: str
    statement: str
    where: str
    figures: tuple[str, ...]
    """Whose numbers decide whether it holds in the paper; empty: the paper prints none."""
    checks: tuple[Check, ...]
    also: tuple[tuple[str, tuple[Check, ...]], ...] = ()
    """Variants that are reported beside it and have no part in its verdict."""
    measured: bool = False
    """A quantity to report, without a verdict."""


def _jsd(beta: float, **more: object) -> dict[str, object]:
    return {"loss": "jsd", "beta": beta, **more}


HEAT_MAPS = ("6", "7", "A.12", "A.13", "A.14")
XSUM, WMT, GSM8K = {"task": "summarization"}, {"task": "translation"}, {"task": "arithmetic"}
DIVERGENCES = {"loss": ("jsd", "tv")}
JSDS = {"loss": "jsd"}
SAMPLED = {"decoding": "sample", "temperature": 1.0}

ON_POLICY = Cells("on-policy (λ = 1)", {"lmbda": 1.0})
MIXED = Cells("mixed (λ = 0.5)", {"lmbda": 0.5})
FIXED = Cells("fixed data (λ = 0)", {"lmbda": 0.0})
SUPERVISED_KD = Cells("supervised KD", _jsd(0.0, lmbda=0.0))
IMITKD = Cells("ImitKD", _jsd(0.0, lmbda=0.5))
F_DISTILL = Cells("f-distill", {"loss": "tv", "lmbda": 0.5})
SEQKD = Cells("SeqKD", {"loss": "seqkd"})
_FIVE = (0.0, 0.1, 0.5, 0.9, 1.0)
_BY_BETA = {beta: Cells(said("beta", beta), {"beta": beta}) for beta in _FIVE}
FORWARD_KL, REVERSE_KL = _BY_BETA[0.0], _BY_BETA[1.0]


def _others(*betas: float) -> tuple[Cells, ...]:
    return tuple(cells for beta, cells in _BY_BETA.items() if beta not in betas)


def _gkd(beta: float) -> Cells:
    return Cells(f"on-policy GKD ({said('beta', beta)})", _jsd(beta, lmbda=1.0))


def _cell(lmbda: float, beta: float) -> Cells:
    return Cells(f"λ = {lmbda:g}, {said('beta', beta)}", {"lmbda": lmbda, "beta": beta})


_BASELINES = (SUPERVISED_KD, SEQKD)
_MIXED_BASELINES = (IMITKD, F_DISTILL)
_RATIOS = ((XSUM, 0.0, 2.1), (WMT, 0.1, 1.7), (GSM8K, 0.0, 1.9))


def _ratios(best: bool) -> tuple[Check, ...]:
    """§1's gains over the baselines. The paper gives no formula; these are the two that come near."""
    return tuple(
        GainTimes(where, _gkd(beta), _BASELINES, factor, over="student", best=best)
        for where, beta, factor in _RATIOS
    )


def _every_jsd_above_both_kls(lmbda: float) -> Check:
    inner = Cells("JSD", {"beta": (0.1, 0.5, 0.9)})
    return Above({**WMT, **JSDS, "lmbda": lmbda}, inner, (FORWARD_KL, REVERSE_KL))


_SPANS = {"loss": "jsd", "lmbda": 1.0}
_SELF = {"task": "arithmetic", "pair": "self"}
_SMALL_SHARE = Cells("on-policy GKD (JSD(0.1)) with 5 % of the data", _jsd(0.1, lmbda=1.0, train=0.05))
_QUARTER = Cells("on-policy GKD (JSD(0.1)) with 25 % of the data", _jsd(0.1, lmbda=1.0, train=0.25))
_WHOLE = tuple(
    Cells(f"{one.name} with all data", {**one.wanted, "train": 1.0}) for one in (SUPERVISED_KD, IMITKD)
)
_FIXED_REVERSE_KL = Cells("GKD on fixed data (reverse KL)", _jsd(1.0, lmbda=0.0))
_RL = Cells("GKD with a reward", {"alpha": at_least(1e-9), "anchor": None})
_RLEF = Cells("RLEF*", {"anchor": "start"})

CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        Claim(
            "C1", "On-policy data beats fixed data, whatever the divergence.",
            "§4.1 to §4.3, captions of A.13 and 6", HEAT_MAPS,
            (Above({**DIVERGENCES, "pair": "smaller"}, ON_POLICY, (FIXED,)),),
        ),
        Claim(
            "C2", "Mixed data beats fixed data.", "§4.1, §4.2, caption of A.13", HEAT_MAPS,
            (Above({**DIVERGENCES, "pair": "smaller"}, MIXED, (FIXED,)),),
        ),
        Claim(
            "C3", "Only student-written data is at least as good as mixed data.",
            "caption of 6, §4.3", HEAT_MAPS,
            (Above({**DIVERGENCES, "pair": "smaller"}, ON_POLICY, (MIXED,)),),
        ),
        Claim(
            "C4", "On arithmetic the score rises with λ from 0.25 on.", "§4.3, Figure 8", ("8",),
            (Monotone({**GSM8K, **DIVERGENCES, "lmbda": at_least(0.25), "pair": "smaller"}, "lmbda"),),
        ),
        Claim(
            "C4b", "On arithmetic a tenth of student-written data is already better than none.",
            "Figure 8; not claimed, the region that §4.3 leaves out", ("8",),
            (Above({**GSM8K, **DIVERGENCES}, Cells("cells at λ = 0.1", {"lmbda": 0.1}), (FIXED,)),),
        ),
        Claim(
            "C5", "Greedy summaries: the span over divergences on policy is below the effect of λ at each.",
            "§4.1", ("A.13",),
            (SpanBelowEffect({**XSUM, **JSDS, "decoding": "greedy"}, ON_POLICY, FIXED, over="beta"),),
        ),
        Claim(
            "C6", "Sampled summaries, on policy: mode-seeking divergences beat forward KL.",
            "§4.1, A.12, Figure 4", ("4", "A.12"),
            (
                Above(
                    {**XSUM, **SAMPLED, "lmbda": 1.0, **JSDS},
                    Cells("mode-seeking", {"beta": (0.5, 0.9, 1.0)}), (FORWARD_KL,),
                ),
            ),
        ),
        Claim(
            "C6b", "Sampled summaries, on policy: the best divergence is reverse KL or JSD(0.9).",
            "caption of A.12", ("A.12",),
            (
                Above(
                    {**XSUM, **SAMPLED, "lmbda": 1.0, **JSDS},
                    Cells("reverse KL or JSD(0.9)", {"beta": (0.9, 1.0)}), _others(0.9, 1.0), best=True,
                ),
            ),
        ),
        Claim(
            "C7", "Diversity falls (Self-BLEU rises) from forward KL over JSD to reverse KL.",
            "Figure 4", ("4",),
            (Monotone({**XSUM, "decoding": "sample", "measure": "self_bleu", **_SPANS}, "beta"),),
        ),
        Claim(
            "C8", "The span over divergences shrinks as the sampling temperature falls.",
            "Figure 4", ("4",),
            (Narrowing({**XSUM, "decoding": "sample", **_SPANS}, "temperature", "beta", downwards=True),),
            also=(
                (
                    "without reverse KL",
                    (
                        Narrowing(
                            {**XSUM, "decoding": "sample", **_SPANS, "beta": _FIVE[:-1]},
                            "temperature", "beta", downwards=True,
                        ),
                    ),
                ),
            ),
        ),
        Claim(
            "C9", "Translation, on policy: every JSD beats both KLs.", "§4.2", ("6",),
            (_every_jsd_above_both_kls(1.0),),
            also=(
                ("λ = 0.5", (_every_jsd_above_both_kls(0.5),)),
                ("λ = 0", (_every_jsd_above_both_kls(0.0),)),
            ),
        ),
        Claim(
            "C10", "Translation, on policy: the span over divergences is smaller for the larger student.",
            "§4.2", ("6",), (Narrowing({**WMT, **_SPANS}, "student", "beta"),),
        ),
        Claim(
            "C11", "Translation: the best of all cells is λ = 1 with JSD(0.1).", "Figures 6, A.15", ("6",),
            (
                Above(
                    {**WMT, **JSDS}, _cell(1.0, 0.1),
                    tuple(
                        _cell(lmbda, beta)
                        for lmbda in (0.0, 0.5, 1.0) for beta in _FIVE if (lmbda, beta) != (1.0, 0.1)
                    ),
                ),
            ),
        ),
        Claim(
            "C12", "Arithmetic, on policy: forward KL is the best divergence.", "§4.3", ("7", "A.14"),
            (Above({**GSM8K, **_SPANS, "pair": "smaller"}, FORWARD_KL, _others(0.0)),),
        ),
        Claim(
            "C13", "Arithmetic, fixed data: reverse KL is the best divergence.", "§4.3", ("7", "A.14"),
            (Above({**GSM8K, **JSDS, "lmbda": 0.0, "pair": "smaller"}, REVERSE_KL, _others(1.0)),),
        ),
        Claim(
            "C14", "On-policy GKD beats the SFT student, supervised KD and SeqKD.", "Figure 1", ("1",),
            tuple(
                Above({**where, "pair": "smaller"}, _gkd(beta), (START, *_BASELINES))
                for where, beta, _ in _RATIOS
            ),
        ),
        Claim(
            "C15", "On-policy GKD beats ImitKD and f-distill.", "Figures 2, 9, A.15", ("2", "9", "A.15"),
            (
                Above({**XSUM, "pair": "smaller"}, _gkd(0.9), _MIXED_BASELINES),
                Above({**GSM8K, "pair": "smaller"}, _gkd(0.0), _MIXED_BASELINES),
                Above({**WMT, "pair": "smaller"}, _gkd(0.1), _MIXED_BASELINES),
            ),
            also=(
                (
                    "summaries with forward KL",
                    (Above({**XSUM, "pair": "smaller"}, _gkd(0.0), _MIXED_BASELINES),),
                ),
            ),
        ),
        Claim(
            "C16", "GKD's gain over its start is 2.1 times (summaries), 1.7 times (translation), 1.9 times "
            "(arithmetic) that of the baselines, supervised KD and SeqKD, averaged over them and over sizes.",
            "§1, Figure 1", ("1",), _ratios(best=False),
            also=(("over the better baseline of each size", _ratios(best=True)),),
        ),
        Claim(
            "C17", "Translation, over all sizes: GKD gains 1.53 times as much as ImitKD, 2.62 as f-distill.",
            "caption of A.15", ("A.15",),
            (
                GainTimes(WMT, _gkd(0.1), (IMITKD,), 1.53, over="student"),
                GainTimes(WMT, _gkd(0.1), (F_DISTILL,), 2.62, over="student"),
            ),
        ),
        Claim(
            "C18", "On-policy GKD with 5 % of the inputs is as good as supervised KD and ImitKD with all.",
            "§4.1, Figure 3", ("3",), (Above({}, _SMALL_SHARE, _WHOLE),),
            also=(("with 25 %", (Above({}, _QUARTER, _WHOLE),)),),
        ),
        Claim(
            "C19", "At every share of the data: on-policy GKD beats GKD on fixed data, and that "
            "supervised KD.",
            "Figure 3", ("3",),
            (
                Order(
                    {"train": at_least(0.0)},
                    (_gkd(0.1), Cells("GKD on fixed data (JSD(0.1))", _jsd(0.1, lmbda=0.0)), SUPERVISED_KD),
                ),
            ),
        ),
        Claim(
            "C20", "Instruction tuning: on-policy GKD with reverse KL is the best, and beats forward KL.",
            "§4.4, Figure A.11", ("A.11",),
            (
                Above(
                    {"task": "instruction", "pair": "smaller"}, _gkd(1.0),
                    (_gkd(0.0), IMITKD, SUPERVISED_KD, _FIXED_REVERSE_KL),
                ),
            ),
        ),
        Claim(
            "C21", "Instruction tuning: on-policy GKD with forward KL is no better than its start on MMLU.",
            "Figure A.11", ("A.11",),
            (
                Above({"task": "instruction", "metric": other_than("bbh")}, START, (_gkd(0.0),)),
            ),
        ),
        Claim(
            "C22", "With a reward: as α grows, ROUGE-2 rises and entailment falls.", "Figure 5", ("5",),
            (
                Monotone({**XSUM, "alpha": at_least(0.05)}, "alpha"),
                Monotone({**XSUM, "alpha": at_least(0.05), "measure": "entailment"}, "alpha", falling=True),
            ),
        ),
        Claim(
            "C23", "With a reward: every α has a better ROUGE-2 than RLEF*, and a better entailment than "
            "the teacher.",
            "Figure 5", ("5",),
            (
                Above(XSUM, _RL, (_RLEF,)),
                Above({**XSUM, "measure": "entailment"}, _RL, (TEACHER,)),
            ),
        ),
        Claim(
            "C24", "Self-distillation: every variant beats the teacher, on-policy GKD beats supervised KD, "
            "JSD(0.9) is the best.",
            "§A.1, Figure A.10", ("A.10",),
            (
                Above(_SELF, Cells("every variant", {"loss": ("jsd", "tv")}), (TEACHER,)),
                Above(_SELF, Cells("on-policy GKD", {"loss": "jsd", "lmbda": 1.0}), (SUPERVISED_KD,)),
                Above(_SELF, _gkd(0.9), (_gkd(0.0), SUPERVISED_KD, *_MIXED_BASELINES)),
            ),
            also=(("on-policy GKD with forward KL", (Above(_SELF, _gkd(0.0), _MIXED_BASELINES),)),),
        ),
        Claim(
            "C25", "On policy, the larger the student, the smaller the span over divergences.",
            "§4.2, said of translation", HEAT_MAPS, (Narrowing(_SPANS, "student", "beta"),),
        ),
        Claim(
            "C26", "An on-policy step costs about twice a step on fixed data, more for larger students.",
            "§A.3", ("text A.3",),
            (Measured({"measure": "step_time"}, ON_POLICY, FIXED, ratio=True),), measured=True,
        ),
        Claim(
            "C27", "From the second largest to the largest learning rate, forward KL gains this much more "
            "than reverse KL, or loses this much less.",
            "§A.4", (), (ChangeAlong({**XSUM, "lmbda": 1.0}, FORWARD_KL, REVERSE_KL, "learning_rate"),),
            measured=True,
        ),
        Claim(
            "C28", "Sampled summaries, on policy: a teacher at temperature 0.1 in place of 1 adds this much.",
            "ours, Figure 4 against A.12", ("4", "A.12"),
            (
                Measured(
                    {**XSUM, **SAMPLED, "lmbda": 1.0},
                    Cells("cells with a teacher at 0.1", {"teacher_temperature": 0.1}),
                    Cells("cells with a teacher at 1", {"teacher_temperature": 1.0}),
                ),
            ),
            measured=True,
        ),
    )
}  # fmt: skip
"""Id -> claim, in order. C4b and C6b are readings of Figure 8 and of A.12's caption; C28 is ours."""
