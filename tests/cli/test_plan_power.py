"""`gkd-lab plan EXP --power`: what it prints, and requests that it refuses."""

from pathlib import Path

import pytest

from gkd_lab.cli import main

NOT_KNOWN = (
    "the noise of quickstart at scale nano is not known: no model with two seeds is done below 'outputs'"
)
INVALID_REQUESTS = {
    "quickstart --power": NOT_KNOWN,
    "quickstart --power --example-noise 3": NOT_KNOWN,
    "quickstart --power --noise 0": "--noise 0: expected points above 0, at most 100",
    "quickstart --power --noise nan": "--noise nan: expected points above 0, at most 100",
    "quickstart --power --noise x": "Invalid value for '--noise'",
    "quickstart --power --noise 1 --example-noise 101": "--example-noise 101: expected points above 0",
    "quickstart --power --noise 1 --noise-from a": "--noise and --noise-from both say what the noise is",
    "quickstart --power --noise-from quikstart": "--noise-from quikstart: unknown experiment 'quikstart'",
    "quickstart --power --noise-from none.parquet": "--noise-from none.parquet: no table none.parquet",
    "quickstart --power --noise-from lambda_beta_summarization": "is of summarization rouge2, not of what",
    "adversarial --power --noise 1": "adversarial has none: it names no claim of the paper",
    "learning_rate --power --noise 1": "learning_rate has none: C27: is measured, without a verdict",
    "quickstart --noise 1": "--noise-from, --noise and --example-noise are about power: add --power",
}


@pytest.mark.parametrize(("words", "message"), INVALID_REQUESTS.items())
def test_an_invalid_request_gives_one_message_and_exit_status_2(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words.split()])
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("gkd-lab: ") and message in err
    assert not list(tmp_path.iterdir())


def test_noise_differences_and_the_papers_effect_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["plan", "unconverged_start", "--power", "--set", "seed=0,1,2,3,4,5,6,7,8,9"])
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    assert "analysis/tables/unconverged_start.parquet; standard deviations in points" in out
    (noise,) = (line for line in lines if line[0] == "arithmetic, accuracy, greedy")
    assert [text.strip() for text in noise[1:] if text] == [
        "3.05",
        "4.12 (3.48 to 5.06)",
        "not known",
        "15",
        "5",
    ]
    rows = {line[0]: [text.strip() for text in line[1:] if text] for line in lines if line[0].startswith("C")}
    assert rows["C1"] == ["5", "10", "500", "+5.4", "-5.5", "+2.5 (+0.9 to +4.2)", "38"]
    assert rows["C3"][3:6] == ["1.3", "+4.1", "-6.8"]
    assert "C25: cannot be judged by this grid: no two students of known size" in out
    assert "the noise of the examples is not known" in out
