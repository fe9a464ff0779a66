"""The files that install the project agree with each other, and a wheel holds what it must."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import trove_classifiers
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
BOOTSTRAP = ROOT / "bootstrap.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()
}
PINNED_EXTRAS = sorted(set(EXTRAS) - {"vllm"})
TESTED_EXTRAS = ("dev", "docs", "notebook", "peft", "gguf", "trackio")
"""Extras that the tests of the oldest versions install."""
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())


def constraint_lines(name: str = "constraints.txt") -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).open())
    return [line for line in lines if line]


def pins() -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in constraint_lines()]
    return {canonicalize_name(each.name): each for each in requirements}


def list_versions(requirements: list[Requirement], operator: str) -> dict[str, Version]:
    """Name -> the version that stands behind the operator."""
    return {
        canonicalize_name(each.name): Version(specifier.version)
        for each in requirements
        for specifier in each.specifier
        if specifier.operator == operator
    }


def unmet(requirements: list[Requirement]) -> list[str]:
    """The requirements that no pin satisfies, the project's own extras left aside."""
    pinned = pins()
    found = []
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name == PROJECT["name"]:
            continue
        pin = pinned.get(name)
        if pin is None or next(iter(pin.specifier)).version not in requirement.specifier:
            found.append(str(requirement))
    return found


def bootstrap(*arguments: str, prelude: str = "pass") -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys; {prelude}; sys.argv = {['bootstrap.py', *arguments]!r}; "
    code += f"runpy.run_path({str(BOOTSTRAP)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_constraint_is_one_exact_version() -> None:
    for requirement in (Requirement(line) for line in constraint_lines()):
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators == ["=="], str(requirement)
        assert "*" not in str(requirement.specifier)
        assert requirement.url is None


def test_no_package_is_pinned_twice() -> None:
    assert len(pins()) == len(constraint_lines())


def test_the_pins_satisfy_the_core() -> None:
    assert unmet([Requirement(line) for line in PROJECT["dependencies"]]) == []


@pytest.mark.parametrize("extra", PINNED_EXTRAS)
def test_the_pins_satisfy_the_extra(extra: str) -> None:
    assert unmet(EXTRAS[extra]) == []


def test_the_lower_bounds_are_the_versions_that_the_oldest_tests_install() -> None:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in TESTED_EXTRAS:
        requirements += [each for each in EXTRAS[extra] if each.name != PROJECT["name"]]
    oldest = [Requirement(line) for line in constraint_lines("constraints-oldest.txt")]
    assert {specifier.operator for each in oldest for specifier in each.specifier} == {"=="}
    assert list_versions(oldest, "==") == list_versions(requirements, ">=")
    assert len(list_versions(requirements, ">=")) == len(requirements), "each has a lower bound"


def test_the_workflow_runs_ci_builds_the_site_and_tests_the_oldest_and_the_newest_versions() -> None:
    jobs = WORKFLOW["jobs"]
    assert {"run": ".ci/run"} in jobs["pinned"]["steps"]
    assert {"run": "make docs"} in jobs["site"]["steps"]
    matrix = {
        each["versions"]: each["constraints"] for each in jobs["range"]["strategy"]["matrix"]["include"]
    }
    assert matrix == {"oldest": "-c constraints-oldest.txt", "newest": ""}
    commands = [step["run"] for step in jobs["range"]["steps"] if "run" in step]
    paths = [word for word in commands[-1].split() if word.startswith("tests/")]
    assert "tests/training/drop_in" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_torch_is_pinned_and_brings_no_cuda_package() -> None:
    pinned = pins()
    assert str(pinned["torch"]) == "torch==2.13.0"
    assert [name for name in pinned if name.startswith(("nvidia", "triton", "cuda"))] == []


def test_vllm_is_an_extra_outside_the_constraints() -> None:
    assert "vllm" in EXTRAS
    assert "vllm" not in pins()


def test_the_extras_have_the_names_that_the_documentation_uses() -> None:
    tools = {"peft", "gguf", "ray", "trackio", "deepspeed", "vllm"}
    assert set(EXTRAS) == tools | {"notebook", "docs", "dev", "reasoning"}
    for tool in tools:
        assert [canonicalize_name(each.name) for each in EXTRAS[tool]] == [tool]


def test_the_version_is_the_package_s_own() -> None:
    import gkd_lab

    assert gkd_lab.__version__ == PROJECT["version"]


def test_the_citation_names_this_version_its_license_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys(), "what the format asks for"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["doi"].endswith("arXiv.2306.13649")
    assert len(paper["authors"]) == 7
    assert PROJECT["urls"] == {"Paper": paper["url"]}


def test_every_classifier_is_one_of_pypi() -> None:
    assert set(PROJECT["classifiers"]) <= trove_classifiers.classifiers


def test_the_site_is_built_where_the_tests_run_and_adds_nothing_to_the_core() -> None:
    assert "docs" in next(each for each in EXTRAS["dev"] if each.name == PROJECT["name"]).extras
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    site = {canonicalize_name(each.name) for each in EXTRAS["docs"]} - {PROJECT["name"]}
    assert site and not core & site


def test_a_wheel_holds_the_package_and_the_experiments_and_nothing_else(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    experiments = sorted(path.name for path in (ROOT / "experiments").glob("*.yaml"))
    folder = "gkd_lab/_experiments/"
    shipped = sorted(name.removeprefix(folder) for name in names if name.startswith(folder))
    assert [name for name in shipped if name.endswith(".yaml")] == experiments
    assert "quickstart.yaml" in shipped
    assert "gkd_lab/cli/commands.py" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"gkd_lab", f"gkd_lab-{PROJECT['version']}.dist-info"}


def test_an_editable_install_copies_no_experiment(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"])
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")]


def test_bootstrap_needs_only_the_standard_library_and_is_legible_to_python_3_6() -> None:
    tree = ast.parse(BOOTSTRAP.read_text(), feature_version=(3, 6))
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported <= sys.stdlib_module_names
    assert "from __future__" not in BOOTSTRAP.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["instal"], "no command is called 'instal'"),
        ([], "usage:"),
        (["install", "pefft"], "no extra is called 'pefft'; there are: peft, gguf"),
        (["quickstart", "--fast"], "quickstart does not take '--fast'"),
    ],
)
def test_bootstrap_refuses_a_wrong_request(arguments: list[str], said: str) -> None:
    result = bootstrap(*arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_bootstrap_tells_an_old_python_what_is_needed() -> None:
    result = bootstrap("test", prelude="sys.version_info = (3, 10, 2, 'final', 0)")
    assert result.returncode == 2
    assert "Python 3.11" in result.stderr


def test_bootstrap_leaves_a_folder_alone_that_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = bootstrap("install", prelude=f"import os; os.environ['GKD_LAB_VENV'] = {str(tmp_path)!r}")
    assert result.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
