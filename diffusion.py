"""Gaussian diffusion: the one core that the prior, the decoder and the upsamplers share.

Training adds noise to clean data x_0 and asks a network to undo it. Under much noise, the best
answer is the mean of all data that would fit, a blur. So sampling, which starts from pure noise,
trusts each answer only for a small step towards less noise, and asks again. unCLIP (paper table 3)
uses DDPM (2006.11239), improved DDPM's cosine schedule and learned variances (2102.09672), and
DDIM's deterministic sampling (2010.02502).

The one idea: alpha_bar, a table of T numbers, says how much of the data is left at each noise
level. Everything below is arithmetic with that table and knows nothing of CLIP, captions or U-Nets:
a `network` is any function (x_t, t) -> out.

Letters: B batch, C, H, W image, D embedding, T noise levels, S sampling steps; `...` stands for
(C, H, W) or (D,). t is in [0, T-1], and t = 0 already carries a little noise; the clean data is one
step below and written t = -1, where alpha_bar = 1.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# --- schedules and small helpers -----------------------------------------------------------------


def cosine_betas(T):
    """Betas whose alpha_bar falls like a squared cosine (improved DDPM eq. 17): (T,) float64.

        alpha_bar(u) = f(u) / f(0),  f(u) = cos((u / T + 0.008) / 1.008 * pi / 2) ** 2

    For small pictures and embeddings: a linear schedule drowns them in noise long before T, so its
    last levels teach nothing. The last beta would be 1, a step that cannot be undone.
    """
    u = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def linear_betas(T):
    """Betas from 1e-4 to 0.02 on a straight line (DDPM sec. 4): (T,) float64.

    For large pictures, where neighbouring pixels repeat each other: more noise is needed to hide
    what is there. The numbers are for T = 1000; fewer levels must each add 1000 / T times as much.
    """
    scale = 1000 / T
    return torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)


def at_least_float32(x):
    """x, as float32 if it was in half precision: bf16 is for networks, not for this arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(value, x):
    """(B,) numbers -> (B, 1, ..., 1), to multiply x (B, ...) example by example.

    (B,) times (B, C, H, W) would broadcast along W instead, without an error where W = B. The
    numbers get x's dtype, but at least float32: log-variances in bf16 end in NaNs.
    """
    return value.to(at_least_float32(x).dtype).view(-1, *[1] * (x.dim() - 1))


class SeededNoise:
    """Standard normal noise whose row k depends on seeds[k] alone: a function shape -> (B, ...).

    A picture then depends neither on its batch nor on the device: the noise is drawn on the CPU.
    With n rows to a seed, the first n belong to seeds[0]. draw: torch.rand for numbers in [0, 1).
    """

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape, draw=torch.randn):
        rows = [g for g in self.generators for _ in range(shape[0] // len(self.generators))]
        return torch.stack([draw(shape[1:], generator=g) for g in rows])


def discretized_log_likelihood(x_0, mean, log_variance):
    """Log-probability of 8-bit pixels under a gaussian, per dimension, in nats (DDPM eq. 13).

    Pixel value k / 127.5 - 1 owns the bin of +- 1/255 around it, the darkest and the brightest also
    everything beyond, so the probabilities of the 256 values sum to one.
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
              of the network, for 8-bit images. "analytic": measured by estimate_variance
    clip_x_0: clip each predicted x_0 to [-1, 1], where every image lies, so that an early, bad
              guess cannot throw the sampler off. Off for embeddings, which have no such limits
    weight_cap: see loss_weight
    """

    def __init__(self, T=1000, schedule="cosine", predict="noise", variance="fixed_small",
                 clip_x_0=True, weight_cap=None):
        super().__init__()
        assert predict in ("noise", "x_0", "v")
        assert variance in ("fixed_small", "fixed_large", "learned", "analytic")
        self.T, self.predict, self.variance = T, predict, variance
        self.clip_x_0, self.weight_cap = clip_x_0, weight_cap
        betas = {"cosine": cosine_betas, "linear": linear_betas}[schedule](T)
        # Not persistent: they follow from the config, so they have no place in a checkpoint.
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0), persistent=False)
        if variance == "analytic":  # measured after training, so kept; until then 0: "fixed_small"
            self.register_buffer("x_0_variance", torch.zeros(T, dtype=torch.float64))

    def alpha_bar(self, t):
        """alphas_cumprod at t: (B,) float64. At t = -1 it is 1, the entry appended here."""
        return F.pad(self.alphas_cumprod, (0, 1), value=1.0)[t]

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

    def step(self, t, t_prev):
        """c1, c2, beta, variance of a step down from t to t_prev, (B,) float64 (DDPM eqs. 6, 7).

        The posterior has the mean c1 * x_0 + c2 * x_t and this variance, 0 at t_prev = -1. A jump
        over several levels is one step of a shorter schedule (improved DDPM eq. 19)."""
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        c1 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
        c2 = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        return c1, c2, beta, beta * (1 - alpha_bar_prev) / (1 - alpha_bar)

    def q_posterior(self, x_0, x_t, t, t_prev):
        """The gaussian q(x_{t_prev} | x_t, x_0), exact by Bayes' rule: mean (B, ...) and
        log-variance (B, 1, ..., 1). At t_prev = -1, log(0) is replaced by the value at t = 1."""
        c1, c2, _, variance = self.step(t, t_prev)
        smallest = self.betas[1] * self.betas[0] / (1 - self.alphas_cumprod[1])  # that of t = 1
        log_variance = torch.maximum(variance, smallest).log()
        return expand(c1, x_t) * x_0 + expand(c2, x_t) * x_t, expand(log_variance, x_t)

    # --- what the network's output means ---------------------------------------------------------

    def target(self, x_0, noise, t):
        """What the network should answer, (B, ...): noise, x_0, or v, which mixes them so that
        neither is ever found by dividing by a small number:

            v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x_0      (2202.00512 app. D)
        """
        signal, sigma = self.signal_sigma(t, x_0)
        return {"noise": noise, "x_0": x_0, "v": signal * noise - sigma * x_0}[self.predict]

    def predictions(self, out, x_t, t, clip=True):
        """(pred_x_0, pred_noise), each (B, ...), from a network's output under any `predict`.

        With a learned variance the output has 2C channels; the first C are the prediction. The
        noise is computed from the clipped x_0, so that the two always mix to x_t (DDPM eq. 4).
        """
        out = at_least_float32(out[:, :x_t.shape[1]])
        signal, sigma = self.signal_sigma(t, x_t)
        x_0 = {"noise": (x_t - sigma * out) / signal,  # DDPM eq. 4 solved for x_0
               "x_0": out, "v": signal * x_t - sigma * out}[self.predict]
        if clip and self.clip_x_0:
            x_0 = x_0.clamp(-1, 1)
        return x_0, (x_t - signal * x_0) / sigma

    def p_mean_variance(self, out, x_t, t, t_prev, clip=True):
        """The network's own step down, p(x_{t_prev} | x_t): the posterior q, with pred_x_0 in place
        of the x_0 that only training knows. Returns mean, log-variance, pred_x_0."""
        pred_x_0, _ = self.predictions(out, x_t, t, clip)
        mean, log_variance = self.q_posterior(pred_x_0, x_t, t, t_prev)  # "fixed_small"
        c1, _, beta, variance = self.step(t, t_prev)
        large = expand(beta.log(), x_t)
        if self.variance == "fixed_large":
            log_variance = large
        elif self.variance == "learned":
            # The last C channels, from -1 to 1, mix the two logarithms (improved DDPM eq. 15).
            fraction = (at_least_float32(out[:, x_t.shape[1]:]) + 1) / 2
            log_variance = fraction * large + (1 - fraction) * log_variance
        elif self.variance == "analytic":
            # p mixes the posteriors of every x_0 that x_t could come from. By the law of total
            # variance: their variance, plus the variance of their means, c1^2 Var(x_0 | x_t).
            total = variance + c1 ** 2 * self.x_0_variance[t]
            log_variance = expand(total.log(), x_t)
        return mean, log_variance, pred_x_0

    # --- training --------------------------------------------------------------------------------

    def training_loss(self, network, x_0, t=None, noise=None):
        """Loss of each example (B,): mean squared error of the prediction (DDPM eq. 14), at uniform
        t (B,) unless given. For learned variances L_simple + 0.001 L_vlb (improved DDPM eq. 16).
        """
        t = torch.randint(self.T, x_0.shape[:1], device=x_0.device) if t is None else t
        noise = torch.randn_like(x_0) if noise is None else noise
        # Exercise begins.
        x_t, C = self.q_sample(x_0, t, noise), x_0.shape[1]
        out = network(x_t, t)
        # Other shapes would broadcast to a wrong loss, without an error.
        assert t.shape == x_0.shape[:1] and noise.shape == x_0.shape
        assert out.shape[1] == (2 * C if self.variance == "learned" else C)
        error = (at_least_float32(out[:, :C]) - self.target(x_0, noise, t)) ** 2
        loss = error.flatten(1).mean(1)
        # Exercise ends.
        if self.weight_cap is not None:
            loss = self.loss_weight(t).to(x_t.dtype) * loss
        if self.variance == "learned":
            # L_vlb is a *sum* over T terms, and we draw one: T * 0.001 times that one.
            loss = loss + self.T / 1000 * self.vlb_loss(out, x_0, x_t, t)
        return loss

    def vlb_loss(self, out, x_0, x_t, t):
        """One term of the variational bound, in bits per dimension: (B,) (improved DDPM sec. 3.1).

        t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t));  t = 0: -log p(x_0 | x_t).
        It trains the variance only: the mean is detached, as L_simple is the better loss for it.
        """
        true_mean, true_log_variance = self.q_posterior(x_0, x_t, t, t - 1)
        mean, log_variance, _ = self.p_mean_variance(out, x_t, t, t - 1, clip=False)
        mean, log_ratio = mean.detach(), true_log_variance - log_variance
        distance = (true_mean - mean) ** 2 * torch.exp(-log_variance)
        kl = 0.5 * (torch.exp(log_ratio) + distance - 1 - log_ratio)  # of two gaussians
        nll = -discretized_log_likelihood(x_0, mean, log_variance)
        return torch.where(expand(t, x_0) == 0, nll, kl).flatten(1).mean(1) / math.log(2)

    def loss_weight(self, t):
        """Weight of the squared error at noise level t, for a weight_cap: (B,).

        A squared error e of x_0 is one of SNR * e in the noise and of (SNR + 1) * e in v, where
        SNR = alpha_bar / (1 - alpha_bar) grows without limit towards clean levels. The cap limits
        this factor: for "noise" that is Min-SNR (2303.09556 sec. 3.4, with a cap of 5). "x_0" gets
        the weights of "v": unweighted, clean levels hardly count, and fine detail is learnt late.
        """
        snr = self.alpha_bar(t) / (1 - self.alpha_bar(t))  # signal-to-noise ratio
        factor = snr if self.predict == "noise" else snr + 1
        weight = factor.clamp(max=self.weight_cap)
        return weight if self.predict == "x_0" else weight / factor

    @torch.no_grad()
    def estimate_variance(self, network, x_0, levels=100):
        """Measure Var(x_0 | x_t), per dimension, for variance="analytic" (2201.06503).

        The best predictor of x_0 has exactly that mean squared error, so we take the network's, on
        data x_0 (B, ...) at `levels` of the T noise levels, and interpolate. A network errs more,
        but the variance is at most the data's, and at most (1 - alpha_bar) / alpha_bar: the error
        of x_t / sqrt(alpha_bar), a guess that needs no network.
        """
        ts = self.timesteps(min(levels, self.T))[::-1]  # ascending
        data_variance = x_0.cpu().double().var(dim=0, correction=0).mean().item()
        most = (1 / self.alphas_cumprod - 1).clamp(max=data_variance).tolist()
        generator, errors = torch.Generator().manual_seed(0), []
        for level in tqdm(ts, "variance", delay=3, leave=False, disable=None):
            t = torch.full((len(x_0),), level, device=x_0.device)
            noise = torch.randn(x_0.shape, generator=generator).to(x_0)
            x_t = self.q_sample(x_0, t, noise)
            error = self.predictions(network(x_t, t), x_t, t)[0] - x_0
            errors.append(min(error.cpu().double().square().mean().item(), most[level]))
        self.x_0_variance.copy_(torch.from_numpy(np.interp(range(self.T), ts, errors)))

    # --- sampling --------------------------------------------------------------------------------
    # `noise`: a function shape -> tensor, such as SeededNoise. `x_T`: the noise to start from, by
    # default drawn. `on_step(k, t, x, pred_x_0)` is called after step k, from level t to this x.

    def timesteps(self, steps):
        """`steps` levels (1 to T) evenly spread from T-1 down to 0; for one step, [T-1]."""
        assert 1 <= steps <= self.T
        return [self.T - 1 - (self.T - 1) * k // max(steps - 1, 1) for k in range(steps)]

    def pairs(self, steps, batch, device):
        """The (t, t_prev) of each sampling step, each (batch,). The last t_prev is -1, the data."""
        levels = torch.tensor(self.timesteps(steps) + [-1], device=device)
        levels = levels[:, None].expand(-1, batch)  # (S + 1, B)
        pairs = list(zip(levels[:-1], levels[1:]))
        return tqdm(pairs, "steps", delay=3, leave=False, disable=None)  # a bar after 3 seconds

    @torch.no_grad()
    def sample(self, network, shape, steps=None, noise=None, x_T=None, on_step=None):
        """Ancestral sampling on `steps` of the T levels: each step draws from p (DDPM alg. 2).
        Returns x_0, (B, ...)."""
        noise = noise or torch.randn
        x = noise(shape).to(self.betas.device) if x_T is None else at_least_float32(x_T)
        pairs = self.pairs(steps or self.T, len(x), x.device)
        for k, (t, t_prev) in enumerate(pairs):
            x, log_variance, pred_x_0 = self.p_mean_variance(network(x, t), x, t, t_prev)
            if k < len(pairs) - 1:  # the last step lands on the data: no noise
                x = x + torch.exp(0.5 * log_variance) * noise(x.shape).to(x)
            if on_step:
                on_step(k, int(t[0]), x, pred_x_0)
        return x

    @torch.no_grad()
    def ddim_sample(self, network, shape, steps, eta=0.0, noise=None, x_T=None, on_step=None):
        """DDIM (2010.02502 eq. 12): x_0, (B, ...). Each step goes all the way to pred_x_0, then
        back up to level t_prev along the predicted noise instead of fresh noise. eta in [0, 1]
        scales fresh noise beside it (eq. 16): at 0 x_T alone decides the result, at 1 this is the
        ancestral sampler with "fixed_small"."""
        noise = noise or torch.randn
        x = noise(shape).to(self.betas.device) if x_T is None else at_least_float32(x_T)
        for k, (t, t_prev) in enumerate(self.pairs(steps, len(x), x.device)):
            pred_x_0, pred_noise = self.predictions(network(x, t), x, t)
            # At the last step this is 1, not alphas_cumprod[0]: x becomes pred_x_0.
            alpha_bar_prev = self.alpha_bar(t_prev)
            sigma = eta * self.step(t, t_prev)[3].sqrt()
            direction = (1 - alpha_bar_prev - sigma ** 2).clamp(min=0).sqrt()
            x = expand(alpha_bar_prev.sqrt(), x) * pred_x_0 + expand(direction, x) * pred_noise
            if eta > 0:
                x = x + expand(sigma, x) * noise(x.shape).to(x)
            if on_step:
                on_step(k, int(t[0]), x, pred_x_0)
        return x


# --- guidance ------------------------------------------------------------------------------------


def guided(network, cond, uncond, scale):
    """Classifier-free guidance (2207.12598) as a function (x_t, t) -> out for the samplers.

        out = uncond + scale * (cond - uncond)

    The difference is what the condition changes; guidance exaggerates it. Pictures then fit their
    caption better, at the cost of variety and of a second run of the network. Off at scale = 1,
    where only the conditional branch runs; else both run in one batch of 2B. (That paper's w is
    scale - 1.) cond, uncond: the network's further arguments, dicts of tensors (B, ...).
    """
    if scale == 1:
        return lambda x_t, t: network(x_t, t, **cond)
    # Stacked once, not at every step: the prior's condition is its large key-value cache.
    both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}

    def guided_network(x_t, t):
        out = at_least_float32(network(torch.cat([x_t, x_t]), torch.cat([t, t]), **both))
        out_cond, out_uncond = out.chunk(2)
        C = x_t.shape[1]  # a learned variance follows these channels; it is not guided
        mean = out_uncond[:, :C] + scale * (out_cond[:, :C] - out_uncond[:, :C])
        return torch.cat([mean, out_cond[:, C:]], dim=1)
    return guided_network
