"""The paper's claims C1 to C28: statement and rule of each, side by side.

A rule runs on the paper's numbers and on a table alike. Sections and figures are those of the ICLR 2024
text. Settings that the paper fixes for a claim (the divergence that stands for GKD, the share of the data)
are written out in its rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gkd_lab.claims.claim_checks import (
    SFT_STUDENT,
    TEACHER,
    Check,
    DifferenceOfChanges,
    GainRatio,
    MeasuredDifference,
    ModelSelector,
    MonotoneTrend,
    Ranking,
    ScoresHigher,
    ShrinkingSpan,
    SpanBelowEffect,
)
from gkd_lab.claims.figure_cells import format_field, require_minimum, require_other


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, with the checks that decide it."""

    id: str
    statement: str
    source: str
    """Sections, figures and captions that state it."""
    figures: tuple[str, ...]
    """Figures whose numbers decide whether it holds in the paper; empty: the paper prints none."""
    checks: tuple[Check, ...]
    variants: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)
    """Label -> checks that are reported beside it and do not change its verdict."""
    is_measurement: bool = False
    """Whether it is a quantity to report, without a verdict."""


def _require_jsd(beta: float, **others: object) -> dict[str, object]:
    """Build conditions on a figure cell: loss JSD, this beta, and the other fields given."""
    return {"loss": "jsd", "beta": beta, **others}


HEAT_MAP_FIGURES = ("6", "7", "A.12", "A.13", "A.14")
XSUM, WMT, GSM8K = {"task": "summarization"}, {"task": "translation"}, {"task": "arithmetic"}
DIVERGENCES = {"loss": ("jsd", "tv")}
JSDS = {"loss": "jsd"}
SAMPLED_XSUM = {**XSUM, "decoding": "sample"}
SAMPLED_XSUM_ON_POLICY = {**SAMPLED_XSUM, "temperature": 1.0, "lmbda": 1.0}

ON_POLICY = ModelSelector("on-policy (λ = 1)", {"lmbda": 1.0})
MIXED = ModelSelector("mixed (λ = 0.5)", {"lmbda": 0.5})
FIXED = ModelSelector("fixed data (λ = 0)", {"lmbda": 0.0})
SUPERVISED_KD = ModelSelector("supervised KD", _require_jsd(0.0, lmbda=0.0))
IMITKD = ModelSelector("ImitKD", _require_jsd(0.0, lmbda=0.5))
F_DISTILL = ModelSelector("f-distill", {"loss": "tv", "lmbda": 0.5})
SEQKD = ModelSelector("SeqKD", {"loss": "seqkd"})
_PAPER_BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
_BETA_SELECTORS = {beta: ModelSelector(format_field("beta", beta), {"beta": beta}) for beta in _PAPER_BETAS}
FORWARD_KL, REVERSE_KL = _BETA_SELECTORS[0.0], _BETA_SELECTORS[1.0]


def _select_other_betas(*betas: float) -> tuple[ModelSelector, ...]:
    """Return a selector for each of the paper's five betas except these."""
    return tuple(selector for beta, selector in _BETA_SELECTORS.items() if beta not in betas)


def _select_gkd(beta: float) -> ModelSelector:
    """Build a selector of on-policy GKD: lmbda 1 and JSD(beta)."""
    return ModelSelector(f"on-policy GKD ({format_field('beta', beta)})", _require_jsd(beta, lmbda=1.0))


def _select_cell(lmbda: float, beta: float) -> ModelSelector:
    """Build a selector of the cells with this lmbda and beta."""
    return ModelSelector(f"λ = {lmbda:g}, {format_field('beta', beta)}", {"lmbda": lmbda, "beta": beta})


_BASELINES = (SUPERVISED_KD, SEQKD)
_MIXED_BASELINES = (IMITKD, F_DISTILL)
_STATED_GAIN_RATIOS = ((XSUM, 0.0, 2.1), (WMT, 0.1, 1.7), (GSM8K, 0.0, 1.9))
"""(task, beta of GKD, ratio) of §1 and Figure 1."""


def _build_gain_ratios(best_only: bool) -> tuple[Check, ...]:
    """Build a check per task of §1: GKD's gain is the stated multiple of the baselines' gain.

    The paper gives no formula; the mean and the best of the baselines are the two that come near.
    """
    return tuple(
        GainRatio(conditions, _select_gkd(beta), _BASELINES, factor, "student", best_only)
        for conditions, beta, factor in _STATED_GAIN_RATIOS
    )


def _build_jsd_check(lmbda: float) -> Check:
    """Build the check that in translation, at this lmbda, each JSD scores above both KLs."""
    inner = ModelSelector("JSD", {"beta": (0.1, 0.5, 0.9)})
    return ScoresHigher({**WMT, **JSDS, "lmbda": lmbda}, inner, (FORWARD_KL, REVERSE_KL))


_ON_POLICY_JSD = {"loss": "jsd", "lmbda": 1.0}
_SELF_DISTILLATION = {"task": "arithmetic", "pair": "self"}
_GKD_5_PERCENT = ModelSelector(
    "on-policy GKD (JSD(0.1)) with 5 % of the data", _require_jsd(0.1, lmbda=1.0, train_share=0.05)
)
_GKD_25_PERCENT = ModelSelector(
    "on-policy GKD (JSD(0.1)) with 25 % of the data", _require_jsd(0.1, lmbda=1.0, train_share=0.25)
)
_BASELINES_ALL_DATA = tuple(
    ModelSelector(f"{baseline.name} with all data", {**baseline.conditions, "train_share": 1.0})
    for baseline in (SUPERVISED_KD, IMITKD)
)
_FIXED_REVERSE_KL = ModelSelector("GKD on fixed data (reverse KL)", _require_jsd(1.0, lmbda=0.0))
_GKD_REWARD = ModelSelector("GKD with a reward", {"alpha": require_minimum(1e-9), "anchor": None})
_RLEF = ModelSelector("RLEF*", {"anchor": "start"})

_CLAIM_LIST = (
    Claim(
        "C1", "On-policy data beats fixed data, whatever the divergence.",
        "§4.1 to §4.3, captions of A.13 and 6", HEAT_MAP_FIGURES,
        (ScoresHigher({**DIVERGENCES, "pair": "smaller"}, ON_POLICY, (FIXED,)),),
    ),
    Claim(
        "C2", "Mixed data beats fixed data.", "§4.1, §4.2, caption of A.13", HEAT_MAP_FIGURES,
        (ScoresHigher({**DIVERGENCES, "pair": "smaller"}, MIXED, (FIXED,)),),
    ),
    Claim(
        "C3", "Only student-written data is at least as good as mixed data.",
        "caption of 6, §4.3", HEAT_MAP_FIGURES,
        (ScoresHigher({**DIVERGENCES, "pair": "smaller"}, ON_POLICY, (MIXED,)),),
    ),
    Claim(
        "C4", "On arithmetic the score rises with λ from 0.25 on.", "§4.3, Figure 8", ("8",),
        (
            MonotoneTrend(
                {**GSM8K, **DIVERGENCES, "lmbda": require_minimum(0.25), "pair": "smaller"}, "lmbda"
            ),
        ),
    ),
    Claim(
        "C4b", "On arithmetic a tenth of student-written data is already better than none.",
        "Figure 8; not claimed, the region that §4.3 leaves out", ("8",),
        (
            ScoresHigher(
                {**GSM8K, **DIVERGENCES}, ModelSelector("cells at λ = 0.1", {"lmbda": 0.1}), (FIXED,)
            ),
        ),
    ),
    Claim(
        "C5", "Greedy summaries: the span over divergences on policy is below the effect of λ at each.",
        "§4.1", ("A.13",),
        (SpanBelowEffect({**XSUM, **JSDS, "decoding": "greedy"}, ON_POLICY, FIXED, span_axis="beta"),),
    ),
    Claim(
        "C6", "Sampled summaries, on policy: mode-seeking divergences beat forward KL.",
        "§4.1, A.12, Figure 4", ("4", "A.12"),
        (
            ScoresHigher(
                {**SAMPLED_XSUM_ON_POLICY, **JSDS},
                ModelSelector("mode-seeking", {"beta": (0.5, 0.9, 1.0)}), (FORWARD_KL,),
            ),
        ),
    ),
    Claim(
        "C6b", "Sampled summaries, on policy: the best divergence is reverse KL or JSD(0.9).",
        "caption of A.12", ("A.12",),
        (
            ScoresHigher(
                {**SAMPLED_XSUM_ON_POLICY, **JSDS},
                ModelSelector("reverse KL or JSD(0.9)", {"beta": (0.9, 1.0)}),
                _select_other_betas(0.9, 1.0), best_only=True,
            ),
        ),
    ),
    Claim(
        "C7", "Diversity falls (Self-BLEU rises) from forward KL over JSD to reverse KL.",
        "Figure 4", ("4",),
        (MonotoneTrend({**SAMPLED_XSUM, "measure": "self_bleu", **_ON_POLICY_JSD}, "beta"),),
    ),
    Claim(
        "C8", "The span over divergences shrinks as the sampling temperature falls.",
        "Figure 4", ("4",),
        (ShrinkingSpan({**SAMPLED_XSUM, **_ON_POLICY_JSD}, "temperature", "beta", is_descending=True),),
        variants={
            "without reverse KL": (
                ShrinkingSpan(
                    {**SAMPLED_XSUM, **_ON_POLICY_JSD, "beta": _PAPER_BETAS[:-1]},
                    "temperature", "beta", is_descending=True,
                ),
            ),
        },
    ),
    Claim(
        "C9", "Translation, on policy: every JSD beats both KLs.", "§4.2", ("6",),
        (_build_jsd_check(1.0),),
        variants={"λ = 0.5": (_build_jsd_check(0.5),), "λ = 0": (_build_jsd_check(0.0),)},
    ),
    Claim(
        "C10", "Translation, on policy: the span over divergences is smaller for the larger student.",
        "§4.2", ("6",), (ShrinkingSpan({**WMT, **_ON_POLICY_JSD}, "student", "beta"),),
    ),
    Claim(
        "C11", "Translation: the best of all cells is λ = 1 with JSD(0.1).", "Figures 6, A.15", ("6",),
        (
            ScoresHigher(
                {**WMT, **JSDS}, _select_cell(1.0, 0.1),
                tuple(
                    _select_cell(lmbda, beta)
                    for lmbda in (0.0, 0.5, 1.0) for beta in _PAPER_BETAS if (lmbda, beta) != (1.0, 0.1)
                ),
            ),
        ),
    ),
    Claim(
        "C12", "Arithmetic, on policy: forward KL is the best divergence.", "§4.3", ("7", "A.14"),
        (ScoresHigher({**GSM8K, **_ON_POLICY_JSD, "pair": "smaller"}, FORWARD_KL, _select_other_betas(0.0)),),
    ),
    Claim(
        "C13", "Arithmetic, fixed data: reverse KL is the best divergence.", "§4.3", ("7", "A.14"),
        (
            ScoresHigher(
                {**GSM8K, **JSDS, "lmbda": 0.0, "pair": "smaller"}, REVERSE_KL, _select_other_betas(1.0)
            ),
        ),
    ),
    Claim(
        "C14", "On-policy GKD beats the SFT student, supervised KD and SeqKD.", "Figure 1", ("1",),
        tuple(
            ScoresHigher({**conditions, "pair": "smaller"}, _select_gkd(beta), (SFT_STUDENT, *_BASELINES))
            for conditions, beta, _ in _STATED_GAIN_RATIOS
        ),
    ),
    Claim(
        "C15", "On-policy GKD beats ImitKD and f-distill.", "Figures 2, 9, A.15", ("2", "9", "A.15"),
        (
            ScoresHigher({**XSUM, "pair": "smaller"}, _select_gkd(0.9), _MIXED_BASELINES),
            ScoresHigher({**GSM8K, "pair": "smaller"}, _select_gkd(0.0), _MIXED_BASELINES),
            ScoresHigher({**WMT, "pair": "smaller"}, _select_gkd(0.1), _MIXED_BASELINES),
        ),
        variants={
            "summaries with forward KL": (
                ScoresHigher({**XSUM, "pair": "smaller"}, _select_gkd(0.0), _MIXED_BASELINES),
            ),
        },
    ),
    Claim(
        "C16", "GKD's gain over its start is 2.1 times (summaries), 1.7 times (translation), 1.9 times "
        "(arithmetic) that of the baselines, supervised KD and SeqKD, averaged over them and over sizes.",
        "§1, Figure 1", ("1",), _build_gain_ratios(best_only=False),
        variants={"over the better baseline of each size": _build_gain_ratios(best_only=True)},
    ),
    Claim(
        "C17", "Translation, over all sizes: GKD gains 1.53 times as much as ImitKD, 2.62 as f-distill.",
        "caption of A.15", ("A.15",),
        (
            GainRatio(WMT, _select_gkd(0.1), (IMITKD,), 1.53, averaged_axis="student"),
            GainRatio(WMT, _select_gkd(0.1), (F_DISTILL,), 2.62, averaged_axis="student"),
        ),
    ),
    Claim(
        "C18", "On-policy GKD with 5 % of the inputs is as good as supervised KD and ImitKD with all.",
        "§4.1, Figure 3", ("3",), (ScoresHigher({}, _GKD_5_PERCENT, _BASELINES_ALL_DATA),),
        variants={"with 25 %": (ScoresHigher({}, _GKD_25_PERCENT, _BASELINES_ALL_DATA),)},
    ),
    Claim(
        "C19", "At every share of the data: on-policy GKD beats GKD on fixed data, and that "
        "supervised KD.",
        "Figure 3", ("3",),
        (
            Ranking(
                {"train_share": require_minimum(0.0)},
                (
                    _select_gkd(0.1),
                    ModelSelector("GKD on fixed data (JSD(0.1))", _require_jsd(0.1, lmbda=0.0)),
                    SUPERVISED_KD,
                ),
            ),
        ),
    ),
    Claim(
        "C20", "Instruction tuning: on-policy GKD with reverse KL is the best, and beats forward KL.",
        "§4.4, Figure A.11", ("A.11",),
        (
            ScoresHigher(
                {"task": "instruction", "pair": "smaller"}, _select_gkd(1.0),
                (_select_gkd(0.0), IMITKD, SUPERVISED_KD, _FIXED_REVERSE_KL),
            ),
        ),
    ),
    Claim(
        "C21", "Instruction tuning: on-policy GKD with forward KL is no better than its start on MMLU.",
        "Figure A.11", ("A.11",),
        (
            ScoresHigher(
                {"task": "instruction", "metric": require_other("bbh")}, SFT_STUDENT, (_select_gkd(0.0),)
            ),
        ),
    ),
    Claim(
        "C22", "With a reward: as α grows, ROUGE-2 rises and entailment falls.", "Figure 5", ("5",),
        (
            MonotoneTrend({**XSUM, "alpha": require_minimum(0.05)}, "alpha"),
            MonotoneTrend(
                {**XSUM, "alpha": require_minimum(0.05), "measure": "entailment"}, "alpha", is_falling=True
            ),
        ),
    ),
    Claim(
        "C23", "With a reward: every α has a better ROUGE-2 than RLEF*, and a better entailment than "
        "the teacher.",
        "Figure 5", ("5",),
        (
            ScoresHigher(XSUM, _GKD_REWARD, (_RLEF,)),
            ScoresHigher({**XSUM, "measure": "entailment"}, _GKD_REWARD, (TEACHER,)),
        ),
    ),
    Claim(
        "C24", "Self-distillation: every variant beats the teacher, on-policy GKD beats supervised KD, "
        "JSD(0.9) is the best.",
        "§A.1, Figure A.10", ("A.10",),
        (
            ScoresHigher(_SELF_DISTILLATION, ModelSelector("every variant", DIVERGENCES), (TEACHER,)),
            ScoresHigher(
                _SELF_DISTILLATION, ModelSelector("on-policy GKD", _ON_POLICY_JSD), (SUPERVISED_KD,)
            ),
            ScoresHigher(
                _SELF_DISTILLATION, _select_gkd(0.9), (_select_gkd(0.0), SUPERVISED_KD, *_MIXED_BASELINES)
            ),
        ),
        variants={
            "on-policy GKD with forward KL": (
                ScoresHigher(_SELF_DISTILLATION, _select_gkd(0.0), _MIXED_BASELINES),
            ),
        },
    ),
    Claim(
        "C25", "On policy, the larger the student, the smaller the span over divergences.",
        "§4.2, said of translation", HEAT_MAP_FIGURES, (ShrinkingSpan(_ON_POLICY_JSD, "student", "beta"),),
    ),
    Claim(
        "C26", "An on-policy step costs about twice a step on fixed data, more for larger students.",
        "§A.3", ("text A.3",),
        (MeasuredDifference({"measure": "step_time"}, ON_POLICY, FIXED, is_ratio=True),), is_measurement=True,
    ),
    Claim(
        "C27", "From the second largest to the largest learning rate, forward KL gains this much more "
        "than reverse KL, or loses this much less.",
        "§A.4", (), (DifferenceOfChanges({**XSUM, "lmbda": 1.0}, FORWARD_KL, REVERSE_KL, "learning_rate"),),
        is_measurement=True,
    ),
    Claim(
        "C28", "Sampled summaries, on policy: a teacher at temperature 0.1 in place of 1 adds this much.",
        "ours, Figure 4 against A.12", ("4", "A.12"),
        (
            MeasuredDifference(
                SAMPLED_XSUM_ON_POLICY,
                ModelSelector("cells with a teacher at 0.1", {"teacher_temperature": 0.1}),
                ModelSelector("cells with a teacher at 1", {"teacher_temperature": 1.0}),
            ),
        ),
        is_measurement=True,
    ),
)  # fmt: skip
CLAIMS: dict[str, Claim] = {claim.id: claim for claim in _CLAIM_LIST}
"""Id -> claim, in order. C4b and C6b are readings of Figure 8 and of A.12's caption; C28 is ours."""
