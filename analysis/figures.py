"""Draw the figures of README and docs from the committed tables.

    python analysis/figures.py [--losses OUTPUTS]

`--losses` first writes `losses.csv` anew from the records of `lambda_beta_arithmetic` in that folder.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from gkd_lab import curves, experiments, heat_map
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.figures import (
    bars,
    interquartile_means,
    lines,
    paired_heat_maps,
    profiles,
    reward_gains,
    tradeoff,
)
from gkd_lab.figures.layout import add_legend, create_axes, set_panel_title
from gkd_lab.figures.paper_maps import pair_maps
from gkd_lab.figures.style import METHOD_COLORS, SMALL_SIZE, apply_style
from gkd_lab.report.notebooks import add_gain, combine_with_paper, load_paper_table, read_table
from gkd_lab.store import Store

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
    rows = pd.read_csv(LOSSES)
    losses = rows.groupby(["lmbda", "step"])["loss"].mean()
    names = {0.0: "fixed text (λ = 0)", 1.0: "student-written text (λ = 1)"}
    with apply_style():
        figure, (axes,) = create_axes(1, 2.3)
        for color, (lmbda, name) in zip(
            (METHOD_COLORS["seqkd"], METHOD_COLORS["gkd"]), names.items(), strict=True
        ):
            line = losses[lmbda]
            axes.plot(line.index, line, color=color, label=name)
            axes.annotate(
                f"{line.iloc[-1]:.2g}", (line.index[-1], line.iloc[-1]), (4, 0), fontsize=SMALL_SIZE,
                textcoords="offset points", va="center", color=color, annotation_clip=False,
            )  # fmt: skip
        axes.set(xlabel="step", ylabel="forward KL (nats per token)", yscale="log")
        axes.minorticks_off()
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        set_panel_title(axes, "arithmetic", f"mean of {rows['seed'].nunique()} seeds")
        add_legend(figure, [axes])
        return figure


def draw_gallery() -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) of the kinds that tables draw, by the lines that docs/gallery.md shows."""
    translation = combine_with_paper(read_table("lambda_beta_translation"), load_paper_table("6"))
    yield "heat_map", heat_map(translation, "bleu")
    pairs = pair_maps(load_table_scores(read_table("lambda_beta_arithmetic")), "arithmetic")
    yield "paired_heat_maps", paired_heat_maps(pairs)
    shares = combine_with_paper(read_table("on_policy_share"), load_paper_table("8"))
    yield "curves", curves(shares, "accuracy")
    methods = combine_with_paper(read_table("baselines"), load_paper_table("9", axes=["method"]))
    yield "bars", bars(add_gain(methods, "accuracy"), "gain in accuracy")
    yield "lines", lines(read_table("rows"), "accuracy", x_axis="student.sft.rows", line_axis="lmbda")
    sampled = combine_with_paper(read_table("quality_diversity"), load_paper_table("4"))
    yield "tradeoff", tradeoff(sampled, "rouge2", "self_bleu")
    rewarded = read_table("rl_tradeoff")
    yield "reward_gains", reward_gains(rewarded, "rouge2", "accuracy", evaluation="sample1")
    yield "interquartile_means", interquartile_means(read_table("baselines"))
    yield "profiles", profiles(read_table("baselines"))


def save(figure: Figure, name: str) -> None:
    """Write a figure into the folder of the docs' images."""
    figure.savefig(IMAGES / f"{name}.png", dpi=200)
    print(f"{name}.png")


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", type=Path, metavar="OUTPUTS", help="folder of the records")
    outputs = parser.parse_args().losses
    if outputs:
        collect_losses(outputs)
    os.environ["GKD_LAB_TABLES"] = str(HERE / "tables")
    rows = read_table("rows")
    save(lines(rows, "accuracy", "student.sft.rows", "lmbda", evaluation="greedy"), "rows")
    for name, (metric, figures) in PAPER_MAPS.items():
        frame = combine_with_paper(read_table(name), load_paper_table(*figures))
        save(heat_map(frame, metric), name)
    save(heat_map(read_table("quickstart"), "accuracy"), "quickstart")
    save(draw_losses(), "losses")
    for name, figure in draw_gallery():
        save(figure, f"gallery_{name}")


if __name__ == "__main__":
    main()
