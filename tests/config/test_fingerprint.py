"""Fields that change a fingerprint, and fingerprints of existing records, which must never change."""

import math
from typing import Annotated, Any

import pytest

from gkd_lab.config import ConfigError, Evaluation, SftModel, Training
from gkd_lab.config.fingerprint import FORMAT_VERSION, DefaultFrom, Frozen, NotHashed, canonical_json
from gkd_lab.config.loss_terms import ResolvedDivergence

from .stub import make_cell, make_grid

# Ids of cells, models and evaluations of the stub tasks. A change here relabels every record that
# users have: do not edit a line, raise FORMAT or declare a new field's old value with `DefaultFrom`.
GOLDEN = {
    "plain": "e971d019",
    "words": "b24b6288",
    "lmbda 0.5, beta 0.1, seed 3": "7ec5c198",
    "lmbda 0": "9e7aad99",
    "total variation": "67c2fe16",
    "rescaled": "e5455e7a",
    "a folder": "d072285b",
    "a loaded student": "810b8b3e",
    "teacher": "fb77eb3c",
    "greedy": "b39980b2",
    "beam": "a98f4e51",
    "sample": "cd36813a",
}


def described() -> dict[str, Frozen]:
    ways = [{"decoding": "greedy"}, {"decoding": "beam"}, {"decoding": "sample"}]
    greedy, beam, sample = make_cell(evaluations=ways).evaluations
    return {
        "plain": make_cell().training,
        "words": make_cell(task="words").training,
        "lmbda 0.5, beta 0.1, seed 3": make_cell(lmbda=0.5, beta=0.1, seed=3).training,
        "lmbda 0": make_cell(lmbda=0).training,
        "total variation": make_cell(divergence="tv").training,
        "rescaled": make_cell(beta=0.1, rescale_divergence=True).training,
        "a folder": make_cell(data={"source": "/rows"}).training,
        "a loaded student": make_cell(student="owner/small").training,
        "teacher": make_cell().training.teacher,
        "greedy": greedy,
        "beam": beam,
        "sample": sample,
    }


def test_fingerprints_of_existing_records_never_change() -> None:
    assert FORMAT_VERSION == 1
    assert {name: spec.fingerprint for name, spec in described().items()} == GOLDEN


def other_values(spec: Frozen, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Frozen]]:
    """Return (path, spec with that field changed) for each field at any depth."""
    variants = []
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        place = (*path, name)
        if isinstance(value, Frozen):
            for deeper, changed in other_values(value, place):
                variants.append((deeper, spec.model_copy(update={name: changed})))
        elif isinstance(value, tuple) and value and isinstance(value[0], Frozen):
            for deeper, changed in other_values(value[0], place):
                variants.append((deeper, spec.model_copy(update={name: (changed, *value[1:])})))
            variants.append((place, spec.model_copy(update={name: value + value})))
        else:
            variants.append((place, spec.model_copy(update={name: another(value)})))
        if any(isinstance(mark, NotHashed) for mark in field.metadata):
            variants = [(p if p[: len(place)] != place else (*p, "PLACE"), s) for p, s in variants]
    return variants


def another(value: Any) -> Any:
    match value:
        case None:
            return 1
        case bool():
            return not value
        case int() | float():
            return value + 1
        case tuple():
            return (*value, "more")
    return f"{value}x"


@pytest.mark.parametrize("spec", described().values(), ids=described().keys())
def test_every_hashed_field_changes_the_fingerprint(spec: Frozen) -> None:
    changed = other_values(spec.model_copy())
    assert len(changed) >= len(type(spec).model_fields)
    for path, other in changed:
        moved = fresh(other).full_fingerprint != spec.full_fingerprint
        assert moved == (path[-1] != "PLACE"), ".".join(path)


def fresh(spec: Frozen) -> Frozen:
    """Rebuild a spec; a plain copy would keep the cached fingerprint."""
    values = {name: renewed(getattr(spec, name)) for name in type(spec).model_fields}
    return type(spec).model_construct(**values)


def renewed(value: Any) -> Any:
    if isinstance(value, Frozen):
        return fresh(value)
    return tuple(map(renewed, value)) if isinstance(value, tuple) else value


def test_the_unhashed_fields_are_exactly_these() -> None:
    def places(spec: type[Frozen]) -> set[str]:
        fields = spec.model_fields.items()
        return {n for n, field in fields if any(isinstance(m, NotHashed) for m in field.metadata)}

    assert places(Training) == {"parked"}
    assert places(SftModel) == set()
    assert places(type(make_cell().training.data)) == {"path", "validation", "test"}
    assert places(type(make_cell().training.start.model)) == {"name", "path", "server", "patience"}
    assert places(Evaluation) == {"metrics"}


def test_labels_and_evaluations_do_not_change_the_fingerprint() -> None:
    by_axis = make_grid(grid={"lmbda": [0.5], "steps": [20]}).cells[0]
    by_base = make_cell(lmbda=0.5, evaluations=[{"decoding": "beam"}])
    assert by_axis.labels != by_base.labels
    assert by_axis.evaluations != by_base.evaluations
    assert by_axis.folder == by_base.folder


def test_the_path_of_a_data_folder_is_not_hashed() -> None:
    assert make_cell(data={"source": "/a"}).fingerprint == make_cell(data={"source": "/b"}).fingerprint


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, "0", "0.0", "-0"])
def test_all_spellings_of_zero_are_one_cell(zero: Any) -> None:
    assert make_cell(lmbda=zero, beta=zero).fingerprint == make_cell(lmbda=0, beta=0).fingerprint


def test_all_spellings_of_a_fraction_are_one_cell() -> None:
    values = [0.5, "0.5", "5e-1", ".5"]
    assert len({make_cell(lmbda=value).fingerprint for value in values}) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        canonical_json({"x": [value]})


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), 1j])
def test_a_value_without_canonical_json_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="no canonical JSON"):
        canonical_json((1, value))


def test_canonical_json_sorts_keys_and_distinguishes_types() -> None:
    assert canonical_json({"b": 1.0, "a": (True, None, "1", 1, 0.1)}) == '{"a":[true,null,"1",1,0.1],"b":1}'
    assert canonical_json('Grüße \u2028"\n') == '"Grüße \u2028\\"\\n"'


class Before(Frozen):
    steps: int
    name: Annotated[str, NotHashed()] = "x"


class After(Frozen):
    steps: int
    name: Annotated[str, NotHashed()] = "x"
    reward: Annotated[float, DefaultFrom(old_value=0)] = 0.0


def test_a_field_added_later_is_not_hashed_at_its_old_value() -> None:
    assert After(steps=3).full_fingerprint == Before(steps=3).full_fingerprint
    assert After(steps=3, reward=0.5).full_fingerprint != Before(steps=3).full_fingerprint


def test_shorthand_and_long_form_are_one_cell() -> None:
    short = make_cell(lmbda=0.5, beta=0.1, temperature=0.7, teacher_temperature=0.3)
    long = make_cell(
        source={"lmbda": 0.5, "temperature": 0.7},
        objectives=[{"beta": 0.1, "teacher_temperature": 0.3, "student_temperature": 1}],
    )
    assert short.training == long.training
    assert short.fingerprint == long.fingerprint


def test_total_variation_is_one_cell_in_shorthand_and_long_form() -> None:
    temperatures = {"teacher_temperature": 1, "student_temperature": 1}
    for stated in {"divergence": "tv"}, {"divergence": "tv", "beta": 0.3, "rescale": True}:
        assert (
            make_cell(objectives=[{**stated, **temperatures}]).training == make_cell(divergence="tv").training
        )
    rescaled = make_cell(objectives=[{"beta": 0.1, "rescale": True, **temperatures}])
    assert rescaled.training == make_cell(beta=0.1, rescale_divergence=True).training


def test_stating_a_default_does_not_change_the_cell() -> None:
    assert make_cell(divergence="jsd", rescale_divergence=False).fingerprint == make_cell().fingerprint


@pytest.mark.parametrize("lmbda", [0, 0.5])
def test_the_long_form_of_the_source_takes_the_sampling_temperature(lmbda: float) -> None:
    assert make_cell(source={"lmbda": lmbda}).training == make_cell(lmbda=lmbda).training
    assert make_cell(source={"lmbda": 0, "temperature": 0.7}).training == make_cell(lmbda=0).training


def test_the_folder_is_readable_and_ends_in_the_fingerprint() -> None:
    cell = make_cell(lmbda=0.5, beta=0.1)
    assert cell.folder == f"nano/sums/lmbda=0.5_beta=0.1_seed=0-{cell.fingerprint}"
    varied = make_cell(lmbda=0.5, divergence="tv")
    assert varied.folder == f"nano/sums/lmbda=0.5_tv_seed=0-{varied.fingerprint}"
    assert cell.full_fingerprint.startswith(cell.fingerprint)
    assert len(cell.full_fingerprint) == 64


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"teachers": (0, 1)}, {"teachers": (0, 1), "mixture": (0.5, 0.5)}),
        ({"teachers": (0, 1, 2)}, {"teachers": (0, 1, 2), "mixture": (1 / 3, 1 / 3, 1 / 3)}),
        ({"teachers": (0, 1)}, {"teachers": (0, 1), "mixture_temperatures": (1, 1)}),
        ({"weight": 2.0}, {"weight": 2.0, "final_weight": 2.0}),
        ({"beta": 0}, {"beta": -0.0}),
        ({"beta": 0}, {"beta": 0, "rescale": True}),
        ({"divergence": "tv", "beta": 0.3}, {"divergence": "tv"}),
    ],
)
def test_terms_that_compute_the_same_are_one(one: dict[str, Any], other: dict[str, Any]) -> None:
    defaults = {"beta": 0.5, "teacher_temperature": 1, "student_temperature": 1}
    first, second = (ResolvedDivergence(**{**defaults, **fields}) for fields in (one, other))
    assert first == second and first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "fields", [{"mixture": (0.4, 0.6)}, {"mixture_temperatures": (1, 2)}, {"final_weight": 0.0}]
)
def test_terms_that_differ_are_two(fields: dict[str, Any]) -> None:
    defaults = {"beta": 0.5, "teacher_temperature": 1, "student_temperature": 1, "teachers": (0, 1)}
    first, second = (ResolvedDivergence(**{**defaults, **extra}) for extra in ({}, fields))
    assert first.fingerprint != second.fingerprint
