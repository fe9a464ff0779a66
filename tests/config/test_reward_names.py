"""`alpha`, `reward` and `anchor` as one form of objectives, and what identifies a reward."""

from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config import ConfigError
from gkd_lab.config.loss_terms import ResolvedDivergence, ResolvedReward
from gkd_lab.config.packs import group_cells_into_packs
from gkd_lab.config.reward_names import BUILT_IN_REWARDS, hash_reward_module, import_reward

from .stub import get_refusal, make_cell, make_grid

SHORT: dict[str, Any] = {"reward": "exact_match", "alpha": 0.25, "beta": 0.9}


def test_alpha_and_reward_are_short_for_two_weighted_objectives() -> None:
    objectives = [{"beta": 0.9, "weight": 0.25}, {"type": "reward", "name": "exact_match", "weight": 0.75}]
    cell = make_cell(**SHORT)
    assert cell.training == make_cell(objectives=objectives).training
    assert cell.training.objectives == (
        ResolvedDivergence(beta=0.9, weight=0.25, teacher_temperature=1, student_temperature=1),
        ResolvedReward(name="exact_match", weight=0.75),
    )
    assert (cell.beta, cell.divergence) == (0.9, "jsd")


def test_terms_with_weight_0_are_dropped() -> None:
    assert make_cell(**{**SHORT, "alpha": 1}).training == make_cell(beta=0.9).training
    (alone,) = make_cell(**{**SHORT, "alpha": 0}).training.objectives
    assert alone == ResolvedReward(name="exact_match", weight=1)
    assert "lmbda=1_reward_seed=0-" in make_cell(**{**SHORT, "alpha": 0}).folder


def test_the_other_weight_is_a_round_number_too() -> None:
    weights = [term.weight for term in make_cell(**{**SHORT, "alpha": 0.9}).training.objectives]
    assert weights == [0.9, 0.1]


def test_short_and_long_form_of_a_reward_are_one_cell() -> None:
    long = {"name": "rouge2", "baseline": "none"}
    objectives = [{"beta": 0, "weight": 0.5}, {"type": "reward", "weight": 0.5, **long}]
    assert make_cell(reward=long, alpha=0.5).training == make_cell(objectives=objectives).training
    assert (
        make_cell(reward={"name": "rouge2"}, alpha=0.5).training
        == make_cell(reward="rouge2", alpha=0.5).training
    )


def test_rewards_and_alphas_are_axes_and_share_a_model() -> None:
    cells = make_grid(grid={"reward": ["exact_match", "rouge2"], "alpha": [0, 0.5, 1]}).cells
    assert len(cells) == 5  # without a reward's weight they are one
    assert [len(pack) for pack in group_cells_into_packs(cells, "auto")] == [5]


def test_the_rlef_method_anchors_to_the_sft_student() -> None:
    changes = {"reward": "exact_match", "beta": 0.9}
    rlef = make_cell(method="rlef", **changes).training
    assert rlef == make_cell(alpha=0.05, anchor="start", **changes).training
    assert rlef.fingerprint != make_cell(alpha=0.05, **changes).training.fingerprint
    assert (
        make_cell(alpha=0.05, anchor="teacher", **changes).training
        == make_cell(alpha=0.05, **changes).training
    )
    grid = make_grid(grid={"method": ["gkd", "rlef"], "alpha": [0.05, 0.5]}, **changes)
    assert len(grid.cells) == 3


def test_a_reward_model_is_hashed_by_its_revision() -> None:
    (_, hub) = make_cell(reward={"name": "entailment", "model": "owner/nli"}, alpha=0.5).training.objectives
    (_, local) = make_cell(reward={"name": "entailment", "model": "/a/folder"}, alpha=0.5).training.objectives
    assert (hub.model, hub.revision, hub.path) == ("owner/nli", "abc", None)
    assert (local.model, local.revision, local.path) == (None, "sha256:1", "/a/folder")
    assert "folder" not in local.canonical_json


# ---- a user's function ----


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a package of the current folder whose import would leave a trace."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name / "deeper"
    folder.mkdir(parents=True)
    for place in (tmp_path / name, folder):
        (place / "__init__.py").write_text("open('imported', 'w').close()\n")
    file = folder / "rewards.py"
    file.write_text("def f(prompts, texts, references):\n    return [1.0] * len(texts)\n")
    monkeypatch.chdir(tmp_path)
    return file


def get_import_path(module: Path) -> str:
    return f"{module.parts[-3]}.deeper.rewards:f"


def test_a_reward_function_is_hashed_by_its_module_without_an_import(module: Path) -> None:
    first = make_cell(reward=get_import_path(module), alpha=0.5).training
    assert not Path("imported").exists()
    (_, reward) = first.objectives
    assert reward.content == hash_reward_module(get_import_path(module))
    module.write_text(module.read_text().replace("1.0", "2.0"))
    assert make_cell(reward=get_import_path(module), alpha=0.5).fingerprint != first.fingerprint
    assert import_reward(get_import_path(module))(["p"], ["t"], ["r"]) == [2]
    assert Path("imported").exists()
    assert (
        hash_reward_module(get_import_path(module))
        == make_cell(reward=get_import_path(module), alpha=0.5).training.objectives[1].content
    )


@pytest.mark.parametrize("name", BUILT_IN_REWARDS)
def test_built_in_rewards_are_not_hashed_by_a_file(name: str) -> None:
    assert hash_reward_module(name) is None


@pytest.mark.parametrize(
    "name", ["json:dumps", "json.decoder:f", "gkd_lab.config.reward_names:import_reward"]
)
def test_an_installed_module_is_hashed(name: str) -> None:
    assert len(hash_reward_module(name) or "") == 64


@pytest.mark.parametrize(
    "name", ["no_such_thing:f", "json.no_such_thing:f", "json.decoder.deeper:f", "sys:f"]
)
def test_a_module_without_a_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no module .*exact_match"):
        hash_reward_module(name)


# ---- what makes no sense ----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lmbda": 0}, "lmbda 0 it writes"),
        ({"method": "supervised_kd"}, "lmbda 0 it"),
        ({"lmbda": 0.5, "alpha": 0}, "lmbda 0.5 takes"),
        ({"temperature": 0.5}, "got temperature 0.5"),
        ({"alpha": None}, "reward: give alpha too"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"alpha": 1, "anchor": "start"}, "alpha 1 with anchor"),
        ({"anchor": "studnt"}, "anchor: 'studnt'"),
        ({"reward": None}, "alpha 0.25 says"),
        ({"reward": None, "alpha": None, "anchor": "start"}, "anchor start says"),
        ({"reward": None, "alpha": None, "method": "rlef"}, "method rlef needs"),
        ({"reward": "exact_mach"}, "mean 'exact_match'"),
        ({"reward": "no_such.thing:f"}, "module 'no_such.thing'"),
        ({"reward": {"name": "entailment"}}, "give `model`"),
        ({"reward": {"name": "rouge2", "model": "a/b"}}, "got 'a/b'"),
        ({"reward": {"name": "rouge2", "basline": "none"}}, "field 'reward.basline'"),
        ({"reward": {"name": "rouge2", "baseline": "mean"}}, "reward.baseline: 'mean'"),
        ({"reward": {"name": "rouge2", "baseline": "none", "normalize": True}}, "baseline 'none' leaves"),
        ({"objectives": [{"beta": 0}]}, "beta, reward, alpha"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in get_refusal(
        **{name: one for name, one in {**SHORT, **changes}.items() if one is not None}
    )


def test_a_reward_among_objectives_is_checked_like_the_shorthand() -> None:
    listed = [{"beta": 0.5}, {"type": "reward", "name": "rouge2"}]
    assert "lmbda 0 " in get_refusal(objectives=listed, lmbda=0)
    assert "objectives[0].name" in get_refusal(objectives=[{"type": "reward"}])
