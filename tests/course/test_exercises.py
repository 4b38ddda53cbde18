"""Claims that the exercises are graded by where no other test calls a function alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from course.open_exercises import guided_between, heun_sample
from diffusion import GaussianDiffusion, guided
from manipulate import slerp
from networks import timestep_embedding

T, SHAPE, LEVELS = 100, (4, 3, 5, 7), torch.tensor([0, 1, 41, 99])

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def diffusion(**settings):
    return GaussianDiffusion(**{"T": T, "clip_x_0": False, **settings})


def normal(*shape):
    return torch.randn(shape or SHAPE, dtype=torch.float64)


def gaussian(d, s):
    """The best network for data N(0, s^2), which is linear in x_t: noise = slope * x_t."""
    slope = (1 - d.alphas_cumprod).sqrt() / (d.alphas_cumprod * s**2 + 1 - d.alphas_cumprod)
    return lambda x_t, t: slope[t][:, None, None, None] * x_t


def test_slerp_in_two_halves_is_slerp_at_once():
    a, b = (F.normalize(normal(5, 2, 4).flatten(1), dim=1).view(5, 2, 4) for _ in range(2))
    middle = slerp(a, b, 0.5)
    assert_close(slerp(a, middle, 0.5), slerp(a, b, 0.25))
    assert_close(slerp(middle, b, 0.2), slerp(a, b, 0.6))
    assert slerp(a.bfloat16(), b.bfloat16(), 0.5).dtype == torch.bfloat16


def test_time_embedding_of_four_numbers_has_frequencies_1_and_1_over_100():
    embedding = timestep_embedding(torch.tensor([0.0, 50 * math.pi], dtype=torch.float64), 4)
    wanted = [[1, 1, 0, 0], [1, 0, 0, 1]]  # cos t, cos(t / 100), sin t, sin(t / 100)
    assert_close(embedding, torch.tensor(wanted).double(), rtol=0, atol=1e-9)
    assert timestep_embedding(torch.tensor([3]), 4).dtype == torch.float32


def test_noise_alone_and_data_alone_are_scaled_by_the_two_roots():
    d, x = diffusion(), normal()
    level = d.alphas_cumprod[LEVELS]
    data, noise = d.q_sample(x, LEVELS, 0 * x), d.q_sample(0 * x, LEVELS, x)
    for k in range(4):
        assert_close((data[k] / x[k]) ** 2, level[k].expand(SHAPE[1:]))
        assert_close((noise[k] / x[k]) ** 2, (1 - level[k]).expand(SHAPE[1:]))


def test_noising_unit_gaussian_data_keeps_its_variance_at_every_level():
    x = diffusion().q_sample(normal(T, 20000), torch.arange(T), normal(T, 20000))
    assert_close(x.std(1), torch.ones(T).double(), rtol=0, atol=0.03)


def on_its_level(d, point, steps):
    """An on_step that asks whether x is the point, noised to the level reached."""
    ends = [*d.alphas_cumprod[d.timesteps(steps)[1:]], torch.tensor(1.0).double()]

    def check(k, t, x, pred_x_0):
        noise = x - ends[k].sqrt() * point
        assert_close(noise.std(), (1 - ends[k]).sqrt(), rtol=0.1, atol=1e-6)
    return check


@pytest.mark.parametrize("steps", [1, 2, 7, T])
def test_ancestral_sampling_noises_a_point_by_each_level_and_returns_it(steps):
    d, point = diffusion(predict="x_0"), normal(4, 500)
    x = d.sample(lambda x_t, t: point, (4, 500), steps, on_step=on_its_level(d, point, steps))
    assert_close(x, point)


@pytest.mark.parametrize("steps", [1, 2, 7, T])
def test_ddim_noises_a_point_by_each_level_and_returns_it(steps):
    d, point = diffusion(predict="x_0"), normal(4, 500)
    for eta in (0.0, 0.5, 1.0):
        x = d.ddim_sample(lambda x_t, t: point, (4, 500), steps, eta,
                          on_step=on_its_level(d, point, steps))
        assert_close(x, point)


# --- open exercises -------------------------------------------------------------------------------


class Network:
    """Answers its condition plus x_t, and counts its examples."""

    def __init__(self):
        self.batches = []

    def __call__(self, x_t, t, emb):
        self.batches.append(len(x_t))
        return x_t + emb


def guidance(scale=3.0):
    cond, uncond = {"emb": normal()}, {"emb": normal()}
    network = Network()
    return network, cond, uncond, guided_between(network, cond, uncond, scale, 10, 41)


def test_guidance_acts_between_its_two_levels_and_nowhere_else():
    network, cond, uncond, between = guidance()
    x_t, t = normal(), torch.tensor([9, 10, 41, 42])
    out, everywhere = between(x_t, t), guided(Network(), cond, uncond, 3.0)(x_t, t)
    assert_close(out[[0, 3]], (x_t + cond["emb"])[[0, 3]], rtol=0, atol=0)
    assert_close(out[1:3], everywhere[1:3])
    assert (out - everywhere)[[0, 3]].abs().amax((1, 2, 3)).min() > 0.1


def test_without_a_guided_level_only_the_conditional_branch_runs():
    network, cond, _, between = guidance()
    x_t = normal()
    assert_close(between(x_t, LEVELS * 0 + 70), x_t + cond["emb"], rtol=0, atol=0)
    assert network.batches == [4]


def test_heun_on_a_gaussian_errs_a_quarter_for_half_the_step():
    # The ODE keeps each x at its quantile: x_t / std(x_t) is constant.
    s, x_T, errors = 0.5, normal(), []
    d = GaussianDiffusion(T=1000, schedule="linear", clip_x_0=False)
    for steps in (25, 50, 100):
        ends = []
        d.ddim_sample(gaussian(d, s), SHAPE, steps, x_T=x_T,
                      on_step=lambda k, t, x, pred_x_0: ends.append(x))
        exact = x_T * s / (d.alphas_cumprod[-1] * s**2 + 1 - d.alphas_cumprod[-1]).sqrt()
        heun = heun_sample(d, gaussian(d, s), steps, x_T)
        errors.append((heun / exact - 1).abs().max().item())
        assert errors[-1] < (ends[-1] / exact - 1).abs().max() / 4  # DDIM with the same steps
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_heun_with_the_oracle_of_a_point_returns_the_point(steps):
    d, point, x_T = diffusion(), normal(), normal()
    before = x_T.clone()

    def network(x_t, t):
        signal, sigma = d.signal_sigma(t, x_t)
        return (x_t - signal * point) / sigma
    assert_close(heun_sample(d, network, steps, x_T), point)
    assert_close(x_T, before, rtol=0, atol=0)


def test_heun_asks_the_network_twice_a_step_but_once_in_the_last():
    d, levels = diffusion(), []
    network = lambda x_t, t: levels.append(int(t[0])) or 0 * x_t  # noqa: E731
    heun_sample(d, network, 4, normal())
    assert levels == [99, 66, 66, 33, 33, 0, 0]
