"""Gaussian diffusion: the one core that the prior, the decoder and the upsamplers share.

Training adds noise to clean data x_0 and asks a network to undo it; sampling starts from pure noise
and undoes it step by step. Here are DDPM (2006.11239): the forward process, its posterior and
ancestral sampling; improved DDPM (2102.09672): cosine schedule, learned variances, fewer steps; and
DDIM (2010.02502): deterministic sampling. unCLIP uses all of them (paper table 3).

The one idea: alpha_bar, a table of T numbers, says how much of the data is left at each noise
level. Everything below is arithmetic with that table and knows nothing of CLIP, captions or U-Nets:
a `network` is any function (x_t, t) -> out. (It knows two things about images: their range, for
clipping, and their 256 levels, for learned variances.)

Letters: B batch, C, H, W image, D embedding, T noise levels, S sampling steps; `...` stands for
(C, H, W) or (D,). t is in [0, T-1], and t = 0 already carries a little noise; the clean data is one
step below and written t = -1, where alpha_bar = 1. Read next: networks.py, then prior.py.
"""

import math

import numpy as np
import torch
from torch import nn

# --- schedules and small helpers -----------------------------------------------------------------


def cosine_betas(T):
    """Betas whose alpha_bar falls like a squared cosine (improved DDPM eq. 17): (T,) float64.

        alpha_bar(u) = f(u) / f(0),  f(u) = cos((u / T + 0.008) / 1.008 * pi / 2) ** 2

    For small pictures and embeddings, of which a linear schedule leaves nothing to see in its last
    quarter. beta_t is at most 0.999: the last would be 1, a step that cannot be undone.
    """
    u = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def linear_betas(T):
    """Betas from 1e-4 to 0.02 on a straight line (DDPM sec. 4): (T,) float64.

    For large pictures: neighbouring pixels repeat each other, so more noise is needed to hide what
    is there. The two numbers are for T = 1000; fewer levels must each destroy 1000 / T as much.
    """
    scale = 1000 / T
    return torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)


def at_least_float32(x):
    """x, or a float32 copy if it is in half precision: bf16 is for networks, not for this file."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(value, x):
    """(B,) numbers -> (B, 1, ..., 1), to multiply x (B, ...) example by example.

    Without it a (B,) against (B, C, H, W) would broadcast along W, silently where W = B. Also casts
    the float64 numbers to x's dtype, but never below float32: log-variances in bf16 end in NaNs.
    """
    return value.to(at_least_float32(x).dtype).view(-1, *[1] * (x.dim() - 1))


class SeededNoise:
    """Standard normal noise whose row k depends on seeds[k] alone: a function shape -> (B, ...).

    So a picture depends on its own seed, and neither on its batch nor on the device: the noise is
    drawn on the CPU and moved by whoever asked for it.
    """

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self._rows(shape)])

    def uniform(self, shape):  # in [0, 1)
        return torch.stack([torch.rand(shape[1:], generator=g) for g in self._rows(shape)])

    def _rows(self, shape):
        """shape[0] may be a multiple of the seeds: then each seed's rows are neighbours."""
        return [g for g in self.generators for _ in range(shape[0] // len(self.generators))]


def discretized_log_likelihood(x_0, mean, log_variance):
    """Log-probability of 8-bit pixels under a gaussian, per dimension, in nats (DDPM eq. 13).

    A pixel k / 127.5 - 1 owns the bin +- 1/255 around it, the darkest and the brightest also all
    beyond: the probabilities of the 256 values sum to one.
    """
    cdf, inv_std = torch.special.ndtr, torch.exp(-0.5 * log_variance)
    upper = cdf((x_0 + 1 / 255 - mean) * inv_std).masked_fill(x_0 > 0.999, 1)
    lower = cdf((x_0 - 1 / 255 - mean) * inv_std).masked_fill(x_0 < -0.999, 0)
    return (upper - lower).clamp(min=1e-12).log()  # the clamp: log(0) where the mean is far off


# --- the diffusion -------------------------------------------------------------------------------


class GaussianDiffusion(nn.Module):
    """The forward process, the losses and the samplers over one table, `alphas_cumprod`.

    T:        number of noise levels, at least 2; schedule: "cosine" or "linear"
    predict:  what the network's output means: "noise", "x_0", or "v" (see `target`)
    variance: of an ancestral step. "fixed_small" is right if the data were one point, "fixed_large"
              if they were N(0, I) (DDPM sec. 3.2). With 1000 steps the two nearly agree; with 32
              the jumps are large and it matters. "learned": between the two, from C more channels
              of the network (improved DDPM eq. 15), for 8-bit images in [-1, 1]. "analytic": right
              for this data and network, measured once by estimate_variance
    clip_x_0: clip each predicted x_0 to [-1, 1], where every image lies: an early, bad guess then
              cannot throw the sampler off. Off for embeddings, which have no such limits
    weight_cap: the most that an error of x_0 may weigh in the loss: see loss_weight

    The table stays in float64: run a network in bf16 by autocast, not by .bfloat16() on the module.
    """

    def __init__(self, T=1000, schedule="cosine", predict="noise", variance="fixed_small",
                 clip_x_0=True, weight_cap=None):
        super().__init__()
        assert T >= 2 and predict in ("noise", "x_0", "v")
        assert variance in ("fixed_small", "fixed_large", "learned", "analytic")
        self.T, self.predict, self.variance = T, predict, variance
        self.clip_x_0, self.weight_cap = clip_x_0, weight_cap
        # Not persistent: made again from the config, they have no place in a checkpoint.
        betas = {"cosine": cosine_betas, "linear": linear_betas}[schedule](T)
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alphas", 1 - betas, persistent=False)
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0), persistent=False)
        if variance == "analytic":  # measured, so it does belong there; 0 until it is measured
            self.register_buffer("x_0_variance", torch.zeros(T, dtype=torch.float64))

    def alpha_bar(self, t):
        """alphas_cumprod at t, and 1 at t = -1, the data itself: (B,) float64."""
        # Indexing with -1 would return the *noisiest* level, without an error.
        alpha_bar = self.alphas_cumprod[t.clamp(min=0)]
        return torch.where(t < 0, torch.ones_like(alpha_bar), alpha_bar)

    def signal_sigma(self, t, x):
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t, (B, 1, ..., 1): x_t's two ingredients."""
        alpha_bar = self.alpha_bar(t)
        return expand(alpha_bar.sqrt(), x), expand((1 - alpha_bar).sqrt(), x)

    # --- forward process -------------------------------------------------------------------------

    def q_sample(self, x_0, t, noise):
        """Draw x_t ~ q(x_t | x_0): jump straight to noise level t (DDPM eq. 4).

            x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * noise

        x_0: (B, ...) clean data: images in [-1, 1] or scaled CLIP embeddings
        t:   (B,) integers in [0, T-1]; t = 0 is the *least* noisy level, not "no noise"
        """
        signal, sigma = self.signal_sigma(t, x_0)
        return signal * x_0 + sigma * noise

    def q_posterior(self, x_0, x_t, t, t_prev=None):
        """The gaussian q(x_{t_prev} | x_t, x_0), exact by Bayes' rule (DDPM eqs. 6, 7).

        t_prev: (B,) an earlier level, by default t - 1. A longer jump is a step of a shorter
                schedule, with alpha = alpha_bar_t / alpha_bar_prev (improved DDPM eq. 19)
        Returns mean (B, ...), variance and log_variance_clipped (B, 1, ..., 1). At t_prev = -1 the
        mean is x_0 and the variance 0; its logarithm is replaced by that of t = 1.
        """
        t_prev = t - 1 if t_prev is None else t_prev
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        c1 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
        c2 = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        smallest = self.betas[1] * self.betas[0] / (1 - self.alphas_cumprod[1])  # that of t = 1
        log_variance = torch.maximum(variance, smallest).log()
        mean = expand(c1, x_t) * x_0 + expand(c2, x_t) * x_t
        return mean, expand(variance, x_t), expand(log_variance, x_t)

    # --- what the network's output means ---------------------------------------------------------

    def target(self, x_0, noise, t):
        """What the network should answer, (B, ...): noise, x_0, or v, which mixes them so that
        neither is ever divided by a small number:

            v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x_0      (2202.00512 app. D)
        """
        signal, sigma = self.signal_sigma(t, x_0)
        return {"noise": noise, "x_0": x_0, "v": signal * noise - sigma * x_0}[self.predict]

    def x_0_from_output(self, out, x_t, t):
        """Solve for x_0, unclipped: (B, ...). A learned variance's channels come after these C."""
        out = at_least_float32(out[:, :x_t.shape[1]])
        if self.predict == "x_0":
            return out
        signal, sigma = self.signal_sigma(t, x_t)
        if self.predict == "v":
            return signal * x_t - sigma * out
        return (x_t - sigma * out) / signal  # DDPM eq. 4 solved for x_0

    def predictions(self, out, x_t, t):
        """(pred_x_0, pred_noise), each (B, ...), from a network's output under any `predict`.

        The noise is computed from the clipped x_0, so that the two always mix to x_t (DDPM eq. 4).
        """
        pred_x_0 = self.x_0_from_output(out, x_t, t)
        if self.clip_x_0:
            pred_x_0 = pred_x_0.clamp(-1, 1)
        signal, sigma = self.signal_sigma(t, x_t)
        return pred_x_0, (x_t - signal * pred_x_0) / sigma

    def p_log_variance(self, out, x_t, t, t_prev=None):
        """Log-variance of p(x_{t_prev} | x_t), in float32 or better: (B, 1, ..., 1), or (B, ...) if
        learned: the output's last C channels, from -1 for the small to 1 for the large variance,
        mix the logarithms of the two (improved DDPM eq. 15).
        """
        small = self.q_posterior(x_t, x_t, t, t_prev)[2]
        if self.variance == "fixed_small":
            return small
        t_prev = t - 1 if t_prev is None else t_prev
        if self.variance == "analytic":
            # p(x_prev | x_t) mixes the posteriors of every x_0 that x_t could come from. By the
            # law of total variance: theirs, plus that of their means, c1^2 Var(x_0 | x_t).
            one = torch.ones(len(x_t), dtype=torch.float64, device=x_t.device)
            c1, variance, _ = self.q_posterior(one, 0 * one, t, t_prev)  # of x_0 = 1, x_t = 0
            variance = variance + c1 ** 2 * self.x_0_variance[t]
            return torch.maximum(expand(variance.log(), x_t), small)
        large = expand((1 - self.alpha_bar(t) / self.alpha_bar(t_prev)).log(), x_t)
        if self.variance == "fixed_large":
            return large
        fraction = (at_least_float32(out[:, x_t.shape[1]:]) + 1) / 2
        return fraction * large + (1 - fraction) * small

    # --- training --------------------------------------------------------------------------------

    def training_loss(self, network, x_0, t=None, noise=None):
        """Loss of each example (B,): mean squared error of the prediction (DDPM eq. 14), and for
        learned variances the hybrid objective L_simple + 0.001 L_vlb (improved DDPM eq. 16).

        network: (x_t, t) -> out of x_t's shape, with 2C channels for variance="learned"
        x_0:     (B, ...), in [-1, 1] where clip_x_0 is set
        t:       (B,) noise levels; by default uniform over all T (as in the paper)
        noise:   (B, ...); by default drawn
        """
        t = torch.randint(self.T, x_0.shape[:1], device=x_0.device) if t is None else t
        noise = torch.randn_like(x_0) if noise is None else noise
        assert t.shape == x_0.shape[:1] and noise.shape == x_0.shape
        x_t = self.q_sample(x_0, t, noise)
        out = network(x_t, t)
        C = x_0.shape[1]
        assert out.shape[1] == (2 * C if self.variance == "learned" else C)
        error = (at_least_float32(out[:, :C]) - self.target(x_0, noise, t)) ** 2
        loss = self.loss_weight(t).to(x_t.dtype) * error.flatten(1).mean(1)
        if self.variance == "learned":
            # L_vlb is a *sum* over T terms, of which we draw one: T * 0.001 times that one.
            loss = loss + self.T / 1000 * self.vlb_loss(out, x_0, x_t, t)
        return loss

    def vlb_loss(self, out, x_0, x_t, t):
        """One term of the variational bound, in bits per dimension: (B,) (improved DDPM sec. 3.1).

        t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t));  t = 0: -log p(x_0 | x_t).
        It teaches the variance only: the mean is detached, and keeps its own, better loss.
        """
        true_mean, _, true_log_variance = self.q_posterior(x_0, x_t, t)
        pred_x_0 = self.x_0_from_output(out.detach(), x_t, t)
        mean, log_variance = self.q_posterior(pred_x_0, x_t, t)[0], self.p_log_variance(out, x_t, t)
        log_ratio = true_log_variance - log_variance
        distance = (true_mean - mean) ** 2 * torch.exp(-log_variance)
        kl = 0.5 * (torch.exp(log_ratio) + distance - 1 - log_ratio)  # of two gaussians
        nll = -discretized_log_likelihood(x_0, mean, log_variance)
        return torch.where(expand(t, x_0) == 0, nll, kl).flatten(1).mean(1) / math.log(2)

    def loss_weight(self, t):
        """Weight of the squared error at noise level t: (B,).

        An error of x_0 counts SNR = alpha_bar / (1 - alpha_bar) times as an error of the noise and
        SNR + 1 times as one of v: the cleaner a level, the more, without a limit. weight_cap sets
        one: min(SNR, cap) for "noise", which is Min-SNR (2303.09556 sec. 3.4; usually 5), and
        min(SNR + 1, cap) for "v" and "x_0". Without a cap all weights are 1; for "x_0" the nearly
        clean levels, where x_0 is nearly known, then hardly count, and fine detail is learnt late.
        """
        alpha_bar = self.alpha_bar(t)
        ones = torch.ones_like(alpha_bar)
        if self.weight_cap is None:
            return ones
        snr = alpha_bar / (1 - alpha_bar)  # signal-to-noise ratio
        seen = {"noise": snr, "v": snr + 1, "x_0": ones}[self.predict]
        wanted = (snr if self.predict == "noise" else snr + 1).clamp(max=self.weight_cap)
        return wanted / seen

    @torch.no_grad()
    def estimate_variance(self, network, x_0, levels=100):
        """Measure Var(x_0 | x_t), per dimension, for variance="analytic" (2201.06503).

        The best predictor of x_0 errs by exactly that variance, so it is the network's mean squared
        error on data x_0 (B, ...): measured at `levels` of the T noise levels and interpolated.
        (Their eq. 8 writes it with the score, as the small difference of two large numbers.)
        """
        ts = self.timesteps(min(levels, self.T))[::-1]  # ascending
        # Even pure noise leaves no more open than the data's own variance. But where noise is
        # predicted, x_0 is divided by sqrt(alpha_bar), and a small error becomes a huge one.
        data_variance = x_0.double().var(dim=0, correction=0).mean().item()
        most = data_variance if self.predict == "noise" else math.inf
        generator, errors = torch.Generator().manual_seed(0), []
        for level in ts:
            t = torch.full((len(x_0),), level, device=x_0.device)
            noise = torch.randn(x_0.shape, generator=generator).to(x_0)
            x_t = self.q_sample(x_0, t, noise)
            error = self.predictions(network(x_t, t), x_t, t)[0] - x_0
            errors.append(min(error.double().square().mean().item(), most))
        self.x_0_variance.copy_(torch.from_numpy(np.interp(range(self.T), ts, errors)))

    # --- sampling --------------------------------------------------------------------------------
    # `noise` is a function shape -> tensor, such as SeededNoise; by default torch.randn. `x_T` is
    # the noise to start from, by default drawn. `on_step(k, t, x, pred_x_0)` is called after step
    # k, which left level t, with the x it made: for films and progress bars.

    def timesteps(self, steps):
        """`steps` levels evenly spread from T-1 down to 0, a list of ints; for one step, [T-1]."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps is {steps}, it must be in [1, {self.T}]")
        last = self.T - 1
        return [last - last * k // max(steps - 1, 1) for k in range(steps)]

    def pairs(self, steps, batch, device):
        """A sampler's pairs (t, t_prev), each (batch,): neighbouring levels, and at last t_prev =
        -1, the data itself."""
        levels = torch.tensor(self.timesteps(steps) + [-1], device=device)
        levels = levels[:, None].expand(-1, batch)  # (S + 1, B)
        return list(zip(levels[:-1], levels[1:]))

    def p_mean_variance(self, out, x_t, t, t_prev=None):
        """(mean, log_variance, pred_x_0) of p(x_{t_prev} | x_t): q_posterior at predicted x_0."""
        pred_x_0, _ = self.predictions(out, x_t, t)
        mean, _, _ = self.q_posterior(pred_x_0, x_t, t, t_prev)
        return mean, self.p_log_variance(out, x_t, t, t_prev), pred_x_0

    @torch.no_grad()
    def sample(self, network, shape, steps=None, noise=None, x_T=None, on_step=None):
        """Ancestral sampling (DDPM alg. 2) on `steps` of the T levels: x_0, (B, ...)."""
        noise = noise or torch.randn
        x = noise(shape).to(self.betas.device) if x_T is None else at_least_float32(x_T)
        pairs = self.pairs(steps or self.T, len(x), x.device)
        for k, (t, t_prev) in enumerate(pairs):
            x, log_variance, pred_x_0 = self.p_mean_variance(network(x, t), x, t, t_prev)
            if k < len(pairs) - 1:  # the last step lands on the data: no noise
                x = x + torch.exp(0.5 * log_variance) * noise(x.shape).to(x)
            if on_step is not None:
                on_step(k, int(t[0]), x, pred_x_0)
        return x

    @torch.no_grad()
    def ddim_sample(self, network, shape, steps, eta=0.0, noise=None, x_T=None, on_step=None):
        """DDIM (2010.02502 eq. 12): x_0, (B, ...). eta in [0, 1] scales the noise (eq. 16): at 0
        x_T alone decides the result, at 1 the sampler is as random as the ancestral one.
        """
        noise = noise or torch.randn
        x = noise(shape).to(self.betas.device) if x_T is None else at_least_float32(x_T)
        for k, (t, t_prev) in enumerate(self.pairs(steps, len(x), x.device)):
            pred_x_0, pred_noise = self.predictions(network(x, t), x, t)
            alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
            beta = 1 - alpha_bar / alpha_bar_prev
            sigma = eta * (beta * (1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
            # The last step has alpha_bar_prev = 1, not alphas_cumprod[0]: it returns pred_x_0.
            direction = (1 - alpha_bar_prev - sigma ** 2).clamp(min=0).sqrt()
            x = expand(alpha_bar_prev.sqrt(), x) * pred_x_0 + expand(direction, x) * pred_noise
            if eta > 0:
                x = x + expand(sigma, x) * noise(x.shape).to(x)
            if on_step is not None:
                on_step(k, int(t[0]), x, pred_x_0)
        return x


# --- guidance ------------------------------------------------------------------------------------


def guided(network, cond, uncond, scale):
    """Classifier-free guidance (2207.12598) as a function (x_t, t) -> out for the samplers.

        out = uncond + scale * (cond - uncond)

    The difference is what the condition says; guidance says it louder. It makes pictures fit their
    caption better, and costs variety and a second run of the network. Off at scale = 1, where only
    the conditional branch runs; else both run in one batch of 2B. (That paper's w is scale - 1.)

    network:      (x_t, t, **cond) -> out, (B, C, ...), or (B, 2C, ...) with learned variances: then
                  only the first C are guided, and the variance is the conditional branch's
    cond, uncond: dicts name -> tensor (B, ...), with the same names
    """
    assert cond.keys() == uncond.keys()
    if scale == 1:
        return lambda x_t, t: network(x_t, t, **cond)
    # Stacked once here, not at every step: the prior's conditions are its key-value cache.
    both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}

    def guided_network(x_t, t):
        out = at_least_float32(network(torch.cat([x_t, x_t]), torch.cat([t, t]), **both))
        out_cond, out_uncond = out.chunk(2)
        C = x_t.shape[1]
        mean = out_uncond[:, :C] + scale * (out_cond[:, :C] - out_uncond[:, :C])
        return torch.cat([mean, out_cond[:, C:]], dim=1)
    return guided_network
