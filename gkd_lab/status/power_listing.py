"""Text of `plan --power`: the noise, a row per claim, and what the columns mean."""

import math
import shutil
import textwrap
from collections.abc import Iterator

from gkd_lab.claims.grid_power import ClaimPower, GridPower, describe_notes
from gkd_lab.claims.model_settings import format_settings
from gkd_lab.claims.table_noise import EVALUATION_KEY_SETTINGS, NoiseKey, ScoreNoise
from gkd_lab.statistics.noise import FULL_SCORE
from gkd_lab.statistics.power import MAX_SEEDS
from gkd_lab.status.render import Listing

_NOISE_COLUMNS = ["scores", "a score", "a paired difference", "between examples", "models", "seeds"]
_CLAIM_COLUMNS = [
    "claim", "comparisons", "seeds", "examples", "margin", "holds from", "fails from",
    "in the paper", "seeds for it",
]  # fmt: skip
_LEGEND = (
    "holds from: true difference of every comparison, in points, at which the claim holds in 80 % of runs",
    "fails from: that of one comparison at which the claim fails, adjusted for their number",
)
_PAPER_LEGEND = (
    "in the paper: mean effect (least to largest); seeds for it: at which that mean, as the true difference "
    "of every comparison, is shown with this noise"
)
_NO_EXAMPLES_LEGEND = (
    "the noise of the examples is not known, so that this is about intervals over seeds only; `claims` "
    "counts both where predictions are kept: add --example-noise SD"
)


def list_noise(power: GridPower) -> Listing:
    """List the noise of each kind of score, as standard deviations in points."""
    if power.source.stated is not None:
        return Listing(_NOISE_COLUMNS, [["all", *_format_noise(power.source.stated)]])
    rows = [[_format_key(key), *_format_noise(noise)] for key, noise in power.noises.items()]
    return Listing(_NOISE_COLUMNS, rows)


def list_claim_powers(power: GridPower) -> Listing:
    """List the claims that a grid has comparisons of, a row each."""
    return Listing(_CLAIM_COLUMNS, [_format_claim(claim) for claim in power.claims if claim.comparisons])


def render_power_notes(power: GridPower) -> Iterator[str]:
    """Yield wrapped lines on claims without numbers, on the columns, and on noise that is not known."""
    notes = [*describe_notes(power.claims), *_LEGEND]
    if any(claim.paper for claim in power.claims):
        notes.append(_PAPER_LEGEND)
    if any(noise.example_variance is None for noise in power.noises.values()):
        notes.append(_NO_EXAMPLES_LEGEND)
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    for note in notes:
        yield from textwrap.wrap(note, width, subsequent_indent="  ")


def _format_claim(claim: ClaimPower) -> list[str]:
    """Return the texts of a row; empty where something does not apply."""
    paper = seeds = ""
    if claim.paper is not None:
        paper = f"{claim.paper.mean:+.1f}"
        if claim.paper.least < claim.paper.largest:
            paper += f" ({claim.paper.least:+.1f} to {claim.paper.largest:+.1f})"
        seeds = f">{MAX_SEEDS}" if claim.paper_seeds is None else str(claim.paper_seeds)
    margins = " to ".join(f"{margin:g}" for margin in dict.fromkeys((claim.margins[0], claim.margins[-1])))
    return [
        claim.claim.id, str(claim.comparisons), str(claim.seeds),
        "all" if claim.examples is None else str(claim.examples),
        margins if any(claim.margins) else "",
        _format_difference(claim.holds_from), _format_difference(claim.fails_from),
        paper, seeds if claim.is_noise_known else "",
    ]  # fmt: skip


def _format_difference(points: float | None) -> str:
    """Format `+1.2`; `none` beyond the 100 points of a score; empty where there is none."""
    if points is None:
        return ""
    return f"{points:+.1f}" if abs(points) <= FULL_SCORE else "none"


def _format_key(key: NoiseKey) -> str:
    """Format `summarization, rouge2, sampling, γ = 0.5`."""
    return format_settings(dict(zip(EVALUATION_KEY_SETTINGS, key, strict=True)), EVALUATION_KEY_SETTINGS)


def _format_noise(noise: ScoreNoise) -> list[str]:
    """Return texts of standard deviations between seeds and between examples, and what they are from.

    That of a paired difference has its 95 % interval.
    """
    score, difference = math.sqrt(noise.variance + noise.shared_variance), math.sqrt(2 * noise.variance)
    interval = ""
    if math.isfinite(noise.degrees):
        low, high = _compute_deviation_interval(noise)
        interval = f" ({low:.2f} to {high:.2f})"
    is_known = noise.example_variance is not None
    examples = f"{math.sqrt(2 * (noise.example_variance or 0.0)):.2f}" if is_known else "not known"
    counts = [str(noise.models or ""), str(noise.seeds or "")]
    return [f"{score:.2f}", f"{difference:.2f}{interval}", examples, *counts]


def _compute_deviation_interval(noise: ScoreNoise) -> tuple[float, float]:
    """Return the 95 % interval of a paired difference's standard deviation, by chi-squared."""
    from scipy.special import chdtri

    squares = 2 * noise.variance * noise.degrees
    low, high = (math.sqrt(squares / float(chdtri(noise.degrees, level))) for level in (0.025, 0.975))
    return low, high
