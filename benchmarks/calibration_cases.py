"""The cases of `calibration.py`: true means, noise, seeds and examples of every kind of claim.

Most lie on the boundary of the null, where `holds` and `fails` are both false.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from calibration_simulation import Case, Model, Noise

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
SUMMARIES = {"task": "summarization", "metric": "rouge2", "decoding": "greedy"}
SAMPLES = {**SUMMARIES, "decoding": "sample", "temperature": 1.0}
ARITHMETIC = {"task": "arithmetic", "metric": "accuracy", "decoding": "greedy"}
TRANSLATION = {"task": "translation", "metric": "bleu", "decoding": "greedy"}
MMLU = {"task": "instruction", "metric": "acc", "evaluation": "mmlu", "decoding": None}

SEEDS = Noise(seeds=1.0)
ALL = Noise(seeds=1.0, examples=14.0, method=10.0)
"""On 200 examples: 1.0 of seeds, 1.0 of a seed's examples, 0.7 of method x example in a score."""
SPARSE = Noise(seeds=1.0, examples=10.0, method=5.0)
EQUAL = (0.0,) * 5
EVEN = (0.0, 0.5, 1.0, 1.5, 2.0)
OUTLIER = (0.0, 0.0, 0.0, 0.0, 2.0)


# ---- models ----


def build_models(
    means: Sequence[float], shared: Mapping[str, Any], scale: float = 1.0, **settings: Any
) -> tuple[Model, ...]:
    """Build a model per mean; a setting is a value for all models, or a tuple of one value per model."""
    return tuple(
        Model(
            mean, {**shared, **{k: v[n] if isinstance(v, tuple) else v for k, v in settings.items()}}, scale
        )
        for n, mean in enumerate(means)
    )


def compare_lmbdas(
    effects: Sequence[float], shared: Mapping[str, Any] = SUMMARIES, pair: tuple[float, float] = (1.0, 0.0),
    level: float = 40.0,
) -> tuple[Model, ...]:  # fmt: skip
    """Build two models per effect, of one beta each: the first lmbda's mean is higher by the effect."""
    betas = (0.5,) if len(effects) == 1 else BETAS
    means = [level + effect for effect in effects] + [level] * len(effects)
    lmbdas = tuple(lmbda for lmbda in pair for _ in effects)
    return build_models(means, shared, lmbda=lmbdas, beta=betas * 2)


def compare_betas(effects: Sequence[float], shared: Mapping[str, Any] = SAMPLES) -> tuple[Model, ...]:
    """Build an on-policy model per beta, with its effect above 40 points."""
    return build_models([40 + effect for effect in effects], shared, lmbda=1.0, beta=BETAS)


def compare_span_with_gains(effects: Sequence[float], gains: Sequence[float]) -> tuple[Model, ...]:
    """Build on-policy models with these effects above 44 points, and models on fixed data below by gains."""
    means = [44 + effect for effect in effects]
    means += [mean - gain for mean, gain in zip(means, gains, strict=True)]
    return build_models(means, SUMMARIES, lmbda=(1.0,) * 5 + (0.0,) * 5, beta=BETAS * 2)


def compare_spans(
    axis: str, groups: Mapping[Any, Sequence[float]], scales: Sequence[float], shared: Mapping[str, Any]
) -> tuple[Model, ...]:
    """Build an on-policy model per beta and value of an axis; `scales` are factors of the noise per value."""
    models: tuple[Model, ...] = ()
    for (value, effects), scale in zip(groups.items(), scales, strict=True):
        means = [40 + effect for effect in effects]
        models += build_models(means, {**shared, axis: value}, scale, lmbda=1.0, beta=BETAS)
    return models


def compare_baselines(gains: Mapping[str, float], shared: Mapping[str, Any]) -> tuple[Model, ...]:
    """Build the SFT student at 40 points, and on-policy GKD, supervised KD, SeqKD with gains over it."""
    settings: dict[str, dict[str, Any]] = {
        "GKD": {"lmbda": 1.0, "beta": 0.0},
        "supervised KD": {"lmbda": 0.0, "beta": 0.0},
        "SeqKD": {"lmbda": 0.0, "divergence": "cross_entropy", "text": "teacher", "beta": None},
    }
    start = Model(40.0, {**shared, "role": "start", "beta": None, "lmbda": None})
    return (start, *(Model(40 + gain, {**shared, **settings[name]}) for name, gain in gains.items()))


def compare_with_start(mean: float) -> tuple[Model, ...]:
    """Build the SFT student at 41 points of MMLU and on-policy GKD with forward KL at `mean`."""
    start = Model(41.0, {**MMLU, "role": "start", "lmbda": None, "beta": None})
    return (start, *build_models([mean], MMLU, lmbda=1.0, beta=0.0))


# ---- cases ----


def over_seeds(case: Case, *counts: int) -> list[Case]:
    """Return the case once per number of seeds."""
    return [replace(case, name=f"{case.name}, {count} seeds", seeds=count) for count in counts]


def with_noises(case: Case, noise: Noise = ALL) -> Case:
    """Return the case with all noises and the scores of examples."""
    return replace(case, name=f"{case.name}, all noises", noise=noise, has_examples=True)


def list_plain_cases() -> list[Case]:
    """Return plain differences without an effect: noises on and off, examples, seeds."""
    table = Case("C1 table only", "C1", compare_lmbdas([0.0]), 5, SEEDS)
    base = replace(table, name="C1", has_examples=True)
    large = Noise(seeds=5.0, examples=14.0, method=14.0)
    cases = over_seeds(table, 2, 3, 5, 10, 20)
    for examples, seeds in ((200, (2, 3, 5, 10, 20)), (50, (2, 5, 20)), (1000, (2, 5, 20))):
        case = replace(with_noises(base), examples=examples)
        cases += over_seeds(replace(case, name=f"{case.name}, {examples} examples"), *seeds)
    cases = [replace(case, is_plain=case.has_examples and case.seeds >= 5) for case in cases]
    for name, noise in {
        "noise of seeds": Noise(1.0),
        "noise of examples": Noise(0, 14.0),
        "noise of method x example": Noise(0, 0, 10.0),
        "noise of seeds and examples": Noise(1.0, 14.0),
        "noise of seeds and method x example": Noise(1.0, 0, 10.0),
        "noise of examples and method x example": Noise(0, 14.0, 10.0),
    }.items():
        cases += over_seeds(replace(base, name=f"C1 {name}", noise=noise), 5)
    cases += over_seeds(replace(base, name="C1 large noise of seeds", noise=large), 2, 3)
    skewed = replace(with_noises(base), name="C1 skewed scores, 50 examples", distribution="skewed")
    return cases + over_seeds(replace(skewed, examples=50), 5)


def list_binary_cases() -> list[Case]:
    """Return differences of accuracies, without an effect: right-or-wrong scores of few or many examples."""
    independent, mixed = Noise(examples=1.0), Noise(seeds=0.1, examples=0.6, method=0.5)
    models = {level: compare_lmbdas([0.0], ARITHMETIC, level=level) for level in (97.0, 50.0)}

    def build(level: float, examples: int, seeds: int, has_examples: bool) -> Case:
        kind = "" if has_examples else " table only,"
        return Case(
            f"C1 accuracy {level:g} %,{kind} {examples} examples, {seeds} seeds", "C1", models[level], seeds,
            mixed if has_examples else independent, has_examples=has_examples, examples=examples,
            distribution="right or wrong",
        )  # fmt: skip

    tables = [build(97.0, 50, 2, False), build(97.0, 500, 2, False), build(97.0, 50, 5, False)]
    tables.append(build(50.0, 50, 2, False))
    return [*tables, build(97.0, 50, 2, True), build(97.0, 200, 5, True), build(50.0, 50, 10, True)]


def list_column_cases() -> list[Case]:
    """Return claims of several comparisons: all null, or one of them."""
    null = Case("C1 five columns, all null", "C1", compare_lmbdas(EQUAL), 5, SEEDS)
    one_null = replace(
        null, name="C1 five columns, one null", models=compare_lmbdas((0.0, 4.0, 4.0, 4.0, 4.0))
    )
    tied = compare_betas((0.0, -4.0, -4.0, 0.0, -4.0), ARITHMETIC)
    best = Case("C12 best of five, two tied", "C12", tied, 5, SEEDS)
    jsds = compare_betas((-4.0, 0.0, 0.0, 0.0, 0.0), TRANSLATION)
    gains = {"GKD": 4.0, "supervised KD": 4.0, "SeqKD": 0.0}
    rising = build_models([38.0, 40.0, 40.0, 42.0], ARITHMETIC, lmbda=(0.25, 0.5, 0.75, 1.0), beta=0.5)
    monotone = Case("C4 one step null", "C4", rising, 5, SEEDS)
    diversity = compare_betas((0.0, 2.0, 4.0, 4.0, 6.0), {**SAMPLES, "metric": "self_bleu"})
    shares: dict[str, Any] = {
        "lmbda": (1.0, 0.0, 0.0) * 2,
        "beta": (0.1, 0.1, 0.0) * 2,
        "train_rows": (50,) * 3 + (1000,) * 3,
    }
    ranking = build_models([44.0, 40.0, 36.0, 44.0, 40.0, 40.0], ARITHMETIC, **shares)
    rewards: dict[str, Any] = {
        "lmbda": 1.0,
        "beta": 0.5,
        "reward": True,
        "distillation_share": (0.25, 0.5, 0.75) * 2,
    }
    metrics = ("rouge2",) * 3 + ("entailment",) * 3
    trade = build_models([38.0, 40.0, 40.0, 80.0, 76.0, 72.0], SUMMARIES, metric=metrics, **rewards)
    return [
        *over_seeds(null, 5),
        *over_seeds(with_noises(null), 5),
        *over_seeds(one_null, 3, 10),
        *over_seeds(best, 5),
        *over_seeds(with_noises(best), 3),
        *over_seeds(Case("C9 JSDs against KLs, one KL tied", "C9", jsds, 5, SEEDS), 5),
        *over_seeds(
            with_noises(Case("C14 one baseline tied", "C14", compare_baselines(gains, ARITHMETIC), 5, ALL)), 5
        ),
        *over_seeds(monotone, 5),
        *over_seeds(with_noises(monotone), 3),
        *over_seeds(Case("C7 one step null", "C7", diversity, 5, SEEDS), 5),
        *over_seeds(Case("C22 one step null", "C22", trade, 5, SEEDS), 5),
        *over_seeds(Case("C19 one pair null", "C19", ranking, 5, SEEDS), 5),
    ]


def list_margin_cases() -> list[Case]:
    """Return claims with a margin: at minus the margin, and equal methods."""
    mixed, small = (1.0, 0.5), Noise(seeds=0.15)
    base = Case("C3 at -margin", "C3", compare_lmbdas([-0.3], pair=mixed), 10, small, -0.3, margin=0.3)
    columns = replace(base, name="C3 at -margin, five columns", models=compare_lmbdas([-0.3] * 5, pair=mixed))
    equal = replace(
        base, name="C3 equal, margin of 2 SD", models=compare_lmbdas([0.0], pair=mixed), effect=0.0,
        has_power=True,
    )  # fmt: skip
    shares: dict[str, Any] = {
        "lmbda": (1.0, 0.0, 0.5),
        "beta": (0.1, 0.0, 0.0),
        "train_rows": (50, 1000, 1000),
    }
    few = build_models([40.0, 41.3, 37.0], ARITHMETIC, **shares)
    share = Case("C18 one at -margin", "C18", few, 5, SEEDS, -1.3, margin=1.3)
    start = Case("C21 at -margin", "C21", compare_with_start(42.0), 5, SEEDS, -1.0, margin=1.0)
    same = Case("C21 equal", "C21", compare_with_start(41.0), 10, Noise(0.5), margin=1.0, has_power=True)
    return [
        *over_seeds(base, 3, 10),
        *over_seeds(with_noises(base), 5),
        *over_seeds(columns, 5),
        *over_seeds(equal, 10),
        *over_seeds(share, 5),
        *over_seeds(with_noises(share), 5),
        *over_seeds(start, 5),
        *over_seeds(same, 10),
    ]


def list_span_cases() -> list[Case]:
    """Return C5: spans over divergences against the least effect of lmbda."""
    true = Case("C5 true, λ worth 2", "C5", compare_span_with_gains(EQUAL, [2.0] * 5), 5, SEEDS, 2.0)

    def build(name: str, effects: Sequence[float], gains: Sequence[float]) -> Case:
        return replace(true, name=f"C5 {name}", effect=0.0, models=compare_span_with_gains(effects, gains))

    null = build("no effect of λ", EQUAL, EQUAL)
    even = build("even span = effect at each", EVEN, [2.0] * 5)
    single = replace(
        with_noises(true, Noise(examples=14.0)), name=f"{true.name}, noise of examples, 1 seed", seeds=1
    )
    near = build("even span = effect at the lowest, 1 less than others", EVEN, [2.0, 3.0, 3.0, 3.0, 3.0])
    return [
        single,
        *over_seeds(true, 3, 5, 10),
        *over_seeds(replace(true, has_power=True), 20),
        *over_seeds(null, 3, 5, 20),
        *over_seeds(even, 3, 20),
        *over_seeds(build("even span = effect at the middle", EVEN, [8.0, 8.0, 2.0, 8.0, 8.0]), 5),
        *over_seeds(build("even span = effect at the lowest", EVEN, [2.0, 8.0, 8.0, 8.0, 8.0]), 20),
        *over_seeds(build("outlier's span = effect at each", OUTLIER, [2.0] * 5), 5),
        *over_seeds(build("outlier's span = effect at it", OUTLIER, [8.0, 8.0, 8.0, 8.0, 2.0]), 5),
        *over_seeds(with_noises(even, SPARSE), 5),
        *over_seeds(with_noises(null, SPARSE), 3),
        *over_seeds(replace(near, name=f"stress: {near.name}", is_stress=True), 5, 10, 20),
    ]


def list_best_of_cases() -> list[Case]:
    """Return C6b: the best of two divergences against the best of three others."""
    equal = Case("C6b all equal", "C6b", compare_betas(EQUAL), 5, SEEDS)
    tied = replace(equal, name="C6b best of each tied", models=compare_betas((2.0, 0.0, 0.0, 0.0, 2.0)))
    two = replace(equal, name="C6b two tied with one", models=compare_betas((0.0, 0.0, 2.0, 2.0, 2.0)))
    unequal = tuple(
        replace(model, noise_scale=scale)
        for model, scale in zip(
            compare_betas((0.0, 0.0, 1.0, 0.0, 1.0)), (0.1, 0.7, 0.5, 0.5, 3.3), strict=True
        )
    )
    searched = replace(
        equal, name="stress: C6b best of each tied, one much noisier", models=unequal, is_stress=True
    )
    return [
        *over_seeds(equal, 3, 5, 20),
        *over_seeds(tied, 10),
        *over_seeds(two, 5),
        *over_seeds(with_noises(equal, SPARSE), 5),
        *over_seeds(searched, 10),
    ]


def list_shrinking_cases() -> list[Case]:
    """Return C8, C10 and C25: spans that are equal in truth, whatever the noise does along the axis."""

    def build(name: str, cold: Sequence[float], warm: Sequence[float], *scales: float) -> Case:
        models = compare_spans("temperature", {0.1: cold, 1.0: warm}, scales or (1.0, 1.0), SAMPLES)
        return Case(f"C8 {name}", "C8", models, 5, SEEDS)

    falling = build("no spans, noise falling with γ", EQUAL, EQUAL, 0.3, 1.0)
    outlier = build("outlier's span at γ = 1", EVEN, OUTLIER)
    three = compare_spans("temperature", {0.1: EQUAL, 0.5: EVEN, 1.0: EVEN}, (1.0,) * 3, SAMPLES)
    sizes = {"small": OUTLIER, "large": EVEN}
    three_sizes = {"small": (0.0, 1.0, 2.0, 3.0, 4.0), "base": EVEN, "large": EVEN}
    translation = compare_spans("student", sizes, (0.3, 1.0), TRANSLATION)
    steps = compare_spans("student", three_sizes, (1.0,) * 3, TRANSLATION)
    same_trainings = replace(outlier, name=f"{outlier.name}, one training for both γ", seed_correlation=0.95)
    return [
        *over_seeds(falling, 3, 5, 20),
        *over_seeds(build("no spans, equal noise", EQUAL, EQUAL), 5),
        *over_seeds(build("no spans, noise rising", EQUAL, EQUAL, 1.0, 0.3), 5),
        *over_seeds(build("even spans, noise falling", EVEN, EVEN, 0.3, 1.0), 3, 5),
        *over_seeds(outlier, 5),
        *over_seeds(build("outlier's span at γ = 0.1", OUTLIER, EVEN), 5),
        *over_seeds(same_trainings, 5, 20),
        *over_seeds(with_noises(falling, SPARSE), 5),
        *over_seeds(Case("C8 three γ, one step null", "C8", three, 5, SEEDS), 5),
        *over_seeds(Case("C10 outlier's span and even, noise rising", "C10", translation, 5, SEEDS), 5),
        *over_seeds(Case("C25 three sizes, one step null", "C25", steps, 5, SEEDS), 5),
    ]


def list_other_cases() -> list[Case]:
    """Return ratios of gains, measurements, and what the judge cannot know."""
    gains = {"GKD": 4.2, "supervised KD": 3.0, "SeqKD": 1.0}
    ratio = Case("C16 ratio at its factor", "C16", compare_baselines(gains, SUMMARIES), 5, SEEDS)
    times = {"task": "summarization", "metric": "step_seconds", "evaluation": None, "decoding": None}
    seconds = build_models([20.0, 10.0], times, lmbda=(1.0, 0.0), beta=0.5)
    rates: dict[str, Any] = {"learning_rate": (1e-4, 1e-4, 1e-3, 1e-3), "beta": (0.0, 1.0) * 2}
    changes = build_models([40.0, 40.0, 41.0, 40.0], SUMMARIES, lmbda=1.0, **rates)
    change = Case("C27 change of a difference", "C27", changes, 5, SEEDS, 1.0)
    unknown = Case(
        "stress: C1 table only, method x example", "C1", compare_lmbdas([0.0]), 5, ALL, is_stress=True
    )
    heavy = replace(unknown, name="stress: C1 table only, seeds of a t with 2 degrees", noise=SEEDS)
    return [
        *over_seeds(ratio, 5),
        *over_seeds(with_noises(ratio), 5),
        *over_seeds(Case("C26 ratio of times", "C26", seconds, 5, Noise(seeds=0.3), 2.0), 5),
        *over_seeds(with_noises(change), 5),
        *over_seeds(unknown, 2, 5, 10),
        *over_seeds(replace(heavy, distribution="heavy-tailed seeds"), 3, 10),
    ]


CASES = (
    *list_plain_cases(), *list_binary_cases(), *list_column_cases(), *list_margin_cases(),
    *list_span_cases(), *list_best_of_cases(), *list_shrinking_cases(), *list_other_cases(),
)  # fmt: skip
