"""The shipped experiments, and how names of experiments, data and models are resolved."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gkd_lab import experiments
from gkd_lab.config import ConfigError
from gkd_lab.config.experiment import Scale
from gkd_lab.config.packs import group_cells_into_packs

COUNTS = {
    "adversarial": 21,
    "baselines": 108,
    "classification": 21,
    "cross_tokenizer": 12,
    "data_fraction": 48,
    "fresh_text": 120,
    "hidden_states": 30,
    "implementation": 36,
    "instruction": 15,
    "lambda_beta_arithmetic": 75,
    "lambda_beta_sampling": 45,
    "lambda_beta_summarization": 75,
    "lambda_beta_translation": 75,
    "learning_rate": 18,
    "nano_grid": 45,
    "nano_instruction": 15,
    "nano_summarization": 15,
    "nano_translation": 15,
    "offline_teacher": 24,
    "on_policy_share": 70,
    "quality_diversity": 15,
    "quickstart": 15,
    "rate_choice": 135,
    "rl_tradeoff": 18,
    "rows": 75,
    "self_distillation": 15,
    "several_teachers": 12,
    "size_limited": 90,
    "soft_and_hard": 18,
    "student_size": 81,
    "teacher_temperature": 30,
    "unconverged_start": 75,
}
METHODS_COLLAPSE = {"baselines", "instruction", "rl_tradeoff", "self_distillation"}
"""Their methods fix a divergence, or a weight, which the others cross."""
COUNTED_BY_ROWS = {"data_fraction"}
NANO_ONLY = {"classification"}
"""Classifiers are made from scratch."""
NOT_AT_PAPER_SCALE = {"implementation"}
"""TRL's trainer takes no encoder-decoder."""
LARGER = {"self_distillation": {"teacher": "large", "student": "google/flan-t5-large"}}
"""What an experiment's description says to set there."""
ROW = '{"question": "1 + 1 =", "answer": "1 1 #### 2"}\n'


def rows(folder: Path, text: str = ROW) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(text * 3)
    return folder


def test_a_missing_file_is_answered_with_the_nearest_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes.yaml").touch()
    Path("recipe.txt").touch()
    with pytest.raises(ConfigError, match=r"no experiment file 'recipe.yaml'; did you mean 'recipes.yaml'\?"):
        experiments.find_experiment_file("recipe.yaml")
    with pytest.raises(ConfigError, match="an experiment's name: did you mean 'quickstart'"):
        experiments.find_experiment_file("quickstrat.yaml")


def test_a_damaged_row_that_only_an_evaluation_reads_is_named_before_the_training(tmp_path: Path) -> None:
    """The last of 10 train rows is held out for validation."""
    row = json.dumps({"prompt": "a", "target": "b"})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 9 + '{"prompt": "a", "tar')
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"{{description: d, task: text, data: {{source: {tmp_path}}}, batch_size: 4,"
        " evaluations: [{decoding: greedy, split: validation}]}"
    )
    grid = experiments.load(str(file), outputs=tmp_path / "outputs")
    with pytest.raises(ConfigError, match=r"train\.jsonl:10: expected a JSON object"):
        experiments.check_before_run(grid)
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 10)
    experiments.check_before_run(experiments.load(str(file), outputs=tmp_path / "outputs"))


def test_every_experiment_has_a_stated_count() -> None:
    assert set(COUNTS) == set(experiments.list_experiment_files())


def test_a_missing_generator_is_reported_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("gkd_lab.tasks.instruction.version", missing)
    grid = experiments.load("nano_instruction", outputs=tmp_path)
    with pytest.raises(ConfigError, match=r"reasoning-gym .*'gkd-lab\[reasoning"):
        experiments.check_generators_and_rewards(grid)
    experiments.check_generators_and_rewards(experiments.load("quickstart", outputs=tmp_path))


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_every_experiment_expands_to_its_stated_count(name: str, count: int, tmp_path: Path) -> None:
    grid = experiments.load(name, outputs=tmp_path)
    assert len(grid.cells) == count
    assert bool(grid.stands_for) == (name in METHODS_COLLAPSE)
    assert f"{count} cells" in grid.experiment.description
    assert experiments.outline_experiment(name)[1] == count


def test_the_nano_grid_crosses_lmbda_and_beta_with_all_three_tasks(tmp_path: Path) -> None:
    cells = experiments.load("nano_grid", outputs=tmp_path).cells
    points = {(cell.task, cell.lmbda, cell.beta) for cell in cells}
    tasks = ("arithmetic", "translation", "summarization")
    betas = (0, 0.1, 0.5, 0.9, 1)
    assert points == {(t, x, b) for t in tasks for x in (0, 0.5, 1) for b in betas}
    assert [len(group) for group in group_cells_into_packs(cells, "auto")] == [15, 15, 15]


def test_experiments_share_equal_cells(tmp_path: Path) -> None:
    folders = {cell.folder for cell in experiments.load("nano_grid", outputs=tmp_path).cells}
    assert {cell.folder for cell in experiments.load("quickstart", outputs=tmp_path).cells} <= folders


def test_an_experiment_is_a_name_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    for place in ("experiments/own.yaml", "mine.yaml"):
        Path(place).write_text("description: d\ntask: arithmetic\n")
    assert experiments.load("own").name == "own"
    assert experiments.load("mine.yaml").name == "mine"
    assert set(experiments.list_experiment_files()) == {"own", *COUNTS}
    with pytest.raises(ConfigError, match=r"file 'none.yaml'"):
        experiments.load("none.yaml")
    with pytest.raises(ConfigError, match=r"'quikstart'.*'quickstart'"):
        experiments.load("quikstart")


def test_a_single_cell_of_an_experiment_is_one_of_its_grid(tmp_path: Path) -> None:
    planned = experiments.load("quickstart", outputs=tmp_path).cells
    fields = {"task": "arithmetic", "lmbda": "0.5", "beta": "0.1"}
    (cell,) = experiments.load_single_cell(fields, name="quickstart", outputs=tmp_path).cells
    (alone,) = experiments.load_single_cell(fields, outputs=tmp_path).cells
    assert cell.folder in {other.folder for other in planned}
    assert alone.folder == cell.folder


@pytest.mark.parametrize("fields", [{"lmbda": "0,1", "beta": "0"}, {"lmbda": "0"}])
def test_more_than_one_cell_is_refused(fields: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cells of 'quickstart' .*--"):
        experiments.load_single_cell(fields, name="quickstart", outputs=tmp_path)


def test_a_single_cell_of_total_variation_needs_no_beta(tmp_path: Path) -> None:
    fields = {"task": "arithmetic", "lmbda": "0", "divergence": "tv"}
    (cell,) = experiments.load_single_cell(fields, name="quickstart", outputs=tmp_path).cells
    assert (cell.divergence, cell.beta) == ("tv", None)


def test_a_data_folder_is_identified_by_content(tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        fields = {"task": "arithmetic", "data.source": str(folder)}
        (cell,) = experiments.load_single_cell(fields, outputs=tmp_path / "outputs").cells
        assert cell.training.data.kind == "folder"
        return cell.full_fingerprint

    first = fingerprint(rows(tmp_path / "a"))
    assert fingerprint(rows(tmp_path / "b")) == first
    assert fingerprint(rows(tmp_path / "c", ROW.replace("2", "3"))) != first
    rows(tmp_path / "a", ROW.replace("2", "33"))
    assert fingerprint(tmp_path / "a") != first


def test_a_missing_data_folder_is_reported_with_the_nearest(tmp_path: Path) -> None:
    rows(tmp_path / "gsm8k")
    with pytest.raises(ConfigError, match=r"/gsm8'.*/gsm8k'"):
        experiments.load("quickstart", overrides={"data.source": str(tmp_path / "gsm8")})


def test_an_unknown_metric_is_refused_before_anything_runs(tmp_path: Path) -> None:
    overrides = {"evaluations": "[{decoding: greedy, metrics: [acuracy]}]"}
    with pytest.raises(ConfigError, match=r"'acuracy'.*'accuracy'"):
        experiments.load("quickstart", overrides=overrides, outputs=tmp_path)


HUB = {"task": "arithmetic", "data.source": "owner/rows"}


def test_an_unresolved_hub_name_asks_for_a_line_in_revisions_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hub is offline") as caught:
        experiments.load_single_cell(HUB, outputs=tmp_path)
    place, _, line = str(caught.value).partition("add it to ")[2].partition(": ")
    assert place == str(tmp_path / "revisions.json")
    Path(place).write_text(line)
    with pytest.raises(ConfigError, match=r"COMMIT .*'owner/rows'"):
        experiments.load_single_cell(HUB, outputs=tmp_path)
    Path(place).write_text(line.replace("COMMIT", "0a1b2c"))
    (cell,) = experiments.load_single_cell(HUB, outputs=tmp_path).cells
    assert cell.training.data.revision == "0a1b2c"
    assert cell.training.data.name == "owner/rows"


def test_another_hub_name_is_read_without_the_part_of_the_scales_data_set(tmp_path: Path) -> None:
    configs = {"openai/gsm8k": "main", "owner/rows": None}
    commits = {"datasets": dict.fromkeys(configs, "0a"), "models": {"owner/model": "0b"}}
    (tmp_path / "revisions.json").write_text(json.dumps(commits))
    for name, config in configs.items():
        fields = {**HUB, "data.source": name, "teacher": "owner/model", "student": "owner/model"}
        grid = experiments.load_single_cell(fields, scale="paper", outputs=tmp_path)
        assert grid.cells[0].training.data.config == config


def test_a_commit_changes_the_fingerprint(tmp_path: Path) -> None:
    fingerprints = set()
    for commit in ("0a", "0b"):
        commits_file = tmp_path / "revisions.json"
        commits_file.write_text(json.dumps({"datasets": {"owner/rows": commit}}))
        fingerprints.add(experiments.load_single_cell(HUB, outputs=tmp_path).cells[0].fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"datasets": ', r"revisions\.json:1: not valid JSON"),
        ("[]", r"revisions\.json: expected"),
        ('{"datasets": ["owner/rows"]}', r"revisions\.json: expected"),
    ],
)
def test_a_damaged_revisions_json_is_reported_and_not_changed(
    text: str, message: str, tmp_path: Path
) -> None:
    commits_file = tmp_path / "revisions.json"
    commits_file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        experiments.load_single_cell(HUB, outputs=tmp_path)
    assert commits_file.read_text() == text


def test_a_checkpoint_folder_is_identified_by_content(tmp_path: Path) -> None:
    def revision(folder: Path) -> str | None:
        fields = {"task": "arithmetic", "student": str(folder)}
        (cell,) = experiments.load_single_cell(fields, outputs=tmp_path / "outputs").cells
        return cell.training.start.model.revision

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert revision(tmp_path / "one") == revision(tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").write_text("weights")
    assert revision(tmp_path / "one") != revision(tmp_path / "two")
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        revision(tmp_path / "three")


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        (name, scale)
        for scale, without in (("smol", set()), ("paper", NOT_AT_PAPER_SCALE))
        for name in COUNTS
        if name not in COUNTED_BY_ROWS | NANO_ONLY | without
    ],
)
def test_every_experiment_has_as_many_cells_at_the_larger_scales(name: str, scale: Scale) -> None:
    changes = LARGER.get(name, {})
    assert experiments.outline_experiment(name, scale=scale, overrides=changes)[1] == COUNTS[name]


@pytest.mark.parametrize("name", NOT_AT_PAPER_SCALE)
def test_trl_is_refused_for_the_papers_encoder_decoders(name: str) -> None:
    with pytest.raises(ConfigError, match="implementation trl: task arithmetic has encoder-decoder"):
        experiments.outline_experiment(name, scale="paper")
