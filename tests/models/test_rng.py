"""Check that random streams depend on (seed, step, purpose) alone, and their golden values."""

import itertools
import math

import torch

from gkd_lab.encoding.batches import KeyedBatchSampler
from gkd_lab.models.rng import derive_seed, draw_permutation, draw_uniforms, is_on_policy


def coins(lmbda: float, seed: int, steps: int = 1000) -> list[bool]:
    return [is_on_policy(lmbda, seed, step) for step in range(steps)]


def test_random_streams_have_their_recorded_values() -> None:
    assert derive_seed(0, 0, "coin") == 9072144860899798558
    assert [derive_seed(1, 2, p) % 1000 for p in ("coin", "sampling", "order")] == [416, 332, 768]
    assert "".join("ox"[c] for c in coins(0.5, 0, 20)) == "ooxoxxoxxoxxxooxxxoo"
    torch.testing.assert_close(
        draw_uniforms(0, 3, "sampling", 2, 2),
        torch.tensor(
            [
                [0.25752614757477865, 0.8734870229151329],
                [0.5951908507462763, 0.6031961505301975],
            ],
            dtype=torch.float64,
        ),
        rtol=0,
        atol=1e-15,
    )
    assert draw_permutation(0, 1, 8) == [6, 1, 7, 2, 3, 0, 5, 4]


def test_lmbda_zero_never_samples_and_one_always_does() -> None:
    for seed in range(3):
        assert not any(coins(0.0, seed))
        assert all(coins(1.0, seed))


def test_a_larger_lmbda_samples_whenever_a_smaller_one_does() -> None:
    tosses = [coins(lmbda, 5) for lmbda in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)]
    for smaller, larger in itertools.pairwise(tosses):
        assert all(high or not low for low, high in zip(smaller, larger, strict=True))
    assert len({sum(toss) for toss in tosses}) == len(tosses)


def test_the_coin_is_fair() -> None:
    steps = 20_000
    for lmbda in (0.1, 0.5, 0.9):
        heads = sum(coins(lmbda, 3, steps))
        deviation = math.sqrt(steps * lmbda * (1 - lmbda))
        assert abs(heads - steps * lmbda) < 4 * deviation


def test_coins_of_neighbouring_steps_and_seeds_are_independent() -> None:
    rows = [coins(0.5, seed, 4000) for seed in (0, 1)]
    for first, second in ((rows[0], rows[1]), (rows[0][:-1], rows[0][1:])):
        agree = sum(a == b for a, b in zip(first, second, strict=True))
        assert abs(agree - len(first) / 2) < 4 * math.sqrt(len(first) / 4)


def test_each_purpose_seed_and_step_has_a_stream_of_its_own() -> None:
    keys = [(0, 0, "sampling"), (1, 0, "sampling"), (0, 1, "sampling"), (0, 0, "evaluation")]
    drawn = {tuple(draw_uniforms(*key, 1, 4)[0].tolist()) for key in keys}
    assert len(drawn) == len(keys)


def test_noise_is_uniform_and_below_one() -> None:
    noise = draw_uniforms(0, 0, "sampling", 400, 50)
    assert noise.dtype == torch.float64
    assert noise.min() >= 0
    assert noise.max() < 1
    tenths = torch.histc(noise.flatten(), bins=10, min=0, max=1)
    chi_square = ((tenths - 2000) ** 2 / 2000).sum()
    assert chi_square < 27.88  # the 99.9 % point with 9 degrees of freedom


def test_a_larger_draw_begins_with_the_rows_of_a_smaller_one() -> None:
    torch.testing.assert_close(
        draw_uniforms(0, 0, "sampling", 8, 5)[:2], draw_uniforms(0, 0, "sampling", 2, 5), rtol=0, atol=0
    )


def test_an_epoch_has_every_row_once_in_its_own_order() -> None:
    orders = [draw_permutation(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_holds_the_next_rows_of_each_seed() -> None:
    batches = list(KeyedBatchSampler(10, 4, (0, 7)))
    assert len(batches) == 2
    for position, batch in enumerate(batches):
        part = slice(4 * position, 4 * position + 4)
        assert batch == draw_permutation(0, 0, 10)[part] + draw_permutation(7, 0, 10)[part]
