"""Draw the figures of README and docs from the committed tables.

    python analysis/figures.py [--losses OUTPUTS]

`--losses` first writes `losses.csv` anew from the records of `lambda_beta_arithmetic` in that folder.
"""

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from gkd_lab import experiments, heat_map
from gkd_lab.figures import lines
from gkd_lab.figures.style import LINE_COLORS, apply_style
from gkd_lab.report.notebooks import combine_with_paper, load_paper_table
from gkd_lab.store import Store
from gkd_lab.tables.load_table import read_table_file

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "img"
LOSSES = HERE / "tables" / "losses.csv"
PAPER_MAPS = {
    "lambda_beta_arithmetic": ("accuracy", ("A.14", "7")),
    "lambda_beta_translation": ("bleu", ("6",)),
    "lambda_beta_summarization": ("rouge2", ("A.13",)),
}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def collect_losses(outputs: Path) -> None:
    """Write the training loss of forward KL on fixed and on student-written text, from records."""
    grid = experiments.load("lambda_beta_arithmetic", overrides={"beta": "0", "lmbda": "0,1"})
    rows = [
        {"lmbda": cell.lmbda, "seed": cell.seed, "step": row["step"], "loss": round(row["loss"], 6)}
        for cell in grid.cells
        for row in Store(outputs).get_record(cell).read_history()
    ]
    pd.DataFrame(rows).to_csv(LOSSES, index=False)


def draw_losses() -> Figure:
    """Draw the mean loss over seeds against the step, a line for fixed and one for student-written text."""
    losses = pd.read_csv(LOSSES).groupby(["lmbda", "step"])["loss"].mean()
    names = {0.0: "fixed text (λ = 0)", 1.0: "student-written text (λ = 1)"}
    with apply_style():
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for color, (lmbda, name) in zip(LINE_COLORS, names.items(), strict=False):
            line = losses[lmbda]
            axes.plot(line.index, line, color=color, label=name)
            axes.annotate(
                f"{line.iloc[-1]:.2g}", (line.index[-1], line.iloc[-1]), (5, 0),
                textcoords="offset points", va="center", color=color, annotation_clip=False,
            )  # fmt: skip
        axes.set(xlabel="step", ylabel="forward KL to the teacher, nats per token", yscale="log")
        axes.minorticks_off()
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.legend()
        return figure


def save(figure: Figure, name: str) -> None:
    """Write a figure into the folder of the docs' images."""
    figure.savefig(IMAGES / f"{name}.png", dpi=130)
    print(f"{name}.png")


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", type=Path, metavar="OUTPUTS", help="folder of the records")
    outputs = parser.parse_args().losses
    if outputs:
        collect_losses(outputs)
    tables = {path.stem: path for path in (HERE / "tables").glob("*.parquet")}
    rows = read_table_file(tables["rows"])
    save(lines(rows, "accuracy", "student.sft.rows", "lmbda", evaluation="greedy"), "rows")
    for name, (metric, figures) in PAPER_MAPS.items():
        frame = combine_with_paper(read_table_file(tables[name]), load_paper_table(*figures))
        save(heat_map(frame, metric), name)
    save(heat_map(read_table_file(tables["quickstart"]), "accuracy"), "quickstart")
    save(draw_losses(), "losses")


if __name__ == "__main__":
    main()
