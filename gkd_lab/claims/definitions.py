"""The paper's claims C1 to C28: sentence, place and rule of each, side by side.

A claim is a function from scores to contrasts; it reads the paper's numbers and a run's table alike.
Sections and figures are those of the ICLR 2024 text. Settings that the paper fixes for a claim (the
divergence that stands for GKD, the share of the data) are written out in its rule.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from gkd_lab.claims.contrasts import (
    SFT_STUDENT,
    TEACHER,
    Contrasts,
    Selector,
    best_of,
    difference_of_changes,
    gain_ratio,
    measured_difference,
    monotone,
    paired_difference,
    ranked,
    shrinking_span,
    span_below_effect,
)
from gkd_lab.claims.model_scores import ModelScores
from gkd_lab.claims.model_settings import format_setting, require_minimum, require_prefix

Rule = Callable[[ModelScores], Contrasts]
"""Contrasts that decide a claim, built from scores."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, with the rule that decides it."""

    id: str
    statement: str
    source: str
    """Sections, figures and captions that state it."""
    figures: tuple[str, ...]
    """Figures whose numbers decide whether it holds in the paper; empty: the paper prints none."""
    rule: Rule
    besides: Mapping[str, Rule] = field(default_factory=dict)
    """Label -> rule that is reported beside it and does not change its verdict."""
    is_measurement: bool = False
    """Whether it is a quantity to report, without a verdict."""


CLAIMS: dict[str, Claim] = {}
"""Id -> claim, in order. C4b and C6b are readings of Figure 8 and of A.12's caption; C28 is ours."""


def claim(
    name: str, statement: str, source: str, *figures: str,
    besides: Mapping[str, Rule] | None = None, is_measurement: bool = False,
) -> Callable[[Rule], Rule]:  # fmt: skip
    """Return a decorator that registers a function as the rule of a claim."""

    def register(rule: Rule) -> Rule:
        CLAIMS[name] = Claim(name, statement, source, figures, rule, besides or {}, is_measurement)
        return rule

    return register


MARGINS = {
    "arithmetic": 1.3, "summarization": 0.3, "translation": 0.2, "instruction": 1.0, "other tasks": 1.0,
}  # fmt: skip
"""Task -> points by which "as good as" may be worse: half of what on-policy data gains over fixed data in
the paper on average (Figures 6, 7, A.12 to A.14: 2.55, 0.65 and 0.42 points), half of on-policy reverse KL's
gain on MMLU (Figure A.11: 1.97), so that at least half of the gain is kept; elsewhere ours."""

# ---- models and conditions ----

HEAT_MAP_FIGURES = ("6", "7", "A.12", "A.13", "A.14")
XSUM, WMT, GSM8K = {"task": "summarization"}, {"task": "translation"}, {"task": "arithmetic"}
FLAN = {"task": "instruction"}
SMALLER, SELF = {"pair": "smaller"}, {"pair": "self"}
DIVERGENCES, JSDS = {"loss": ("jsd", "tv")}, {"loss": "jsd"}
ON_POLICY_JSDS = {"loss": "jsd", "lmbda": 1.0}
SAMPLED = {"decoding": "sample"}
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)

ON_POLICY = Selector("on-policy (λ = 1)", {"lmbda": 1.0})
MIXED = Selector("mixed (λ = 0.5)", {"lmbda": 0.5})
FIXED = Selector("fixed data (λ = 0)", {"lmbda": 0.0})
SUPERVISED_KD = Selector("supervised KD", {"loss": "jsd", "beta": 0.0, "lmbda": 0.0})
IMITKD = Selector("ImitKD", {"loss": "jsd", "beta": 0.0, "lmbda": 0.5})
F_DISTILL = Selector("f-distill", {"loss": "tv", "lmbda": 0.5})
SEQKD = Selector("SeqKD", {"loss": "seqkd"})
RLEF = Selector("RLEF*", {"anchor": "start"})
DIVERGENCE_OF_BETA = {beta: Selector(format_setting("beta", beta), {"beta": beta}) for beta in BETAS}
FORWARD_KL, REVERSE_KL = DIVERGENCE_OF_BETA[0.0], DIVERGENCE_OF_BETA[1.0]


def select_gkd(beta: float, lmbda: float = 1.0) -> Selector:
    """Select GKD with JSD(beta), on-policy or on fixed data (`lmbda` 0)."""
    name = "on-policy GKD" if lmbda else "GKD on fixed data"
    conditions = {"loss": "jsd", "beta": beta, "lmbda": lmbda}
    return Selector(f"{name} ({format_setting('beta', beta)})", conditions)


def select_share(selector: Selector, share: float) -> Selector:
    """Select a method's models that were trained with this share of the data."""
    text = "all data" if share == 1 else f"{share:.0%} of the data".replace("%", " %")
    return Selector(f"{selector.name} with {text}", {**selector.conditions, "train_share": share})


def select_other_betas(*betas: float) -> list[Selector]:
    """Return a selector for each of the paper's five betas except these."""
    return [selector for beta, selector in DIVERGENCE_OF_BETA.items() if beta not in betas]


def combine(*contrasts: Contrasts) -> Contrasts:
    """Return the columns of all of these: the claim says all of them."""
    return reduce(add, contrasts)


# ---- where the sequences come from ----


@claim(
    "C1", "On-policy data beats fixed data, whatever the divergence.",
    "§4.1 to §4.3, captions of A.13 and 6", *HEAT_MAP_FIGURES,
)  # fmt: skip
def on_policy_beats_fixed(scores: ModelScores) -> Contrasts:
    return paired_difference(scores.where(DIVERGENCES, SMALLER), ON_POLICY, [FIXED])


@claim("C2", "Mixed data beats fixed data.", "§4.1, §4.2, caption of A.13", *HEAT_MAP_FIGURES)
def mixed_beats_fixed(scores: ModelScores) -> Contrasts:
    return paired_difference(scores.where(DIVERGENCES, SMALLER), MIXED, [FIXED])


@claim(
    "C3", "Only student-written data is at least as good as mixed data.",
    "caption of 6, §4.3", *HEAT_MAP_FIGURES,
)  # fmt: skip
def on_policy_is_as_good_as_mixed(scores: ModelScores) -> Contrasts:
    return paired_difference(scores.where(DIVERGENCES, SMALLER), ON_POLICY, [MIXED], MARGINS)


@claim("C4", "On arithmetic the score rises with λ from 0.25 on.", "§4.3, Figure 8", "8")
def score_rises_with_lmbda(scores: ModelScores) -> Contrasts:
    return monotone(scores.where(GSM8K, DIVERGENCES, SMALLER, lmbda=require_minimum(0.25)), "lmbda")


@claim(
    "C4b", "On arithmetic a tenth of student-written data is already better than none.",
    "Figure 8; not claimed, the region that §4.3 leaves out", "8",
)  # fmt: skip
def tenth_beats_none(scores: ModelScores) -> Contrasts:
    tenth = Selector("cells at λ = 0.1", {"lmbda": 0.1})
    return paired_difference(scores.where(GSM8K, DIVERGENCES), tenth, [FIXED])


# ---- which divergence ----


@claim(
    "C5", "Greedy summaries: the span over divergences on policy is below the effect of λ at each.",
    "§4.1", "A.13",
)  # fmt: skip
def divergence_matters_less_than_lmbda(scores: ModelScores) -> Contrasts:
    return span_below_effect(scores.where(XSUM, JSDS, decoding="greedy"), ON_POLICY, FIXED, over="beta")


@claim(
    "C6", "Sampled summaries, on policy: mode-seeking divergences beat forward KL.",
    "§4.1, A.12, Figure 4", "4", "A.12",
)  # fmt: skip
def mode_seeking_beats_forward_kl(scores: ModelScores) -> Contrasts:
    mode_seeking = Selector("mode-seeking", {"beta": (0.5, 0.9, 1.0)})
    sampled = scores.where(XSUM, SAMPLED, ON_POLICY_JSDS, temperature=1.0)
    return paired_difference(sampled, mode_seeking, [FORWARD_KL])


@claim(
    "C6b", "Sampled summaries, on policy: the best divergence is reverse KL or JSD(0.9).",
    "caption of A.12", "A.12",
)  # fmt: skip
def best_is_mode_seeking(scores: ModelScores) -> Contrasts:
    best = Selector("reverse KL or JSD(0.9)", {"beta": (0.9, 1.0)})
    sampled = scores.where(XSUM, SAMPLED, ON_POLICY_JSDS, temperature=1.0)
    return best_of(sampled, best, select_other_betas(0.9, 1.0))


@claim("C7", "Diversity falls (Self-BLEU rises) from forward KL over JSD to reverse KL.", "Figure 4", "4")
def diversity_falls_along_beta(scores: ModelScores) -> Contrasts:
    return monotone(scores.where(XSUM, SAMPLED, ON_POLICY_JSDS, measure="self_bleu"), "beta")


def shrink_span_with_temperature(scores: ModelScores, betas: tuple[float, ...]) -> Contrasts:
    sampled = scores.where(XSUM, SAMPLED, ON_POLICY_JSDS, beta=betas)
    return shrinking_span(sampled, "temperature", over="beta", is_descending=True)


@claim(
    "C8", "The span over divergences shrinks as the sampling temperature falls.", "Figure 4", "4",
    besides={"without reverse KL": lambda scores: shrink_span_with_temperature(scores, BETAS[:-1])},
)  # fmt: skip
def span_shrinks_with_temperature(scores: ModelScores) -> Contrasts:
    sampled = scores.where(XSUM, SAMPLED, ON_POLICY_JSDS)
    return shrinking_span(sampled, "temperature", over="beta", is_descending=True)


def compare_jsd_with_kls(scores: ModelScores, lmbda: float) -> Contrasts:
    jsd = Selector("JSD", {"beta": (0.1, 0.5, 0.9)})
    return paired_difference(scores.where(WMT, JSDS, lmbda=lmbda), jsd, [FORWARD_KL, REVERSE_KL])


@claim(
    "C9", "Translation, on policy: every JSD beats both KLs.", "§4.2", "6",
    besides={
        "λ = 0.5": lambda scores: compare_jsd_with_kls(scores, 0.5),
        "λ = 0": lambda scores: compare_jsd_with_kls(scores, 0.0),
    },
)  # fmt: skip
def jsd_beats_kls(scores: ModelScores) -> Contrasts:
    return compare_jsd_with_kls(scores, 1.0)


@claim(
    "C10", "Translation, on policy: the span over divergences is smaller for the larger student.", "§4.2", "6"
)
def translation_span_shrinks_with_size(scores: ModelScores) -> Contrasts:
    return shrinking_span(scores.where(WMT, ON_POLICY_JSDS), "student", over="beta")


@claim("C11", "Translation: the best of all cells is λ = 1 with JSD(0.1).", "Figures 6, A.15", "6")
def best_cell_is_on_policy_jsd(scores: ModelScores) -> Contrasts:
    cells = {
        (lmbda, beta): Selector(
            f"λ = {lmbda:g}, {format_setting('beta', beta)}", {"lmbda": lmbda, "beta": beta}
        )
        for lmbda in (0.0, 0.5, 1.0)
        for beta in BETAS
    }
    best = cells.pop((1.0, 0.1))
    return paired_difference(scores.where(WMT, JSDS), best, list(cells.values()))


@claim("C12", "Arithmetic, on policy: forward KL is the best divergence.", "§4.3", "7", "A.14")
def forward_kl_is_best_on_policy(scores: ModelScores) -> Contrasts:
    return paired_difference(
        scores.where(GSM8K, ON_POLICY_JSDS, SMALLER), FORWARD_KL, select_other_betas(0.0)
    )


@claim("C13", "Arithmetic, fixed data: reverse KL is the best divergence.", "§4.3", "7", "A.14")
def reverse_kl_is_best_on_fixed_data(scores: ModelScores) -> Contrasts:
    fixed = scores.where(GSM8K, JSDS, SMALLER, lmbda=0.0)
    return paired_difference(fixed, REVERSE_KL, select_other_betas(1.0))


# ---- baselines ----

_STATED_GAINS = ((XSUM, 0.0, 2.1), (WMT, 0.1, 1.7), (GSM8K, 0.0, 1.9))
"""(task, beta of GKD, ratio) of §1 and Figure 1."""


@claim("C14", "On-policy GKD beats the SFT student, supervised KD and SeqKD.", "Figure 1", "1")
def gkd_beats_baselines(scores: ModelScores) -> Contrasts:
    rivals = [SFT_STUDENT, SUPERVISED_KD, SEQKD]
    return combine(
        *(
            paired_difference(scores.where(task, SMALLER), select_gkd(beta), rivals)
            for task, beta, _ in _STATED_GAINS
        )
    )


def compare_with_mixed_baselines(scores: ModelScores, beta: float) -> Contrasts:
    return paired_difference(scores, select_gkd(beta), [IMITKD, F_DISTILL])


@claim(
    "C15", "On-policy GKD beats ImitKD and f-distill.", "Figures 2, 9, A.15", "2", "9", "A.15",
    besides={
        "summaries with forward KL": lambda scores: compare_with_mixed_baselines(
            scores.where(XSUM, SMALLER), 0.0
        )
    },
)  # fmt: skip
def gkd_beats_mixed_baselines(scores: ModelScores) -> Contrasts:
    settings = ((XSUM, 0.9), (GSM8K, 0.0), (WMT, 0.1))
    return combine(
        *(compare_with_mixed_baselines(scores.where(task, SMALLER), beta) for task, beta in settings)
    )


def compare_gains(scores: ModelScores, *, of_best: bool) -> Contrasts:
    """Compare GKD's gain with the stated multiple of the baselines': the paper gives no formula."""
    baselines = [SUPERVISED_KD, SEQKD]
    return combine(
        *(
            gain_ratio(
                scores.where(task),
                select_gkd(beta),
                baselines,
                factor,
                "student",
                of_best=of_best,
            )
            for task, beta, factor in _STATED_GAINS
        )
    )


@claim(
    "C16", "GKD's gain over its start is 2.1 times (summaries), 1.7 times (translation), 1.9 times "
    "(arithmetic) that of the baselines, supervised KD and SeqKD, averaged over them and over sizes.",
    "§1, Figure 1", "1",
    besides={"over the better baseline of each size": lambda scores: compare_gains(scores, of_best=True)},
)  # fmt: skip
def gkd_multiplies_the_gain(scores: ModelScores) -> Contrasts:
    return compare_gains(scores, of_best=False)


@claim(
    "C17", "Translation, over all sizes: GKD gains 1.53 times as much as ImitKD, 2.62 as f-distill.",
    "caption of A.15", "A.15",
)  # fmt: skip
def gkd_multiplies_mixed_gains(scores: ModelScores) -> Contrasts:
    translation = scores.where(WMT)
    return combine(
        gain_ratio(translation, select_gkd(0.1), [IMITKD], 1.53, "student"),
        gain_ratio(translation, select_gkd(0.1), [F_DISTILL], 2.62, "student"),
    )


# ---- how much data ----


def compare_share_with_all(scores: ModelScores, share: float) -> Contrasts:
    baselines = [select_share(SUPERVISED_KD, 1.0), select_share(IMITKD, 1.0)]
    return paired_difference(scores.where(), select_share(select_gkd(0.1), share), baselines, MARGINS)


@claim(
    "C18", "On-policy GKD with 5 % of the inputs is as good as supervised KD and ImitKD with all.",
    "§4.1, Figure 3", "3",
    besides={"with 25 %": lambda scores: compare_share_with_all(scores, 0.25)},
)  # fmt: skip
def few_inputs_are_enough(scores: ModelScores) -> Contrasts:
    return compare_share_with_all(scores, 0.05)


@claim(
    "C19", "At every share of the data: on-policy GKD beats GKD on fixed data, and that supervised KD.",
    "Figure 3", "3",
)  # fmt: skip
def order_is_equal_at_every_share(scores: ModelScores) -> Contrasts:
    shares = scores.where(train_share=require_minimum(0.0))
    return ranked(shares, select_gkd(0.1), select_gkd(0.1, lmbda=0.0), SUPERVISED_KD)


# ---- instruction tuning, rewards, self-distillation ----


@claim(
    "C20", "Instruction tuning: on-policy GKD with reverse KL is the best, and beats forward KL.",
    "§4.4, Figure A.11", "A.11",
)  # fmt: skip
def reverse_kl_is_best_for_instructions(scores: ModelScores) -> Contrasts:
    rivals = [select_gkd(0.0), IMITKD, SUPERVISED_KD, select_gkd(1.0, lmbda=0.0)]
    return paired_difference(scores.where(FLAN, SMALLER), select_gkd(1.0), rivals)


@claim(
    "C21", "Instruction tuning: on-policy GKD with forward KL is no better than its start on MMLU.",
    "Figure A.11", "A.11",
)  # fmt: skip
def forward_kl_is_no_better_than_start(scores: ModelScores) -> Contrasts:
    mmlu = scores.where(FLAN, metric=require_prefix("mmlu"))
    return paired_difference(mmlu, SFT_STUDENT, [select_gkd(0.0)], MARGINS)


@claim("C22", "With a reward: as α grows, ROUGE-2 rises and entailment falls.", "Figure 5", "5")
def alpha_trades_quality_for_reward(scores: ModelScores) -> Contrasts:
    at_least = {**XSUM, "alpha": require_minimum(0.05)}
    return combine(
        monotone(scores.where(at_least), "alpha"),
        monotone(scores.where(at_least, measure="entailment"), "alpha", is_falling=True),
    )


@claim(
    "C23", "With a reward: every α has a better ROUGE-2 than RLEF*, and a better entailment than the "
    "teacher.",
    "Figure 5", "5",
)  # fmt: skip
def reward_cells_beat_rlef_and_teacher(scores: ModelScores) -> Contrasts:
    gkd = Selector("GKD with a reward", {"alpha": require_minimum(1e-9), "anchor": None})
    return combine(
        paired_difference(scores.where(XSUM), gkd, [RLEF]),
        paired_difference(scores.where(XSUM, measure="entailment"), gkd, [TEACHER]),
    )


@claim(
    "C24", "Self-distillation: every variant beats the teacher, on-policy GKD beats supervised KD, "
    "JSD(0.9) is the best.",
    "§A.1, Figure A.10", "A.10",
    besides={
        "on-policy GKD with forward KL": lambda scores: compare_with_mixed_baselines(
            scores.where(GSM8K, SELF), 0.0
        )
    },
)  # fmt: skip
def self_distillation_beats_teacher(scores: ModelScores) -> Contrasts:
    students = scores.where(GSM8K, SELF)
    rivals = [select_gkd(0.0), SUPERVISED_KD, IMITKD, F_DISTILL]
    return combine(
        paired_difference(students, Selector("every variant", DIVERGENCES), [TEACHER]),
        paired_difference(students, Selector("on-policy GKD", ON_POLICY_JSDS), [SUPERVISED_KD]),
        paired_difference(students, select_gkd(0.9), rivals),
    )


@claim(
    "C25", "On policy, the larger the student, the smaller the span over divergences.",
    "§4.2, said of translation", *HEAT_MAP_FIGURES,
)  # fmt: skip
def span_shrinks_with_size(scores: ModelScores) -> Contrasts:
    return shrinking_span(scores.where(ON_POLICY_JSDS), "student", over="beta")


# ---- measurements ----


@claim(
    "C26", "An on-policy step costs about twice a step on fixed data, more for larger students.",
    "§A.3", "text A.3", is_measurement=True,
)  # fmt: skip
def on_policy_step_time(scores: ModelScores) -> Contrasts:
    return measured_difference(scores.where(measure="step_time"), ON_POLICY, FIXED, as_ratio=True)


@claim(
    "C27", "From the second largest to the largest learning rate, forward KL gains this much more than "
    "reverse KL, or loses this much less.",
    "§A.4", is_measurement=True,
)  # fmt: skip
def learning_rate_effect(scores: ModelScores) -> Contrasts:
    on_policy = scores.where(XSUM, lmbda=1.0)
    return difference_of_changes(on_policy, FORWARD_KL, REVERSE_KL, "learning_rate")


@claim(
    "C28", "Sampled summaries, on policy: a teacher at temperature 0.1 in place of 1 adds this much.",
    "ours, Figure 4 against A.12", "4", "A.12", is_measurement=True,
)  # fmt: skip
def teacher_temperature_effect(scores: ModelScores) -> Contrasts:
    cold, warm = (
        Selector(f"cells with a teacher at {value:g}", {"teacher_temperature": value}) for value in (0.1, 1.0)
    )
    return measured_difference(scores.where(XSUM, SAMPLED, temperature=1.0, lmbda=1.0), cold, warm)
