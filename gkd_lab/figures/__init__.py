"""The paper's figures, drawn from a table with matplotlib. No torch.

    heat_map          scores over lmbda and divergence (Figs 6, 7, A.12 to A.14)
    paired_heat_maps  a run's heat maps beside the paper's
    curves            scores against lmbda (Fig. 8)
    loss_curves       the training loss, or another logged quantity, against the step
    bars              scores of methods (Figs 2, 9, A.10, A.11, A.15) or of losses
    lines             scores along an axis such as the student's size or the training rows (Figs 1, 3)
    tradeoff          quality against diversity of sampled text (Fig. 4)
    reward_gains      gain in quality against gain in a reward (Fig. 5)
    interquartile_means, profiles  methods over all tasks (Agarwal et al. 2021)
    cost_scatter      scores against tokens or seconds of training

Each takes the long table (`gkd_lab.table`), or chosen scores of it, and returns a matplotlib Figure.
"""

from gkd_lab.figures.cost_figures import cost_scatter
from gkd_lab.figures.heat_maps import heat_map, paired_heat_maps
from gkd_lab.figures.method_figures import bars, lines
from gkd_lab.figures.profiles import interquartile_means, profiles
from gkd_lab.figures.scatter_figures import reward_gains, tradeoff
from gkd_lab.figures.score_curves import curves, loss_curves

__all__ = [
    "bars",
    "cost_scatter",
    "curves",
    "heat_map",
    "interquartile_means",
    "lines",
    "loss_curves",
    "paired_heat_maps",
    "profiles",
    "reward_gains",
    "tradeoff",
]
