"""Quantization noise against what is known in closed form: uniforms, triangles, Bennett's Gaussian, mixtures."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from flatlab import quantization_noise
from flatlab.errors import UserError
from flatlab.quant.lsq import LSQ
from flatlab.report.quantization_noise import refused
from flatlab.results.quantization_noise import BINS, kl_null, kl_to_uniform

N = 20_000


def judged(noise, **kwargs):
    """The statistics of noise that is handed in as it is."""
    return quantization_noise(np.zeros(len(noise)) + 1.0, 1.0 + noise, **kwargs)


def gaussian(step, shape=(64, 32, 3, 3), seed=0):
    """Gaussian weights of unit spread, rounded to multiples of a step."""
    w = np.random.default_rng(seed).normal(size=shape)
    return w, step * np.round(w / step)


# --- the divergence and its null -----------------------------------------------------------------------------------


def test_the_divergence_of_a_histogram_is_as_by_hand():
    assert kl_to_uniform([5, 5, 5, 5]) == 0
    assert kl_to_uniform([8, 0]) == pytest.approx(np.log(2))
    assert kl_to_uniform([[3, 1], [1, 1]]) == pytest.approx([stats.entropy([3, 1], [1, 1]), 0])


@pytest.mark.parametrize(("count", "bins"), [(4096, 50), (9408, 100), (36864, 100)])
def test_the_null_is_what_uniform_samples_give(count, bins):
    draws = kl_null(count, bins, draws=2000)
    rng = np.random.default_rng(1)
    direct = [kl_to_uniform(np.histogram(each, bins)[0]) for each in rng.random((200, count))]
    assert draws.mean() == pytest.approx((bins - 1) / (2 * count), rel=0.03)
    assert np.mean(direct) == pytest.approx(draws.mean(), abs=4 * np.std(direct) / 200**0.5)
    assert stats.ks_2samp(draws, direct).pvalue > 1e-3


def test_the_null_is_exact_where_bins_are_nearly_empty():
    rng = np.random.default_rng(2)
    direct = [kl_to_uniform(np.histogram(each, 100)[0]) for each in rng.random((400, 144))]
    draws = kl_null(144, 100, draws=2000)
    assert draws.mean() == pytest.approx(np.mean(direct), abs=4 * np.std(direct) / 20)
    assert draws.mean() > 1.1 * 99 / 288  # where (B - 1) / (2 N) is too little


def test_a_uniform_lies_at_the_null_and_its_divergence_falls_with_the_sample():
    found = [judged(np.random.default_rng(3).uniform(-1, 3, size)) for size in (2000, 20_000, 200_000)]
    assert [each.kl for each in found] == sorted([each.kl for each in found], reverse=True)
    for each in found:
        assert each.kl_pvalue > 0.01 and each.ks[1] > 0.01 and each.chi_square_pvalue > 0.01
        assert each.interval(0.999)[0] < 0 < each.interval(0.999)[1]
        assert each.kl_miller_madow == pytest.approx(each.value, abs=0.02 * each.kl_null)
    assert found[-1].kl < 5e-4


def test_intervals_of_uniform_samples_cover_zero_as_often_as_they_say():
    rng = np.random.default_rng(4)
    inside = [low < 0 < high for low, high in (judged(e, bins=20).interval(0.9) for e in rng.random((100, 500)))]
    assert stats.binomtest(sum(inside), 100, 0.9).pvalue > 1e-3


def triangle(size, seed=0):
    return np.random.default_rng(seed).random((size, 2)).sum(axis=1)


def test_a_triangle_diverges_by_log_two_less_a_half():
    exact = np.log(2) - 0.5
    found = judged(triangle(400_000), bins=200)
    assert found.value == pytest.approx(exact, abs=4 * found.stderr + 2e-3)  # its ends are not quite reached
    assert found.stderr < 2e-3 and found.explained < 0.01 and found.kl_pvalue < 0.01 and found.ks[1] < 1e-6
    values = [kl_to_uniform(np.histogram(triangle(2000, seed), 10)[0]) for seed in range(400)]
    told = np.mean([judged(triangle(2000, seed), bins=10).stderr for seed in range(10)])
    assert np.std(values) == pytest.approx(told, rel=0.25)


def test_a_truncated_gaussian_diverges_as_by_quadrature():
    cut = stats.truncnorm(-1.5, 1.5)
    grid = np.linspace(-1.5, 1.5, 100_001)
    exact = np.trapezoid(cut.pdf(grid) * np.log(3 * cut.pdf(grid)), grid)
    found = judged(cut.rvs(200_000, random_state=5))
    assert found.value == pytest.approx(exact, abs=4 * found.stderr)
    assert found.stderr < 0.02 * exact


def test_the_kolmogorov_smirnov_distance_is_scipys():
    noise = triangle(300)
    low, high = noise.min(), noise.max()
    inner = np.sort(noise)[1:-1]
    expected = stats.kstest(inner, stats.uniform(low, high - low).cdf)
    assert judged(noise).ks == pytest.approx((expected.statistic, expected.pvalue))


# --- noise of rounding ---------------------------------------------------------------------------------------------


def test_rounding_a_gaussian_finely_gives_uniform_noise_of_a_twelfth():
    for step in (0.19, 1.0):  # Bennett: off by 2 exp(-2 pi^2 / step^2), at one sigma 5e-9
        w, w_q = gaussian(step)
        found = quantization_noise(w, w_q, step=step)
        assert found.count == w.size and found.clipped == 0 and found.kl_pvalue > 0.01
        assert found.variance_ratio == pytest.approx(1, abs=4 * np.sqrt(0.8 / w.size))
        assert np.abs(found.noise).max() <= step / 2


def test_rounding_to_two_sigmas_is_off_by_what_bennett_says():
    off = 2 * np.exp(-2 * np.pi**2 / 4)  # the density of e / s is 1 + off cos(2 pi e / s), at leading order
    found = quantization_noise(*gaussian(2.0, (2_000_000,)), step=2.0)
    assert found.value == pytest.approx(off**2 / 4, abs=4 * found.stderr)
    centres = (np.arange(BINS) + 0.5) / BINS - 0.5
    assert 2 * (found.counts / found.count) @ np.cos(2 * np.pi * centres) == pytest.approx(off, rel=0.1)


def test_channels_of_their_own_steps_make_a_mixture_until_they_are_normalised():
    rng = np.random.default_rng(6)
    w = rng.normal(size=(256, 128, 3, 3)) * np.exp(0.3 * rng.normal(size=(256, 1, 1, 1)))
    weight = torch.tensor(w, dtype=torch.float32)
    quantizer = LSQ(weight, bits=7)
    raw = quantization_noise(weight, quantizer(weight), step=quantizer.scale)
    normalised = quantization_noise(weight, quantizer(weight), step=quantizer.scale, normalise=True)
    pooled = LSQ(weight, bits=7, granularity="tensor")
    tensor = quantization_noise(weight, pooled(weight), step=pooled.scale)
    assert raw.value > 0.2 and raw.kl_pvalue < 0.01  # methods: 0.757 in another draw
    for uniform in (normalised, tensor):
        assert abs(uniform.value) < 3e-4 and uniform.kl_pvalue > 0.01
    assert np.abs(normalised.noise).max() <= 0.5 + 1e-5


def test_clipped_weights_are_left_out_and_counted():
    w, step = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)), 1.0
    quantized = (w / step).round().clamp(-3, 2) * step
    found = quantization_noise(w, quantized, step=step)
    outside = (w > 2.5) | (w < -3.5)
    assert found.clipped == pytest.approx(outside.double().mean().item()) and found.count == (~outside).sum()
    assert found.kl_pvalue > 0.01
    stretched = quantization_noise(w, quantized)
    assert stretched.value > 0.5 and np.isnan(stretched.clipped) and np.isnan(stretched.variance_ratio)


def test_a_channel_of_zeros_is_left_out_and_counted():
    w, w_q = gaussian(0.5)
    alone = quantization_noise(w[1:], w_q[1:], step=0.5)
    w[0] = w_q[0] = 0
    found = quantization_noise(w, w_q, step=0.5)
    assert found.zero_channels == 1 and np.array_equal(found.noise, alone.noise) and found.kl == alone.kl


def test_the_seed_moves_the_null_alone():
    w, w_q = gaussian(0.5)
    a, b = (quantization_noise(w, w_q, step=0.5, seed=seed) for seed in (0, 1))
    again = quantization_noise(w, w_q, step=0.5)
    assert a.kl == b.kl and not np.isclose(a.kl_draws, b.kl_draws).all()
    assert np.array_equal(a.kl_draws, again.kl_draws) and a.statistics() == again.statistics()


def test_a_frame_has_a_row_and_a_plot_its_densities():
    found = judged(triangle(N))
    frame = found.to_frame()
    assert len(frame) == 1 and {"count", "bins", "kl", "kl_null", "kl_corrected", "clipped"} <= set(frame.columns)
    axes = found.plot()
    assert axes.patches and axes.get_xlabel()
    assert found.cost.seconds > 0 and found.cost.images == 0


# --- what is refused -----------------------------------------------------------------------------------------------

ONES = torch.ones(4, 4)
BROKEN = torch.full((4, 4), float("nan"))


@pytest.mark.parametrize(
    ("weight", "quantized", "kwargs", "words"),
    [
        (ONES, torch.ones(4, 5), {}, "(4, 4) and (4, 5)"),
        (BROKEN, ONES, {}, "weight must have finite values, got 16 of 16 that are not finite"),
        (ONES, BROKEN, {}, "quantized weight must have finite"),
        (ONES, ONES, {"step": BROKEN}, "step size must have finite"),
        (ONES, ONES, {}, "before quantization"),
        (0 * ONES, 0 * ONES, {"step": 1.0}, "only zeros"),
        (ONES, ONES, {"normalise": True}, "pass step"),
        (ONES, ONES, {"bins": 1}, "bins must be an integer >= 2"),
        (9 * torch.rand(4, 4) + 1, ONES, {"step": 1e-3}, "weights that are not clipped, got 0 of 16"),
    ],
)
def test_a_mistake_is_one_sentence(weight, quantized, kwargs, words):
    with pytest.raises(UserError) as caught:
        quantization_noise(weight, quantized, **kwargs)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- tests of many layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "words"),
    [(19, "KL 19 (19 without correction)"), (20, "KL cannot be, since 399 draws give p >= 0.05 (20 ")],
)
def test_a_test_by_draws_that_the_correction_leaves_no_chance_is_none(layers, words):
    table = pd.DataFrame({"kl_pvalue": 1 / 400, "ks_pvalue": 1e-9, "departure_pvalue": 0.5}, index=range(layers))
    parts = refused(table)
    assert parts[0].startswith(words) and parts[1] == f"Kolmogorov-Smirnov {layers} ({layers} without correction)"
