"""Claims about diffusion.py, most of them against a closed form, in float64 with T = 100.

All dimensions differ (B, C, H, W = 4, 3, 5, 7) and the levels in one batch differ, so that nothing
broadcasts along the wrong axis unseen.
"""
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from diffusion import (
    GaussianDiffusion, cosine_betas, discretized_log_likelihood, evaluating, expand,
    guided, linear_betas, randn,
)
from networks import timestep_embedding
from support.tools import UserError

T = 100
SHAPE = (4, 3, 5, 7)
LEVELS = torch.tensor([0, 1, 41, T - 1])  # mixed in one batch, with both ends


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def diffusion(**settings):
    return GaussianDiffusion(**{"T": T, "clip_x_0": False, **settings})


def normal(*shape):
    return torch.randn(shape or SHAPE, dtype=torch.float64)


def images():
    return 2 * torch.rand(SHAPE, dtype=torch.float64) - 1


def column(values):
    """(B,) -> (B, 1, 1, 1), written out without the code under test."""
    return values[:, None, None, None]


def alphas_cumprod(T=T):
    """The cosine schedule's alpha_bar, multiplied up in plain Python."""
    f = [math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2 for u in range(T + 1)]
    product, result = 1.0, []
    for t in range(T):
        product *= 1 - min(1 - f[t + 1] / f[t], 0.999)
        result.append(product)
    return torch.tensor(result, dtype=torch.float64)


def gaussian_oracle(d, s):
    """The best noise prediction for data N(0, s^2): E[noise | x_t], a multiple of x_t."""
    def network(x_t, t):
        alpha_bar = column(d.alphas_cumprod[t])
        return (1 - alpha_bar).sqrt() / (alpha_bar * s ** 2 + 1 - alpha_bar) * x_t
    return network


def point_oracle(d, x_star):
    """The noise prediction for data that is always x_star."""
    def network(x_t, t):
        alpha_bar = column(d.alphas_cumprod[t])
        return (x_t - alpha_bar.sqrt() * x_star) / (1 - alpha_bar).sqrt()
    return network


def crooked_network(channels):
    """Some smooth function of x_t and t that is no oracle of anything."""
    def network(x_t, t):
        out = torch.sin(3 * x_t + column(t).to(x_t.dtype) / 7)
        return torch.cat([out, torch.cos(2 * x_t)], dim=1)[:, :channels]
    return network


# --- schedules, embedding, noise ----------------------------------------------------------------

def test_cosine_alpha_bar_is_the_squared_cosine_of_improved_ddpm_eq_17():
    u = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((u / T + 0.008) / 1.008 * math.pi / 2).square()
    d = diffusion(schedule="cosine")
    assert_close(d.alphas_cumprod[:-1], (f / f[0])[1:-1])
    assert_close(d.alphas_cumprod, alphas_cumprod())


def test_cosine_betas_stop_at_0_999():
    betas = cosine_betas(1000)
    assert_close(betas[-1].item(), 0.999)
    assert (betas > 0).all() and (betas[1:] >= betas[:-1]).all()


def test_linear_betas_run_from_1e_4_to_0_02_and_grow_where_T_is_smaller():
    expected = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    assert_close(linear_betas(1000), torch.tensor(expected, dtype=torch.float64))
    assert_close(linear_betas(T)[[0, -1]], torch.tensor([1e-3, 0.2], dtype=torch.float64))
    # The same total destruction at any T, to a few percent of its logarithm.
    logs = [(1 - linear_betas(n)).log().sum() for n in (100, 1000)]
    assert_close(logs[0], logs[1], rtol=0.1, atol=0)
    assert (linear_betas(5) < 1).all()


def test_linear_schedule_is_the_one_asked_for():
    assert_close(diffusion(schedule="linear").alphas_cumprod, (1 - linear_betas(T)).cumprod(0))


def test_tables_are_float64_and_stay_out_of_the_checkpoint():
    d = diffusion()
    assert {b.dtype for b in d.buffers()} == {torch.float64}
    assert d.state_dict() == {}


def test_timestep_embedding_has_squared_norm_half_the_dimension():
    t = torch.arange(1000)
    assert_close(timestep_embedding(t, 22).square().sum(1), torch.full((1000,), 11.0))


def test_timestep_embedding_holds_the_cosine_and_sine_of_each_frequency():
    t = torch.tensor([0, 3, 999])
    expected = [[g(n * 1e4 ** (-i / 6)) for g in (math.cos, math.sin) for i in range(6)]
                for n in t.tolist()]
    embedding = timestep_embedding(t.double(), 12)
    assert_close(embedding, torch.tensor(expected, dtype=torch.float64))
    assert_close(timestep_embedding(t, 12), embedding.float(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="even"):
        timestep_embedding(t, 13)


def test_expand_lines_values_up_with_examples_and_never_goes_below_float32():
    values = torch.arange(7, dtype=torch.float64)
    x = torch.ones(7, 2, 3, 7, dtype=torch.bfloat16)  # W = B: (B,) against it would pass unseen
    assert_close((expand(values, x) * x)[:, 0, 0, 0], values.float())
    assert_close(expand(values, normal(7, 5)), values[:, None])


def test_randn_gives_an_image_the_noise_of_its_seed_in_any_batch():
    def generator(seed):
        return torch.Generator().manual_seed(seed)
    batch = randn((3, 2, 5), [generator(4), generator(9), generator(6)])
    assert_close(batch[1:2], randn((1, 2, 5), [generator(9)]), rtol=0, atol=0)
    assert_close(randn((1, 2, 5), [generator(9)], dtype=torch.float64), batch[1:2].double())
    with pytest.raises(ValueError, match="3 generators"):
        randn((2, 5), [generator(k) for k in range(3)])


def test_randn_is_standard_normal():
    for generators in (None, [torch.Generator().manual_seed(k) for k in range(2)]):
        noise = randn((2, 20000), generators)
        assert_close(noise.mean().item(), 0.0, rtol=0, atol=0.02)
        assert_close(noise.std().item(), 1.0, rtol=0, atol=0.02)


@pytest.mark.parametrize("wrong", [{"schedule": "sine"}, {"predict": "eps"}, {"T": 1},
                                   {"variance": "optimal"}])
def test_unknown_settings_are_the_users_mistake(wrong):
    with pytest.raises(UserError, match=str(list(wrong.values())[0])):
        diffusion(**wrong)


# --- forward process ----------------------------------------------------------------------------

def test_q_sample_without_noise_is_scaled_data_and_without_data_scaled_noise():
    d, x = diffusion(), normal()
    alpha_bar, zero = column(alphas_cumprod()[LEVELS]), torch.zeros(SHAPE, dtype=torch.float64)
    assert_close(d.q_sample(x, LEVELS, zero), alpha_bar.sqrt() * x)
    assert_close(d.q_sample(zero, LEVELS, x), (1 - alpha_bar).sqrt() * x)


def test_q_sample_serves_embeddings_too():
    d, x, noise = diffusion(), normal(4, 6), normal(4, 6)
    alpha_bar = alphas_cumprod()[LEVELS][:, None]
    expected = alpha_bar ** 0.5 * x + (1 - alpha_bar) ** 0.5 * noise
    assert_close(d.q_sample(x, LEVELS, noise), expected)


def test_q_posterior_is_bayes_rule_worked_out_on_a_grid():
    d = diffusion()
    x_0, x_t = normal(3, 1), normal(3, 1)
    t, t_prev = torch.tensor([2, 30, 70]), torch.tensor([1, 29, 40])  # the last one jumps
    mean, variance, _ = d.q_posterior(x_0, x_t, t, t_prev)
    x = torch.linspace(-8, 8, 200001, dtype=torch.float64)            # candidates for x_{t_prev}
    for k in range(3):
        alpha_bar = alphas_cumprod()[t_prev[k]]
        alpha = (1 - d.betas)[t_prev[k] + 1:t[k] + 1].prod()
        log_p = Normal(alpha_bar.sqrt() * x_0[k], (1 - alpha_bar).sqrt()).log_prob(x)
        log_p = log_p + Normal(alpha.sqrt() * x, (1 - alpha).sqrt()).log_prob(x_t[k])
        p = log_p.softmax(0)
        expected = (p * x).sum()
        assert_close(mean[k, 0], expected)
        assert_close(variance[k, 0], (p * (x - expected) ** 2).sum(), rtol=1e-6, atol=0)


def test_q_posterior_by_default_steps_to_t_minus_one():
    d, x_0, x_t = diffusion(), normal(), normal()
    for default, explicit in zip(d.q_posterior(x_0, x_t, LEVELS),
                                 d.q_posterior(x_0, x_t, LEVELS, LEVELS - 1)):
        assert_close(default, explicit, rtol=0, atol=0)


def test_q_posterior_keeps_the_noiseless_path():
    # c1 + c2 sqrt(alpha_bar_t) = sqrt(alpha_bar_{t-1}): x_0 seen through the posterior stays x_0
    d, t = diffusion(), torch.arange(1, T)
    one, alpha_bar = torch.ones(T - 1, 1, dtype=torch.float64), alphas_cumprod()[:, None]
    mean, _, _ = d.q_posterior(one, alpha_bar[1:].sqrt(), t)
    assert_close(mean, alpha_bar[:-1].sqrt())


def test_q_posterior_at_t_0_is_x_0_with_variance_0():
    d, x_0, t = diffusion(), normal(), torch.zeros(4, dtype=torch.long)
    mean, variance, log_variance = d.q_posterior(x_0, normal(), t)
    assert_close(mean, x_0)
    assert_close(variance, torch.zeros_like(variance), rtol=0, atol=0)
    _, variance_1, _ = d.q_posterior(x_0, normal(), t + 1)
    assert_close(log_variance, variance_1.log())


def test_q_posterior_log_variance_is_unclipped_above_t_0():
    d, t = diffusion(), torch.arange(1, T)
    _, variance, log_variance = d.q_posterior(normal(T - 1, 2), normal(T - 1, 2), t)
    assert_close(log_variance.exp(), variance)


# --- what the network's output means ------------------------------------------------------------

@pytest.mark.parametrize("predict", ["noise", "x_0", "v"])
def test_a_right_answer_gives_back_x_0_and_noise(predict):
    d, x_0, noise = diffusion(predict=predict), normal(), normal()
    alpha_bar = column(alphas_cumprod()[LEVELS])
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
    answer = {"noise": noise, "x_0": x_0, "v": v}[predict]
    assert_close(d.target(x_0, noise, LEVELS), answer)
    pred_x_0, pred_noise = d.predictions(answer, d.q_sample(x_0, LEVELS, noise), LEVELS)
    assert_close(pred_x_0, x_0)
    assert_close(pred_noise, noise)


def test_the_three_predictions_are_one_statement_in_three_languages():
    x_t, pred_noise = normal(), normal()
    pred_x_0, _ = diffusion().predictions(pred_noise, x_t, LEVELS)
    for predict in ("x_0", "v"):
        d = diffusion(predict=predict)
        out = d.target(pred_x_0, pred_noise, LEVELS)
        for got, expected in zip(d.predictions(out, x_t, LEVELS), (pred_x_0, pred_noise)):
            assert_close(got, expected)


@pytest.mark.parametrize("predict", ["noise", "x_0", "v"])
def test_predictions_ignore_the_variance_channels(predict):
    d, x_t, out = diffusion(predict=predict), normal(), normal(4, 6, 5, 7)
    for got, expected in zip(d.predictions(out, x_t, LEVELS),
                             d.predictions(out[:, :3], x_t, LEVELS)):
        assert_close(got, expected, rtol=0, atol=0)


def test_clipping_bounds_x_0_and_moves_the_noise_with_it():
    d, x_t, out = diffusion(clip_x_0=True), normal(), normal()
    free, _ = diffusion().predictions(out, x_t, LEVELS)
    pred_x_0, pred_noise = d.predictions(out, x_t, LEVELS)
    assert_close(pred_x_0, free.clamp(-1, 1))
    assert_close(d.q_sample(pred_x_0, LEVELS, pred_noise), x_t)


def test_learned_variance_runs_from_the_small_fixed_one_to_the_large_one():
    d, x_t = diffusion(variance="learned"), normal()
    fraction = torch.linspace(0, 1, 3, dtype=torch.float64)[:, None, None]  # a channel each
    out = torch.cat([x_t, (2 * fraction - 1).expand(SHAPE)], dim=1)
    ab, zero = alphas_cumprod(), torch.zeros(1, dtype=torch.float64)
    ab_prev = torch.cat([zero + 1, ab])[:-1]
    beta = 1 - ab / ab_prev
    tilde = beta * (1 - ab_prev) / (1 - ab)
    tilde[0] = tilde[1]
    small, large = column(tilde[LEVELS].log()), column(beta[LEVELS].log())
    log_variance = d.p_log_variance(out, x_t, LEVELS)
    assert_close(log_variance, (fraction * large + (1 - fraction) * small).expand(SHAPE))
    assert_close(diffusion(variance="fixed_small").p_log_variance(x_t, x_t, LEVELS), small)
    assert_close(diffusion(variance="fixed_large").p_log_variance(x_t, x_t, LEVELS), large)


def test_variance_of_a_jump_is_that_of_a_step_of_the_shorter_schedule():
    # improved DDPM eq. 19: betas of the levels kept, from the ratios of their alpha_bars
    x_t, t, t_prev = normal(3, 2), torch.tensor([30, 70, T - 1]), torch.tensor([0, 40, 70])
    beta = 1 - torch.stack([(1 - cosine_betas(T))[b + 1:a + 1].prod() for a, b in zip(t, t_prev)])
    tilde = beta * (1 - alphas_cumprod()[t_prev]) / (1 - alphas_cumprod()[t])
    out = torch.cat([x_t, torch.zeros_like(x_t)], dim=1)  # learned: half-way between the logs
    for variance, expected in (("fixed_small", tilde), ("fixed_large", beta),
                               ("learned", (beta * tilde).sqrt())):
        d = diffusion(variance=variance)
        got = d.p_mean_variance(out, x_t, t, t_prev)[1].exp()
        assert_close(got, expected[:, None].expand_as(got))


def test_log_variance_of_a_bfloat16_output_is_float32():
    d = diffusion(variance="learned")
    x_t, out = normal().float(), normal(4, 6, 5, 7)
    got = d.p_log_variance(out.bfloat16(), x_t, LEVELS)
    assert_close(got, d.p_log_variance(out.bfloat16().float(), x_t, LEVELS), rtol=0, atol=0)
    half = d.p_log_variance(out.bfloat16(), x_t.bfloat16(), LEVELS)
    assert got.dtype == half.dtype == torch.float32


# --- training -----------------------------------------------------------------------------------

@pytest.mark.parametrize("predict", ["noise", "x_0", "v"])
def test_loss_of_the_best_predictor_on_a_gaussian_is_the_closed_form(predict):
    # x_0 and noise with exactly the moments of N(0, s^2) and N(0, 1): the mean is the expectation
    d, s, B = diffusion(predict=predict), 0.3, T
    q, _ = torch.linalg.qr(normal(40, 2))
    x_0, noise = (s * 40 ** 0.5 * q[:, 0]).expand(B, 40), (40 ** 0.5 * q[:, 1]).expand(B, 40)
    t, ab = torch.arange(T), alphas_cumprod()
    total = ab * s ** 2 + 1 - ab                                      # the variance of x_t
    best = {"noise": (1 - ab).sqrt() / total, "x_0": ab.sqrt() * s ** 2 / total,
            "v": (ab * (1 - ab)).sqrt() * (1 - s ** 2) / total}[predict]
    expected = {"noise": ab * s ** 2, "x_0": (1 - ab) * s ** 2, "v": s ** 2}[predict] / total
    loss = d.training_loss(lambda x_t, t: best[t][:, None] * x_t, x_0, t, noise)
    assert_close(loss, expected)


def test_loss_is_one_mean_squared_error_an_example():
    d, x_0, noise, out = diffusion(), normal(), normal(), normal()
    loss = d.training_loss(lambda x_t, t: out, x_0, LEVELS, noise)
    assert_close(loss, torch.stack([((out[k] - noise[k]) ** 2).mean() for k in range(4)]))


def test_loss_draws_every_level_equally_and_standard_normal_noise():
    d, seen = diffusion(), {}

    def network(x_t, t):
        seen["t"], seen["noise"] = t, x_t / (1 - alphas_cumprod()[t])[:, None].sqrt()
        return x_t
    d.training_loss(network, torch.zeros(50000, 3, dtype=torch.float64))
    counts = torch.bincount(seen["t"], minlength=T).double()
    assert len(counts) == T
    assert_close(counts, torch.full_like(counts, 500), rtol=0, atol=120)  # beyond 5 sigma
    assert_close(seen["noise"].mean().item(), 0.0, rtol=0, atol=0.015)
    assert_close(seen["noise"].std().item(), 1.0, rtol=0, atol=0.015)


def independent_vlb(d, out, x_0, x_t, t):
    """One term of the bound in bits per dimension, by torch.distributions, an example at a time."""
    ab = alphas_cumprod(d.T)
    pred_x_0 = (x_t - column((1 - ab[t]).sqrt()) * out[:, :3]) / column(ab[t].sqrt())
    bits = []
    for k, n in enumerate(t.tolist()):
        ab_prev = ab[n - 1] if n > 0 else torch.ones_like(ab[0])
        beta = 1 - ab[n] / ab_prev
        tilde = beta * (1 - ab_prev) / (1 - ab[n])
        smallest = tilde if n > 0 else (1 - ab[1] / ab[0]) * (1 - ab[0]) / (1 - ab[1])
        c1 = ab_prev.sqrt() * beta / (1 - ab[n])
        c2 = (ab[n] / ab_prev).sqrt() * (1 - ab_prev) / (1 - ab[n])
        f = (out[k, 3:] + 1) / 2
        model = Normal(c1 * pred_x_0[k] + c2 * x_t[k], (beta ** f * smallest ** (1 - f)).sqrt())
        if n > 0:
            nats = kl_divergence(Normal(c1 * x_0[k] + c2 * x_t[k], tilde.sqrt()), model)
        else:
            upper, lower = model.cdf(x_0[k] + 1 / 255), model.cdf(x_0[k] - 1 / 255)
            upper = torch.where(x_0[k] == 1, 1.0, upper)
            lower = torch.where(x_0[k] == -1, 0.0, lower)
            nats = -(upper - lower).log()
        bits.append(nats.mean() / math.log(2))
    return torch.stack(bits)


def learned_case(d):
    """8-bit images with some black and white, their x_t, and a plausible output of 2C channels."""
    x_0 = torch.randint(0, 256, SHAPE).double() / 127.5 - 1
    x_0[:, 0, 0], x_0[:, 1, 0] = -1, 1
    noise, t = normal(), LEVELS.clamp(max=d.T - 1)
    out = torch.cat([noise + 0.1 * normal(), images()], dim=1)
    return x_0, t, noise, d.q_sample(x_0, t, noise), out


@pytest.mark.parametrize("clip", [False, True])
def test_learned_variance_term_is_the_kl_in_bits_and_at_t_0_the_pixels_nll(clip):
    d = diffusion(variance="learned", clip_x_0=clip)
    x_0, t, noise, x_t, out = learned_case(d)
    assert_close(d.vlb_loss(out, x_0, x_t, t), independent_vlb(d, out, x_0, x_t, t))


@pytest.mark.parametrize("steps", [100, 1000])
def test_learned_variance_term_has_weight_T_over_1000(steps):
    d = diffusion(variance="learned", T=steps)
    x_0, t, noise, x_t, out = learned_case(d)
    loss = d.training_loss(lambda x_t, t: out, x_0, t, noise)
    mse = ((out[:, :3] - noise) ** 2).mean((1, 2, 3))
    assert_close(loss, mse + {100: 0.1, 1000: 1.0}[steps] * independent_vlb(d, out, x_0, x_t, t))


def test_discretized_likelihood_is_a_distribution_over_the_256_pixel_values():
    pixels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    mean, std = torch.tensor([-1.2, -0.9, 0.1, 1.0]), torch.tensor([0.01, 0.3, 0.02, 3.0])
    p = discretized_log_likelihood(pixels, mean.double(), 2 * std.double().log()).exp()
    assert_close(p.sum(0), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_mean_gets_no_gradient_from_the_variance_term():
    d = diffusion(variance="learned")
    x_0, t, noise, x_t, out = learned_case(d)
    out.requires_grad_(True)
    d.vlb_loss(out, x_0, x_t, t).sum().backward()
    assert_close(out.grad[:, :3], torch.zeros(SHAPE, dtype=torch.float64), rtol=0, atol=0)
    assert (out.grad[:, 3:].flatten(1).abs().amax(1) > 0).all()
    out.grad = None
    d.training_loss(lambda x_t, t: out, x_0, t, noise).sum().backward()
    assert_close(out.grad[:, :3], 2 * (out.detach()[:, :3] - noise) / (3 * 5 * 7))


def test_learned_variance_survives_bfloat16_outputs():
    d = GaussianDiffusion(variance="learned", predict="v")  # T = 1000: the smallest variances
    weight = torch.tensor(1.0, requires_grad=True)

    def network(x_t, t):
        out = torch.cat([x_t, 3 * x_t.sign()], dim=1)  # variances beyond the two fixed ones
        return (weight * out).bfloat16()
    t = torch.tensor([0, 1, 500, 999])
    loss = d.training_loss(network, images().float(), t)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and weight.grad.isfinite()
    x = d.sample(network, (2, 3, 5, 7), steps=10)
    assert x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_a_bfloat16_output_is_computed_in_float32(dtype):
    d, x_0, noise, out = diffusion(), normal().to(dtype), normal().to(dtype), normal().bfloat16()
    loss = d.training_loss(lambda x_t, t: out, x_0, LEVELS, noise)
    assert_close(loss, ((out.float() - noise.float()) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize("predict", ["noise", "x_0", "v"])
def test_weight_cap_limits_what_an_error_of_x_0_weighs_in_every_prediction(predict):
    d, t = diffusion(predict=predict, weight_cap=5.0), torch.arange(T)
    snr = alphas_cumprod() / (1 - alphas_cumprod())
    least = torch.minimum(snr if predict == "noise" else snr + 1, torch.tensor(5.0))
    expected = {"x_0": least, "noise": least / snr, "v": least / (snr + 1)}[predict]
    assert_close(d.loss_weight(t), expected)
    # ... which is to say: an error e of x_0 costs min(SNR, 5) e^2, or min(SNR + 1, 5) e^2.
    x_0, noise, error = normal(T, 6), normal(T, 6), normal(T, 6)

    def network(x_t, t):
        wrong = x_0 + error
        ab = alphas_cumprod()[:, None]
        return d.target(wrong, (x_t - ab.sqrt() * wrong) / (1 - ab).sqrt(), t)
    loss = d.training_loss(network, x_0, t, noise)
    assert_close(loss, least * (error ** 2).mean(1))


def test_weight_cap_is_of_the_squared_error_and_not_of_the_variance_term():
    plain, weighted = (diffusion(variance="learned", weight_cap=cap) for cap in (None, 5.0))
    x_0, t, noise, x_t, out = learned_case(plain)
    assert_close(plain.loss_weight(t), torch.ones(4, dtype=torch.float64))
    losses = [d.training_loss(lambda x_t, t: out, x_0, t, noise) for d in (plain, weighted)]
    mse = ((out[:, :3] - noise) ** 2).mean((1, 2, 3))
    assert_close(losses[1], losses[0] - mse + weighted.loss_weight(t) * mse)


@pytest.mark.parametrize("low, high", [(0.0, 255.0), (-3.0, 0.5), (-1.0, 1.1), (float("nan"), 1.0)])
def test_first_batch_outside_of_its_range_is_the_users_mistake(low, high):
    d, x = diffusion(clip_x_0=True), torch.zeros(2, 1, 1, 2)
    x[0, 0, 0, 0], x[1, 0, 0, 1] = low, high
    with pytest.raises(UserError, match=r"\[-1, 1\]"):
        d.training_loss(lambda x_t, t: x_t, x)
    d.training_loss(lambda x_t, t: x_t, x)  # checked once: later batches cost no wait


def test_first_batch_in_0_to_1_is_warned_of_but_may_be_right(recwarn):
    GaussianDiffusion().training_loss(lambda x_t, t: x_t, images().float())
    diffusion(clip_x_0=False).training_loss(lambda x_t, t: x_t, 9 * torch.rand(SHAPE))
    assert not recwarn.list  # a good batch; embeddings, which have no range
    d = GaussianDiffusion()
    d.training_loss(lambda x_t, t: x_t, torch.rand(SHAPE))
    d.training_loss(lambda x_t, t: x_t, torch.rand(SHAPE))
    assert len(recwarn.list) == 1 and "2 * x - 1" in str(recwarn.list[0].message)


def test_loss_refuses_shapes_that_would_broadcast():
    d, x_0 = diffusion(), normal(5, 3, 5, 5)
    for network in (lambda x_t, t: x_t[:, :1], lambda x_t, t: x_t.mean((1, 2, 3)),
                    lambda x_t, t: torch.cat([x_t, x_t], dim=1)):
        with pytest.raises(ValueError, match="must be"):
            d.training_loss(network, x_0)
    with pytest.raises(ValueError, match="does not fit"):
        d.training_loss(lambda x_t, t: x_t, x_0, t=torch.tensor([3]))
    with pytest.raises(ValueError, match="does not fit"):
        d.training_loss(lambda x_t, t: x_t, x_0, noise=normal(1, 3, 5, 5))
    with pytest.raises(ValueError, match="must be"):
        diffusion(variance="learned").training_loss(lambda x_t, t: x_t, x_0)


# --- sampling -----------------------------------------------------------------------------------

def test_timesteps_start_at_T_minus_1_and_end_at_0_for_every_number_of_steps():
    d = diffusion()
    assert d.timesteps(1) == [T - 1]
    for steps in range(2, T + 1):
        levels = d.timesteps(steps)
        strides = [a - b for a, b in zip(levels, levels[1:])]
        assert levels[0] == T - 1 and levels[-1] == 0 and len(levels) == steps
        assert min(strides) >= 1 and max(strides) - min(strides) <= 1
    assert d.timesteps(T) == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("steps", [0, -3, T + 1])
def test_impossible_numbers_of_steps_are_the_users_mistake(steps):
    d = diffusion()
    for run in (d.timesteps, lambda s: d.sample(None, SHAPE, s),
                lambda s: d.ddim_sample(None, SHAPE, s),
                lambda s: d.ddim_invert(None, normal(), s)):
        with pytest.raises(UserError, match=f"steps is {steps}.*100"):
            run(steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 33, T])
def test_ddim_with_the_true_noise_recovers_x_0(steps):
    d, x_0, noise = diffusion(), normal(), normal()
    x_T = d.q_sample(x_0, torch.full((4,), T - 1), noise)
    assert_close(d.ddim_sample(lambda x_t, t: noise, SHAPE, steps, x_T=x_T), x_0)


@pytest.mark.parametrize("steps", [1, 2, 7, 33, T])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_the_point_mass_oracle_returns_the_point(steps, eta):
    d, x_star = diffusion(), normal()
    x = d.ddim_sample(point_oracle(d, x_star), SHAPE, steps, eta=eta, x_T=normal())
    assert_close(x, x_star)


def test_ddim_survives_rounding_where_nearly_all_noise_is_new():
    # Here 1 - alpha_bar_prev - sigma^2 rounds to -2e-18, of which there is no square root.
    d, x_star = GaussianDiffusion(T=9, schedule="linear", predict="x_0", clip_x_0=False), normal()
    assert_close(d.ddim_sample(lambda x_t, t: x_star, SHAPE, 2, eta=1.0), x_star)


@pytest.mark.parametrize("steps", [1, 2, 7, None])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_with_the_point_mass_oracle_returns_the_point(steps, variance):
    d, x_star = diffusion(variance=variance), normal()
    x = d.sample(point_oracle(d, x_star), SHAPE, steps, x_T=normal())
    assert_close(x, x_star)


@pytest.mark.parametrize("steps", [2, 9, T])
def test_ddim_on_a_gaussian_is_the_product_of_its_linear_steps(steps):
    d, s, x_T, ab = diffusion(), 0.3, normal(), alphas_cumprod()
    factor, levels = 1.0, d.timesteps(steps)
    for t, t_prev in zip(levels, levels[1:] + [None]):
        a, a_prev = ab[t], 1.0 if t_prev is None else ab[t_prev]
        slope = (1 - a) ** 0.5 / (a * s ** 2 + 1 - a)                 # noise = slope * x_t
        pred_x_0 = (1 - (1 - a) ** 0.5 * slope) / a ** 0.5
        factor *= a_prev ** 0.5 * pred_x_0 + (1 - a_prev) ** 0.5 * slope
    assert_close(d.ddim_sample(gaussian_oracle(d, s), SHAPE, steps, x_T=x_T), factor * x_T)


def test_ancestral_step_on_the_unit_gaussian_has_mean_sqrt_alpha_x():
    d, x_t = diffusion(), normal()
    out = gaussian_oracle(d, 1.0)(x_t, LEVELS)
    mean, _, _ = d.p_mean_variance(out, x_t, LEVELS)
    assert_close(mean, column(1 - cosine_betas(T)[LEVELS]).sqrt() * x_t)
    # ... and a jump from t to t_prev that of the product of the alphas jumped over
    t, t_prev = torch.full((4,), 80), torch.full((4,), 37)
    mean, _, _ = d.p_mean_variance(gaussian_oracle(d, 1.0)(x_t, t), x_t, t, t_prev)
    assert_close(mean, (1 - cosine_betas(T)[38:81]).prod().sqrt() * x_t)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_ancestral_with_all_steps_is_ddpm_algorithm_2(variance):
    d, x_T = diffusion(variance=variance), normal()
    network = crooked_network(6 if variance == "learned" else 3)
    torch.manual_seed(1)
    got = d.sample(network, SHAPE, steps=None, x_T=x_T)
    torch.manual_seed(1)
    x, betas, ab = x_T, cosine_betas(T), alphas_cumprod()
    for t in reversed(range(T)):
        out = network(x, torch.full((4,), t))
        mean = (x - betas[t] / (1 - ab[t]).sqrt() * out[:, :3]) / (1 - betas[t]).sqrt()  # eq. 11
        if t == 0:
            break
        tilde = (1 - ab[t - 1]) / (1 - ab[t]) * betas[t]                                # eq. 7
        f = (out[:, 3:] + 1) / 2 if variance == "learned" else float(variance == "fixed_large")
        std = (betas[t] ** f * tilde ** (1 - f)) ** 0.5
        x = mean + std * torch.randn(SHAPE, dtype=torch.float64)
    assert_close(got, mean)


@pytest.mark.parametrize("steps", [5, T])
def test_ddim_with_eta_one_is_the_ancestral_sampler(steps):
    # Two formulas, one distribution: the same noise must give the same picture (DDIM eq. 16).
    d, x_T, network = diffusion(clip_x_0=True), normal(), crooked_network(3)
    torch.manual_seed(1)
    ancestral = d.sample(network, SHAPE, steps, x_T=x_T)
    torch.manual_seed(1)
    assert_close(d.ddim_sample(network, SHAPE, steps, eta=1.0, x_T=x_T), ancestral)


def test_ancestral_on_a_gaussian_spreads_as_the_data():
    d, s = diffusion(variance="fixed_large"), 0.6
    x = d.sample(gaussian_oracle(d, s), (40, 3, 20, 30))
    assert_close(x.std().item(), s, rtol=0.03, atol=0)
    assert_close(x.mean().item(), 0.0, rtol=0, atol=0.02)


def test_ddim_is_deterministic_at_eta_0_and_eta_must_be_in_0_to_1():
    d, x_T, network = diffusion(), normal(), crooked_network(3)
    first = d.ddim_sample(network, SHAPE, 6, x_T=x_T)
    assert_close(d.ddim_sample(network, SHAPE, 6, x_T=x_T), first, rtol=0, atol=0)
    for eta in (-0.1, 1.5):
        with pytest.raises(UserError, match="eta"):
            d.ddim_sample(network, SHAPE, 6, eta=eta)


@pytest.mark.parametrize("predict", ["x_0", "v"])
def test_samplers_do_the_same_under_every_prediction(predict):
    oracle, d = diffusion(), diffusion(predict=predict)
    noise_network, x_T = crooked_network(3), normal()

    def network(x_t, t):
        return d.target(*oracle.predictions(noise_network(x_t, t), x_t, t), t)
    for run in ("ddim_sample", "sample"):
        torch.manual_seed(1)
        expected = getattr(oracle, run)(noise_network, SHAPE, 5, x_T=x_T)
        torch.manual_seed(1)
        assert_close(getattr(d, run)(network, SHAPE, 5, x_T=x_T), expected)
    assert_close(d.ddim_invert(network, x_T, 5), oracle.ddim_invert(noise_network, x_T, 5))


def test_samplers_visit_their_levels_in_order_and_report_each_step():
    d, x_T, calls, visited = diffusion(), normal(), [], []

    def network(x_t, t):
        visited.append(t.tolist())
        return 0.1 * x_t

    def on_step(k, t, x, pred_x_0):
        calls.append((k, t, x, pred_x_0))
    levels = d.timesteps(4)
    for run in (d.sample, d.ddim_sample):
        calls.clear(), visited.clear()
        x = run(network, SHAPE, 4, x_T=x_T, on_step=on_step)
        assert visited == [[t] * 4 for t in levels]
        assert [(k, t) for k, t, _, _ in calls] == list(enumerate(levels))
        assert_close(calls[-1][2], x, rtol=0, atol=0)      # after the step, not before
        assert_close(calls[-1][3], x)                      # the last step lands on pred_x_0
        assert_close(calls[0][3], d.predictions(0.1 * x_T, x_T, torch.full((4,), T - 1))[0])
    calls.clear(), visited.clear()
    x = d.ddim_invert(network, x_T, 4, on_step=on_step)
    assert visited == [[t] * 4 for t in [0] + levels[:0:-1]]
    assert [(k, t) for k, t, _, _ in calls] == list(enumerate(levels[::-1]))
    assert_close(calls[-1][2], x, rtol=0, atol=0)


def test_samplers_leave_mode_gradients_and_x_T_alone():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

        def forward(self, x_t, t):
            assert not torch.is_grad_enabled()
            return self.weight * x_t
    d, x_T, network = diffusion(), normal(), Network()
    for mode in (True, False):
        network.train(mode)
        before = x_T.clone()
        for x in (d.sample(network, SHAPE, 3, x_T=x_T), d.ddim_invert(network, x_T, 3),
                  d.ddim_sample(network, SHAPE, 3, eta=1.0, x_T=x_T)):
            assert not x.requires_grad and network.training == mode
        assert_close(x_T, before, rtol=0, atol=0)


@pytest.mark.parametrize("run", ["sample", "ddim_sample"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(run):
    d, network, seeds = diffusion(), crooked_network(3), [5, 17, 2]

    def draw(seeds):
        settings = {"eta": 1.0} if run == "ddim_sample" else {}
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        settings |= {"steps": 6, "generators": generators}
        return getattr(d, run)(network, (len(seeds), 3, 5, 7), **settings)
    batch = draw(seeds)
    for k in range(3):
        assert_close(draw(seeds[k:k + 1])[0], batch[k])
    assert (batch[0] - batch[1]).abs().max() > 0.1
    torch.manual_seed(99)  # the global generator plays no part
    assert_close(draw(seeds), batch, rtol=0, atol=0)


# --- guidance -----------------------------------------------------------------------------------

class Recorder:
    """A network whose answer shows its condition, and which counts calls and batch sizes."""

    def __init__(self, channels=3):
        self.channels, self.batches = channels, []

    def __call__(self, x_t, t, label, hint):
        self.batches.append(len(x_t))
        out = torch.sin(x_t + column(label) + column(t.double())) + hint[:, :1, None, None]
        return torch.cat([out, 5 * out], dim=1)[:, :self.channels]


def guidance_case():
    cond, uncond = ({"label": normal(4), "hint": normal(4, 2)} for _ in range(2))
    return normal(), cond, uncond


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("scale", [0, 1, 2, 1.25, -1.0])
def test_guidance_moves_from_uncond_through_cond(scale, channels):
    (x_t, cond, uncond), network = guidance_case(), Recorder(channels)
    out_cond, out_uncond = network(x_t, LEVELS, **cond), network(x_t, LEVELS, **uncond)
    out = guided(network, cond, uncond, scale)(x_t, LEVELS)
    assert_close(out[:, :3], (1 - scale) * out_uncond[:, :3] + scale * out_cond[:, :3])
    assert_close(out[:, 3:], out_cond[:, 3:], rtol=0, atol=0)  # the variance is never extrapolated


def test_guidance_scale_one_equals_conditional_and_zero_unconditional_exactly():
    (x_t, cond, uncond), network = guidance_case(), Recorder()
    for scale, branch in ((1, cond), (0, uncond)):
        expected = network(x_t, LEVELS, **branch)
        assert_close(guided(network, cond, uncond, scale)(x_t, LEVELS), expected, rtol=0, atol=0)


def test_guidance_makes_one_call_of_twice_the_batch_and_of_the_batch_at_scale_one():
    x_t, cond, uncond = guidance_case()
    for scale, batch in ((1, 4), (1.0, 4), (2, 8), (0, 8)):
        network = Recorder()
        guided(network, cond, uncond, scale)(x_t, LEVELS)
        assert network.batches == [batch]


def test_guidance_changes_none_of_its_inputs():
    x_t, cond, uncond = guidance_case()
    inputs = [x_t, LEVELS, *cond.values(), *uncond.values()]
    before = [x.clone() for x in inputs]
    guided(Recorder(6), cond, uncond, 3)(x_t, LEVELS)
    for x, copy in zip(inputs, before):
        assert_close(x, copy, rtol=0, atol=0)


def test_guidance_refuses_branches_with_different_conditions():
    x_t, cond, uncond = guidance_case()
    with pytest.raises(ValueError, match="uncond has"):
        guided(Recorder(), cond, {**uncond, "extra": x_t}, 2)


# --- weights of x_0 prediction


def test_uncapped_weights_make_the_loss_that_of_v_prediction():
    x_0, noise, guess = images(), normal(), images()
    by_x_0 = diffusion(predict="x_0", weight_cap=math.inf)
    loss = by_x_0.training_loss(lambda x, t: guess, x_0, LEVELS, noise)
    by_v, a = diffusion(predict="v"), column(alphas_cumprod()[LEVELS])

    def same_guess(x_t, t):  # v from x_t and x_0: x_0 = sqrt(a) x_t - sqrt(1 - a) v
        return (a.sqrt() * x_t - guess) / (1 - a).sqrt()

    assert_close(loss, by_v.training_loss(same_guess, x_0, LEVELS, noise))


def test_the_cap_limits_the_weight():
    weight = diffusion(predict="x_0", weight_cap=5.0).loss_weight(LEVELS)
    assert_close(weight, (1 / (1 - alphas_cumprod()[LEVELS])).clamp(max=5))
    assert weight[0] == 5 and weight[-1] < 1.01


# --- analytic variance, inpainting


def x_0_oracle(std, alpha_bar):
    """The best predictor of x_0 ~ N(0, std^2) from x_t: E[x_0 | x_t]."""
    def network(x, t):
        a = column(alpha_bar[t])
        return a.sqrt() * std ** 2 / (a * std ** 2 + 1 - a) * x
    return network


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_estimated_variance_of_gaussian_data_is_the_closed_form(std):
    d, alpha_bar = diffusion(predict="x_0", variance="analytic"), alphas_cumprod()
    torch.manual_seed(1)  # not the seed of the noise inside, which must not be the data's
    d.estimate_variance(x_0_oracle(std, alpha_bar), std * torch.randn(300, 3, 5, 7).double(), T)
    wanted = std ** 2 * (1 - alpha_bar) / (alpha_bar * std ** 2 + 1 - alpha_bar)
    assert_close(d.x_0_variance, wanted, rtol=0.03, atol=0)


def test_estimated_variance_is_at_most_the_datas():
    """The noise errs by 3% only, but the x_0 that it leaves is far off at the noisiest levels."""
    d, data = diffusion(predict="noise", variance="analytic"), 0.5 * torch.randn(300, 3, 5, 7)

    def network(x, t):
        a = column(alphas_cumprod()[t])
        noise = (x - a.sqrt() * x_0_oracle(0.5, alphas_cumprod())(x, t)) / (1 - a).sqrt()
        return 1.03 * noise

    d.estimate_variance(network, data, T)
    assert d.x_0_variance.max() == data.double().var(0, correction=0).mean()


def test_guidance_of_a_network_in_half_precision_is_computed_in_float32():
    x_t, cond, uncond = guidance_case()
    network = lambda x, t, **text: Recorder()(x, t, **text).bfloat16()  # noqa: E731
    out = guided(network, cond, uncond, 4)(x_t, LEVELS)
    by_hand = [network(x_t, LEVELS, **branch).float() for branch in (uncond, cond)]
    assert_close(out, by_hand[0] + 4 * (by_hand[1] - by_hand[0]), rtol=1e-5, atol=1e-5)


def test_estimated_variance_between_the_measured_levels_is_interpolated():
    d, alpha_bar = diffusion(predict="x_0", variance="analytic"), alphas_cumprod()
    network, data = x_0_oracle(0.5, alpha_bar), 0.5 * torch.randn(300, 3, 5, 7).double()
    d.estimate_variance(network, data, 12)
    levels = d.timesteps(12)  # descending
    high, low = levels[4], levels[5]
    middle = (high + low) // 2
    share = (middle - low) / (high - low)
    between = (1 - share) * d.x_0_variance[low] + share * d.x_0_variance[high]
    assert low < middle < high
    assert_close(d.x_0_variance[middle], between)


@pytest.mark.parametrize("t, t_prev", [(99, 80), (50, 49), (20, 3)])
def test_analytic_variance_of_gaussian_data_is_that_of_the_true_reverse_process(t, t_prev):
    """x_t and x_prev of N(0, s^2) data are jointly gaussian: Var(x_prev | x_t) by the textbook."""
    s, alpha_bar = 0.7, alphas_cumprod()
    d = diffusion(predict="x_0", variance="analytic")
    d.x_0_variance.copy_(s ** 2 * (1 - alpha_bar) / (alpha_bar * s ** 2 + 1 - alpha_bar))
    var_t, var_prev = (alpha_bar[k] * s ** 2 + 1 - alpha_bar[k] for k in (t, t_prev))
    covariance = (alpha_bar[t] / alpha_bar[t_prev]).sqrt() * var_prev
    wanted = var_prev - covariance ** 2 / var_t
    x = normal(2, 3)
    out = d.p_log_variance(x, x, torch.tensor([t, t]), torch.tensor([t_prev, t_prev]))
    assert_close(out, wanted.log().expand(2, 1))


def test_analytic_variance_of_a_point_is_fixed_small_and_of_unit_gaussian_data_fixed_large():
    x, t, t_prev = normal(3, 4), torch.tensor([99, 60, 5]), torch.tensor([70, 59, 2])
    d = diffusion(predict="x_0", variance="analytic")  # nothing is measured yet: zeros
    small = diffusion(variance="fixed_small").p_log_variance(x, x, t, t_prev)
    assert_close(d.p_log_variance(x, x, t, t_prev), small)
    d.x_0_variance.copy_(1 - alphas_cumprod())
    large = diffusion(variance="fixed_large").p_log_variance(x, x, t, t_prev)
    assert_close(d.p_log_variance(x, x, t, t_prev), large)


def test_analytic_variance_travels_in_the_checkpoint_and_fixed_ones_do_not():
    assert "x_0_variance" in diffusion(variance="analytic").state_dict()
    assert not diffusion(variance="fixed_small").state_dict()


# --- which noise levels training draws ----------------------------------------------------------


def test_focus_spends_half_of_training_on_its_band():
    torch.manual_seed(0)
    d = GaussianDiffusion(T=1000)
    d.focus_on((500, 900))
    t = d.draw_levels(40_000, "cpu")
    inside = ((t >= 500) & (t < 900)).float().mean().item()
    assert abs(inside - (0.5 + 0.5 * 0.4)) < 3 * math.sqrt(0.7 * 0.3 / 40_000)
    assert t.min() == 0 and t.max() == 999
    # Within the band and outside of it, every level is as likely as any other.
    outside = t[(t < 500) | (t >= 900)].double()
    assert abs(outside.mean().item() - (500 * 249.5 + 100 * 949.5) / 600) < 8


def test_without_focus_all_levels_are_alike_and_validation_chooses_its_own():
    torch.manual_seed(0)
    uniform = GaussianDiffusion(T=100)
    counts = torch.bincount(uniform.draw_levels(100_000, "cpu"), minlength=100)
    assert counts.min() > 1000 - 5 * math.sqrt(1000) and counts.max() < 1000 + 5 * math.sqrt(1000)
    focused = GaussianDiffusion(T=100)
    focused.focus_on((50, 90))
    focused.levels = (0, 25)
    assert focused.draw_levels(1000, "cpu").max() < 25


@pytest.mark.parametrize("focus", [(5, 5), (-1, 4), (0, 11)])
def test_a_focus_outside_of_the_levels_is_refused(focus):
    with pytest.raises(UserError, match="focus"):
        GaussianDiffusion(T=10).focus_on(focus)


class Drawing(torch.nn.Module):
    @evaluating
    def sample(self, fails=False):
        if fails:
            raise KeyboardInterrupt
        return self.training


@pytest.mark.parametrize("training", [True, False])
def test_a_model_draws_in_eval_mode_and_is_then_as_it_was(training):
    model = Drawing().train(training)
    assert model.sample() is False and model.training is training
    with pytest.raises(KeyboardInterrupt):
        model.sample(fails=True)
    assert model.training is training

