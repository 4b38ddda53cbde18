"""Claims about diffusion.py, most of them against a closed form, in float64 with T = 100.

All dimensions differ (B, C, H, W = 4, 3, 5, 7) and so do the levels in a batch: nothing can
broadcast along the wrong axis unseen.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from diffusion import GaussianDiffusion, SeededNoise, cosine_betas
from diffusion import expand, guided, linear_betas

T = 100
SHAPE = (4, 3, 5, 7)
LEVELS = torch.tensor([0, 1, 41, T - 1])  # mixed in one batch, with both ends
PREDICTIONS = ["noise", "x_0", "v"]

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def reference_alpha_bar(T):
    """The cosine schedule's alpha_bar, multiplied up in plain Python."""
    f = [math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2 for u in range(T + 1)]
    product, result = 1.0, []
    for t in range(T):
        product *= 1 - min(1 - f[t + 1] / f[t], 0.999)
        result.append(product)
    return torch.tensor(result, dtype=torch.float64)


AB = reference_alpha_bar(T)


def diffusion(**settings):
    return GaussianDiffusion(**{"T": T, "clip_x_0": False, **settings})


def normal(*shape):
    return torch.randn(shape or SHAPE, dtype=torch.float64)


def images():
    return 2 * torch.rand(SHAPE, dtype=torch.float64) - 1


def column(values):
    """(B,) -> (B, 1, 1, 1), written out without the code under test."""
    return values[:, None, None, None]


def three_answers(x_0, noise, a):
    """What a network that knows x_0 and noise should say, by what it predicts; a: alpha_bar."""
    return {"noise": noise, "x_0": x_0, "v": a.sqrt() * noise - (1 - a).sqrt() * x_0}


def oracle(s, predict="noise"):
    """The best network for data N(0, s^2)."""
    def network(x_t, t):
        a = column(AB[t])
        x_0 = a.sqrt() * s**2 / (a * s**2 + 1 - a) * x_t
        return three_answers(x_0, (x_t - a.sqrt() * x_0) / (1 - a).sqrt(), a)[predict]
    return network


def crooked_network(channels):
    """Some smooth function of x_t and t that is no oracle of anything."""
    def network(x_t, t):
        out = torch.sin(3 * x_t + column(t).to(x_t.dtype) / 7)
        return torch.cat([out, torch.cos(2 * x_t)], dim=1)[:, :channels]
    return network


# --- schedules, shapes, noise ---------------------------------------------------------------------


def test_cosine_alpha_bar_is_the_squared_cosine_of_improved_ddpm_eq_17():
    u = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((u / T + 0.008) / 1.008 * math.pi / 2).square()
    d = diffusion(schedule="cosine")
    assert_close(d.alphas_cumprod[:-1], (f / f[0])[1:-1])
    assert_close(d.alphas_cumprod, AB)
    assert_close(cosine_betas(1000)[-1].item(), 0.999)  # not 1, which could not be undone


def test_linear_betas_run_from_1e_4_to_0_02_and_grow_where_T_is_smaller():
    expected = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    assert_close(linear_betas(1000), torch.tensor(expected, dtype=torch.float64))
    assert_close(linear_betas(T)[[0, -1]], torch.tensor([1e-3, 0.2], dtype=torch.float64))
    assert (linear_betas(5) < 1).all()
    assert_close(diffusion(schedule="linear").alphas_cumprod, (1 - linear_betas(T)).cumprod(0))


def test_tables_are_float64_and_only_what_was_measured_enters_the_checkpoint():
    assert {b.dtype for b in diffusion().buffers()} == {torch.float64}
    assert diffusion().state_dict().keys() == set()
    assert diffusion(variance="analytic").state_dict().keys() == {"x_0_variance"}


def test_expand_lines_values_up_with_examples_and_never_goes_below_float32():
    values = torch.arange(7, dtype=torch.float64)
    x = torch.ones(7, 2, 3, 7, dtype=torch.bfloat16)  # W = B: (B,) against it would pass unseen
    assert_close((expand(values, x) * x)[:, 0, 0, 0], values.float())
    assert_close(expand(values, normal(7, 5)), values[:, None])


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_a_row_of_seeded_noise_depends_on_its_own_seed_alone(draw):
    seeds = [4, 9, 6]
    batch = SeededNoise(seeds)((3, 2, 5), draw)
    for k, s in enumerate(seeds):
        assert_close(SeededNoise([s])((1, 2, 5), draw)[0], batch[k], rtol=0, atol=0)
    # Twice as many rows as seeds: neighbours share a seed, one drawing after the other.
    double, noise = SeededNoise(seeds)((6, 2, 5), draw), SeededNoise([9])
    assert_close(double[2:4], torch.cat([noise((1, 2, 5), draw) for _ in range(2)]), rtol=0, atol=0)


def test_seeded_noise_is_standard_normal_or_uniform_and_a_second_call_goes_on():
    noise = SeededNoise([0, 1])
    normal, again, uniform = noise((2, 20000)), noise((2, 20000)), noise((2, 20000), torch.rand)
    for x, mean, std in ((normal, 0, 1), (uniform, 0.5, 12**-0.5), (normal + again, 0, 2**0.5)):
        assert x.dtype == torch.float32
        assert_close(x.mean().item(), float(mean), rtol=0, atol=0.02)
        assert_close(x.std().item(), float(std), rtol=0.02, atol=0)
    assert 0 <= uniform.min() and uniform.max() < 1


# --- forward process ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (4, 6)])
def test_q_sample_mixes_data_and_noise_by_the_roots_of_alpha_bar(shape):
    d, x, noise = diffusion(), normal(*shape), normal(*shape)
    a = AB[LEVELS].view(4, *[1] * (len(shape) - 1))
    assert_close(d.q_sample(x, LEVELS, 0 * noise), a.sqrt() * x)
    assert_close(d.q_sample(0 * x, LEVELS, noise), (1 - a).sqrt() * noise)
    assert_close(d.q_sample(x, LEVELS, noise), a.sqrt() * x + (1 - a).sqrt() * noise)


def test_q_posterior_is_bayes_rule_worked_out_on_a_grid():
    d, x_0, x_t = diffusion(), normal(3, 1), normal(3, 1)
    t, t_prev = torch.tensor([2, 30, 70]), torch.tensor([1, 29, 40])  # the last one jumps
    mean, log_variance = d.q_posterior(x_0, x_t, t, t_prev)
    x = torch.linspace(-8, 8, 200001, dtype=torch.float64)  # candidates for x_{t_prev}
    for k in range(3):
        a = AB[t_prev[k]]
        alpha = (1 - cosine_betas(T))[t_prev[k] + 1:t[k] + 1].prod()
        log_p = Normal(a.sqrt() * x_0[k], (1 - a).sqrt()).log_prob(x)
        log_p = log_p + Normal(alpha.sqrt() * x, (1 - alpha).sqrt()).log_prob(x_t[k])
        p = log_p.softmax(0)
        expected = (p * x).sum()
        assert_close(mean[k, 0], expected)
        assert_close(log_variance[k, 0].exp(), (p * (x - expected) ** 2).sum(), rtol=1e-6, atol=0)


def test_q_posterior_keeps_the_noiseless_path():
    # c1 + c2 sqrt(alpha_bar_t) = sqrt(alpha_bar_{t-1}): x_0 seen through the posterior stays x_0
    d, t = diffusion(), torch.arange(1, T)
    one = torch.ones(T - 1, 1, dtype=torch.float64)
    mean, log_variance = d.q_posterior(one, AB[1:, None].sqrt(), t, t - 1)
    assert_close(mean, AB[:-1, None].sqrt())
    assert_close(log_variance[:, 0].exp(), d.step(t, t - 1)[3])  # clipped at t = 0 alone


def test_q_posterior_at_t_0_is_x_0_with_variance_0_whose_log_is_that_of_t_1():
    d, x_0, t = diffusion(), normal(), torch.zeros(4, dtype=torch.long)
    mean, log_variance = d.q_posterior(x_0, normal(), t, t - 1)
    assert_close(mean, x_0)
    assert not d.step(t, t - 1)[3].any()
    assert_close(log_variance[:, 0, 0, 0], d.step(t + 1, t)[3].log())


# --- what the network's output means --------------------------------------------------------------


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_right_answer_gives_back_x_0_and_noise_whatever_the_variance_channels_say(predict):
    d, x_0, noise = diffusion(predict=predict), normal(), normal()
    answer = three_answers(x_0, noise, column(AB[LEVELS]))[predict]
    assert_close(d.target(x_0, noise, LEVELS), answer)
    x_t = d.q_sample(x_0, LEVELS, noise)
    for out in (answer, torch.cat([answer, normal()], dim=1)):
        assert_close(d.predictions(out, x_t, LEVELS), (x_0, noise))


def test_clipping_bounds_x_0_and_moves_the_noise_with_it():
    d, x_t, out = diffusion(clip_x_0=True), normal(), normal()
    free, _ = diffusion().predictions(out, x_t, LEVELS)
    pred_x_0, pred_noise = d.predictions(out, x_t, LEVELS)
    assert_close(pred_x_0, free.clamp(-1, 1))
    assert_close(d.q_sample(pred_x_0, LEVELS, pred_noise), x_t)


def test_variance_of_a_jump_is_that_of_a_step_of_the_shorter_schedule():
    # improved DDPM eq. 19: betas of the levels kept, from the ratios of their alpha_bars
    x_t, t, t_prev = normal(3, 2), torch.tensor([30, 70, T - 1]), torch.tensor([0, 40, 70])
    beta = 1 - torch.stack([(1 - cosine_betas(T))[b + 1:a + 1].prod() for a, b in zip(t, t_prev)])
    tilde = beta * (1 - AB[t_prev]) / (1 - AB[t])
    out = torch.cat([x_t, torch.zeros_like(x_t)], dim=1)  # learned: half-way between the logs
    for variance, expected in (("fixed_small", tilde), ("fixed_large", beta),
                               ("learned", (beta * tilde).sqrt())):
        got = diffusion(variance=variance).p_mean_variance(out, x_t, t, t_prev)[1].exp()
        assert_close(got, expected[:, None].expand_as(got))


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_loss_of_the_best_predictor_on_a_gaussian_is_the_closed_form(predict):
    # x_0 and noise with exactly the moments of N(0, s^2) and N(0, 1): the mean is the expectation
    s = 0.3
    q, _ = torch.linalg.qr(normal(40, 2))
    x_0, noise = (s * 40**0.5 * q[:, 0]).expand(T, 40), (40**0.5 * q[:, 1]).expand(T, 40)
    total = AB * s**2 + 1 - AB  # the variance of x_t
    best = {"noise": (1 - AB).sqrt() / total, "x_0": AB.sqrt() * s**2 / total,
            "v": (AB * (1 - AB)).sqrt() * (1 - s**2) / total}[predict]
    expected = {"noise": AB * s**2, "x_0": (1 - AB) * s**2, "v": s**2}[predict] / total
    loss = diffusion(predict=predict).training_loss(
        lambda x_t, t: best[t][:, None] * x_t, x_0, torch.arange(T), noise)
    assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_one_mean_squared_error_an_example_in_float32_at_least(dtype):
    x_0, noise, out = normal().to(dtype), normal().to(dtype), normal().to(dtype)
    loss = diffusion().training_loss(lambda x_t, t: out, x_0, LEVELS, noise)
    error = out.to(loss.dtype) - noise.to(loss.dtype)
    assert_close(loss, torch.stack([(error[k] ** 2).mean() for k in range(4)]))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)


def test_loss_draws_every_level_equally_and_standard_normal_noise():
    seen = {}

    def network(x_t, t):
        seen["t"], seen["noise"] = t, x_t / (1 - AB[t])[:, None].sqrt()
        return x_t
    diffusion().training_loss(network, torch.zeros(50000, 3, dtype=torch.float64))
    counts = torch.bincount(seen["t"], minlength=T).double()
    assert_close(counts, torch.full((T,), 500.0).double(), rtol=0, atol=120)  # beyond 5 sigma
    moments = torch.stack(torch.std_mean(seen["noise"]))
    assert_close(moments, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=0.015)


def test_loss_refuses_shapes_that_would_broadcast():
    d, x_0 = diffusion(), normal(5, 3, 5, 5)
    for network, settings in ((lambda x_t, t: x_t[:, :1], {}),
                              (lambda x_t, t: torch.cat([x_t, x_t], dim=1), {}),
                              (lambda x_t, t: x_t, {"t": torch.tensor([3])}),
                              (lambda x_t, t: x_t, {"noise": normal(1, 3, 5, 5)})):
        with pytest.raises(AssertionError):
            d.training_loss(network, x_0, **settings)


# --- training a learned variance; weights of the loss ---------------------------------------------


def independent_vlb(ab, out, x_0, x_t, t):
    """One term of the bound in bits per dimension, by torch.distributions, an example at a time."""
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
        model = Normal(c1 * pred_x_0[k] + c2 * x_t[k], (beta**f * smallest ** (1 - f)).sqrt())
        if n > 0:
            nats = kl_divergence(Normal(c1 * x_0[k] + c2 * x_t[k], tilde.sqrt()), model)
        else:
            upper = torch.where(x_0[k] == 1, 1.0, model.cdf(x_0[k] + 1 / 255))
            lower = torch.where(x_0[k] == -1, 0.0, model.cdf(x_0[k] - 1 / 255))
            nats = -(upper - lower).log()
        bits.append(nats.mean() / math.log(2))
    return torch.stack(bits)


def learned_case(d):
    """8-bit images with some black and white, their x_t, and a plausible output of 2C channels."""
    x_0 = torch.randint(0, 256, SHAPE).double() / 127.5 - 1
    x_0[:, 0, 0], x_0[:, 1, 0] = -1, 1
    noise = normal()
    out = torch.cat([noise + 0.1 * normal(), images()], dim=1)
    return x_0, LEVELS, noise, d.q_sample(x_0, LEVELS, noise), out


@pytest.mark.parametrize("clip, cap", [(False, math.inf), (True, 5.0)])
@pytest.mark.parametrize("steps, weight", [(100, 0.1), (1000, 1.0)])
def test_learned_variance_adds_the_kl_in_bits_and_at_t_0_the_pixels_nll_by_T_over_1000(
        steps, weight, clip, cap):
    d, ab = (diffusion(variance="learned", T=steps, clip_x_0=clip, weight_cap=cap),
             reference_alpha_bar(steps))
    x_0, t, noise, x_t, out = learned_case(d)
    expected = independent_vlb(ab, out, x_0, x_t, t)
    assert_close(d.vlb_loss(out, x_0, x_t, t), expected)
    mse = ((out[:, :3] - noise) ** 2).mean((1, 2, 3))
    capped = (cap * (1 - ab) / ab).clamp(max=1)[t]  # the squared error alone is weighed
    loss = d.training_loss(lambda x_t, t: out, x_0, t, noise)
    assert_close(loss, capped * mse + weight * expected)


def test_mean_gets_no_gradient_from_the_variance_term():
    d = diffusion(variance="learned")
    x_0, t, noise, x_t, out = learned_case(d)
    out.requires_grad_(True)
    d.training_loss(lambda x_t, t: out, x_0, t, noise).sum().backward()
    assert_close(out.grad[:, :3], 2 * (out.detach()[:, :3] - noise) / (3 * 5 * 7))
    assert (out.grad[:, 3:].flatten(1).abs().amax(1) > 0).all()


def test_learned_variance_survives_bfloat16_outputs():
    d = GaussianDiffusion(variance="learned", predict="v")  # T = 1000: the smallest variances
    weight = torch.tensor(1.0, requires_grad=True)

    def network(x_t, t):
        out = torch.cat([x_t, 3 * x_t.sign()], dim=1)  # variances beyond the two fixed ones
        return (weight * out).bfloat16()
    t, x_0 = torch.tensor([0, 1, 500, 999]), images().float()
    loss = d.training_loss(network, x_0, t)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and weight.grad.isfinite()
    out, x = normal(4, 6, 5, 7).bfloat16(), x_0.bfloat16()
    half, single = (d.p_mean_variance(*given, t, t - 1)[1]
                    for given in ((out, x), (out.float(), x.float())))
    assert_close(half, single)
    x = d.sample(network, SHAPE, steps=10)
    assert x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_weight_cap_limits_what_an_error_of_x_0_weighs_in_every_prediction(predict):
    # An error e of x_0 costs min(SNR, 5) e^2 (Min-SNR), or min(SNR + 1, 5) e^2.
    d, t, a = diffusion(predict=predict, weight_cap=5.0), torch.arange(T), AB[:, None]
    x_0, noise, error = normal(T, 6), normal(T, 6), normal(T, 6)

    def network(x_t, t):
        wrong = x_0 + error
        return three_answers(wrong, (x_t - a.sqrt() * wrong) / (1 - a).sqrt(), a)[predict]
    snr = AB / (1 - AB)
    least = (snr if predict == "noise" else snr + 1).clamp(max=5)
    assert_close(d.training_loss(network, x_0, t, noise), least * (error**2).mean(1))


# --- sampling -------------------------------------------------------------------------------------


def test_timesteps_start_at_T_minus_1_and_end_at_0_for_every_number_of_steps():
    d = diffusion()
    assert d.timesteps(1) == [T - 1]
    for steps in range(2, T + 1):
        levels = d.timesteps(steps)
        strides = [a - b for a, b in zip(levels, levels[1:])]
        assert levels[0] == T - 1 and levels[-1] == 0 and len(levels) == steps
        assert min(strides) >= 1 and max(strides) - min(strides) <= 1


def test_ddim_survives_rounding_where_nearly_all_noise_is_new():
    # Here 1 - alpha_bar_prev - sigma^2 rounds to -2e-18, whose root would be NaN.
    d, x_star = GaussianDiffusion(T=9, schedule="linear", predict="x_0", clip_x_0=False), normal()
    assert_close(d.ddim_sample(lambda x_t, t: x_star, SHAPE, 2, eta=1.0), x_star)


@pytest.mark.parametrize("steps", [2, 9, T])
def test_ddim_on_a_gaussian_is_the_product_of_its_linear_steps(steps):
    d, s, x_T = diffusion(), 0.3, normal()
    factor, levels = 1.0, d.timesteps(steps)
    for t, t_prev in zip(levels, levels[1:] + [None]):
        a, a_prev = AB[t], 1.0 if t_prev is None else AB[t_prev]
        slope = (1 - a) ** 0.5 / (a * s**2 + 1 - a)  # noise = slope * x_t
        pred_x_0 = (1 - (1 - a) ** 0.5 * slope) / a**0.5
        factor *= a_prev**0.5 * pred_x_0 + (1 - a_prev) ** 0.5 * slope
    assert_close(d.ddim_sample(oracle(s), SHAPE, steps, x_T=x_T), factor * x_T)


@pytest.mark.parametrize("t, t_prev", [(LEVELS, LEVELS - 1), (LEVELS * 0 + 80, LEVELS * 0 + 37)])
def test_ancestral_step_on_the_unit_gaussian_has_mean_sqrt_alpha_x(t, t_prev):
    # and a jump that of the product of the alphas jumped over
    x_t, alphas = normal(), 1 - cosine_betas(T)
    alpha = torch.stack([alphas[b + 1:a + 1].prod() for a, b in zip(t, t_prev)])
    mean = diffusion().p_mean_variance(oracle(1.0)(x_t, t), x_t, t, t_prev)[0]
    assert_close(mean, column(alpha).sqrt() * x_t)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_ancestral_with_all_steps_is_ddpm_algorithm_2(variance):
    x = x_T = normal()
    noise, betas = SeededNoise(range(4)), cosine_betas(T)
    network = crooked_network(6 if variance == "learned" else 3)
    got = diffusion(variance=variance).sample(network, SHAPE, noise=SeededNoise(range(4)), x_T=x_T)
    for t in reversed(range(T)):
        out = network(x, torch.full((4,), t))
        mean = (x - betas[t] / (1 - AB[t]).sqrt() * out[:, :3]) / (1 - betas[t]).sqrt()  # eq. 11
        if t == 0:
            break
        tilde = (1 - AB[t - 1]) / (1 - AB[t]) * betas[t]  # eq. 7
        f = (out[:, 3:] + 1) / 2 if variance == "learned" else float(variance == "fixed_large")
        x = mean + (betas[t] ** f * tilde ** (1 - f)) ** 0.5 * noise(SHAPE).double()
    assert_close(got, mean)


@pytest.mark.parametrize("steps", [5, T])
def test_ddim_with_eta_one_is_the_ancestral_sampler(steps):
    # Two formulas, one distribution: the same noise must give the same picture (DDIM eq. 16).
    d, x_T, network = diffusion(clip_x_0=True), normal(), crooked_network(3)
    ancestral = d.sample(network, SHAPE, steps, noise=SeededNoise(range(4)), x_T=x_T)
    ddim = d.ddim_sample(network, SHAPE, steps, eta=1.0, noise=SeededNoise(range(4)), x_T=x_T)
    assert_close(ddim, ancestral)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_scales_the_standard_deviation_of_ddims_noise(eta):
    # From x_T = 0 and with no noise predicted, the first step makes nothing but its own noise.
    d, noise, steps = diffusion(), normal(), []
    d.ddim_sample(lambda x_t, t: 0 * x_t, SHAPE, 5, eta=eta, noise=lambda shape: noise,
                  x_T=0 * noise, on_step=lambda k, t, x, pred_x_0: steps.append(x))
    a, a_prev = AB[d.timesteps(5)[:2]]
    sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()  # DDIM eq. 16
    assert_close(steps[0], eta * sigma * noise)


@pytest.mark.parametrize("run", ["sample", "ddim_sample"])
def test_samplers_visit_their_levels_in_order_and_report_each_step(run):
    d, x_T, calls, visited = diffusion(), normal(), [], []
    before, weight = x_T.clone(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def network(x_t, t):
        visited.append(t.tolist())
        return weight * x_t
    x = getattr(d, run)(network, SHAPE, 4, x_T=x_T, on_step=lambda *step: calls.append(step))
    assert visited == [[t] * 4 for t in d.timesteps(4)]
    assert [(k, t) for k, t, _, _ in calls] == list(enumerate(d.timesteps(4)))
    assert_close(calls[-1][2], x, rtol=0, atol=0)  # after the step, not before
    assert_close(calls[-1][3], x)  # the last step lands on pred_x_0
    assert_close(calls[0][3], (x_T - (1 - AB[-1]).sqrt() * 0.1 * x_T) / AB[-1].sqrt())
    assert not x.requires_grad
    assert_close(x_T, before, rtol=0, atol=0)


@pytest.mark.parametrize("run, settings", [("sample", {}), ("ddim_sample", {"eta": 1.0}),
                                           ("ddim_sample", {"eta": 0.0})])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(run, settings):
    d, network, seeds = diffusion(), crooked_network(3), [5, 17, 2]

    def draw(seeds):
        return getattr(d, run)(
            network, (len(seeds), 3, 5, 7), steps=6, noise=SeededNoise(seeds), **settings)
    batch = draw(seeds)
    for k in range(3):
        assert_close(draw(seeds[k:k + 1])[0], batch[k])
    assert (batch[0] - batch[1]).abs().max() > 0.1
    torch.manual_seed(99)  # the global generator plays no part
    assert_close(draw(seeds), batch, rtol=0, atol=0)


# --- guidance -------------------------------------------------------------------------------------


class Recorder:
    """A network whose answer shows its condition, and which records the batch sizes it is given."""

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
@pytest.mark.parametrize("scale", [0, 1, 1.25, 2, -1.0])
def test_guidance_moves_from_uncond_at_0_through_cond_at_1_and_changes_no_input(scale, channels):
    (x_t, cond, uncond), network = guidance_case(), Recorder(channels)
    inputs = [x_t, LEVELS, *cond.values(), *uncond.values()]
    before = [x.clone() for x in inputs]
    out_cond, out_uncond = network(x_t, LEVELS, **cond), network(x_t, LEVELS, **uncond)
    out = guided(network, cond, uncond, scale)(x_t, LEVELS)
    assert network.batches[2:] == [4 if scale == 1 else 8]  # both branches in one call
    exact = {"rtol": 0, "atol": 0} if scale in (0, 1) else {}
    assert_close(out[:, :3], (1 - scale) * out_uncond[:, :3] + scale * out_cond[:, :3], **exact)
    assert_close(out[:, 3:], out_cond[:, 3:], rtol=0, atol=0)  # the variance is never extrapolated
    assert_close(inputs, before, rtol=0, atol=0)


def test_guidance_of_a_network_in_half_precision_is_computed_in_float32():
    x_t, cond, uncond = guidance_case()
    network = lambda x, t, **text: Recorder()(x, t, **text).bfloat16()  # noqa: E731
    out = guided(network, cond, uncond, 4)(x_t, LEVELS)
    by_hand = [network(x_t, LEVELS, **branch).float() for branch in (uncond, cond)]
    assert_close(out, by_hand[0] + 4 * (by_hand[1] - by_hand[0]), rtol=1e-5, atol=1e-5)


# --- analytic variance ----------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_estimated_variance_of_gaussian_data_is_the_closed_form(std):
    d = diffusion(predict="x_0", variance="analytic")
    torch.manual_seed(1)  # not the seed of the noise inside, which must not be the data's
    d.estimate_variance(oracle(std, predict="x_0"), std * normal(150, 3, 5, 7), T)
    expected = std**2 * (1 - AB) / (AB * std**2 + 1 - AB)
    assert_close(d.x_0_variance, expected, rtol=0.05, atol=0)


def test_estimated_variance_between_the_measured_levels_is_interpolated():
    d = diffusion(predict="x_0", variance="analytic")
    d.estimate_variance(oracle(0.5, predict="x_0"), 0.5 * normal(50, 3, 5, 7), 12)
    high, low = d.timesteps(12)[4:6]
    middle = (high + low) // 2
    assert low < middle < high
    between = torch.lerp(*d.x_0_variance[[low, high]], (middle - low) / (high - low))
    assert_close(d.x_0_variance[middle], between)


def test_estimated_variance_is_at_most_the_datas_and_that_of_the_simplest_guess():
    # The noise errs by 3% only, but the x_0 that it leaves is far off at the noisiest levels.
    d, data = diffusion(variance="analytic"), 0.5 * normal(50, 3, 5, 7)
    d.estimate_variance(lambda x_t, t: 1.03 * oracle(0.5)(x_t, t), data, T)
    assert d.x_0_variance.max() == data.var(0, correction=0).mean()
    d = diffusion(predict="x_0", variance="analytic")
    d.estimate_variance(lambda x_t, t: 0 * x_t, data, T)  # knows nothing, even where x_t is clean
    variance = data.var(0, correction=0).mean()
    assert_close(d.x_0_variance, ((1 - AB) / AB).clamp(max=variance.double()))


@pytest.mark.parametrize("t, t_prev", [(99, 80), (50, 49), (20, 3)])
def test_analytic_variance_of_gaussian_data_is_that_of_the_true_reverse_process(t, t_prev):
    # x_t and x_prev of N(0, s^2) data are jointly gaussian: Var(x_prev | x_t) by the textbook.
    s, d, x = 0.7, diffusion(predict="x_0", variance="analytic"), normal(2, 3)
    d.x_0_variance.copy_(s**2 * (1 - AB) / (AB * s**2 + 1 - AB))
    var_t, var_prev = (AB[k] * s**2 + 1 - AB[k] for k in (t, t_prev))
    covariance = (AB[t] / AB[t_prev]).sqrt() * var_prev
    out = d.p_mean_variance(x, x, torch.tensor([t, t]), torch.tensor([t_prev, t_prev]))[1]
    assert_close(out, (var_prev - covariance**2 / var_t).log().expand(2, 1))
