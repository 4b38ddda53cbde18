"""Gaussian diffusion: the one core that the prior, the decoder and the upsamplers share.

Training adds noise to clean data x_0 and asks a network to undo it; sampling starts from pure noise
and undoes it step by step. DDPM (2006.11239): the forward process, its posterior, ancestral
sampling. Improved DDPM (2102.09672): cosine schedule, learned variances, fewer steps. DDIM
(2010.02502): deterministic sampling and its inversion. unCLIP uses all of them (paper table 3).

The one idea: alpha_bar, a table of T numbers, says how much of the data is left at each level.
Everything below is arithmetic with it, and knows nothing of CLIP, captions or U-Nets: `network` is
any function (x_t, t) -> out. (Of images it knows two things: their range, which is checked, and
their 256 values, which a learned variance is trained on.)

Letters: B batch, C, H, W image, D embedding, T diffusion steps, S sampling steps; `...` is
(C, H, W) or (D,). t is in [0, T-1], and t = 0 already carries a little noise; the data itself is
one step below, and is written t = -1 (alpha_bar = 1).

Read next: prior.py (diffusion of CLIP embeddings), decoder.py (of images).
"""

import functools
import math
import warnings

import numpy as np
import torch
from torch import nn

from support.tools import UserError

# --- schedules and small helpers ----------------------------------------------------------------
def cosine_betas(T):
    """Betas whose alpha_bar falls like a squared cosine (improved DDPM eq. 17): (T,) float64.

        alpha_bar(u) = f(u) / f(0),  f(u) = cos((u / T + 0.008) / 1.008 * pi / 2) ** 2

    beta_t = 1 - alpha_bar(t + 1) / alpha_bar(t), at most 0.999: the last would be 1, not undoable.
    """
    u = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def linear_betas(T):
    """Betas from 1e-4 to 0.02 on a straight line (DDPM sec. 4): (T,) float64.

    Those are for T = 1000. Fewer steps must each destroy more: 1000 / T. (The cap: for T <= 20.)
    """
    scale = 1000 / T
    return torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)

def at_least_float32(x):
    """x, or a float32 copy of half precision: bf16 is for networks, not for this arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(value, x):
    """(B,) numbers -> (B, 1, ..., 1), to multiply x: (B, ...) example by example.

    Without it a (B,) against (B, C, H, W) would broadcast along W, silently where W = B. Also casts
    the float64 numbers to x's dtype, but never below float32: log-variances in bf16 end in NaNs.
    """
    return value.to(at_least_float32(x).dtype).view(-1, *[1] * (x.dim() - 1))


def randn(shape, generators=None, device="cpu", dtype=torch.float32):
    """Standard normal noise of `shape`, (B, ...).

    generators: B CPU torch.Generators, or None for torch's global one. With them, image k's noise
    depends on its own seed alone, not on its batch or device: drawn on the CPU, then moved.
    """
    if generators is None:
        return torch.randn(shape, device=device, dtype=dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"randn: {len(generators)} generators for a batch of {shape[0]}")
    noise = [torch.randn(shape[1:], generator=g) for g in generators]
    return torch.stack(noise).to(device=device, dtype=dtype)


def discretized_log_likelihood(x_0, mean, log_variance):
    """Log-probability of 8-bit pixels under a gaussian, per dimension, in nats (DDPM eq. 13).

    A pixel k / 127.5 - 1 owns the bin +- 1/255 around it, the darkest and the brightest also all
    that lies beyond: so the probabilities of the 256 values sum to one.
    """
    cdf, inv_std = torch.special.ndtr, torch.exp(-0.5 * log_variance)
    upper = cdf((x_0 + 1 / 255 - mean) * inv_std).masked_fill(x_0 > 0.999, 1)
    lower = cdf((x_0 - 1 / 255 - mean) * inv_std).masked_fill(x_0 < -0.999, 0)
    return (upper - lower).clamp(min=1e-12).log()  # the clamp: log(0) where the mean is far off


# --- the diffusion ------------------------------------------------------------------------------
class GaussianDiffusion(nn.Module):
    """The forward process, the losses and the samplers over one table, `alphas_cumprod`.

    T:        number of noise levels, at least 2; schedule: "cosine" or "linear"
    predict:  what the network's output means: "noise", "x_0", or "v" (see `target`)
    variance: of an ancestral step. "fixed_small": right if the data were one point; "fixed_large":
              right if they were N(0, I) (DDPM sec. 3.2); "learned": between the two, from C more
              channels of the network (improved DDPM eq. 15), for 8-bit images in [-1, 1];
              "analytic": right for this data and network, measured once by estimate_variance
    clip_x_0: clip each predicted x_0 to [-1, 1]. For images; off for embeddings
    weight_cap: the most that an error of x_0 may weigh in the loss: see loss_weight

    The table stays in float64: run a network in bf16 by autocast, not by .bfloat16() on the module.
    """

    def __init__(self, T=1000, schedule="cosine", predict="noise", variance="fixed_small",
                 clip_x_0=True, weight_cap=None):
        super().__init__()
        schedules = {"cosine": cosine_betas, "linear": linear_betas}
        for value, allowed in ((schedule, schedules), (predict, ("noise", "x_0", "v")),
                               (variance, ("fixed_small", "fixed_large", "learned", "analytic"))):
            if value not in allowed:
                raise UserError(f"{value!r} is unknown, choose one of {', '.join(allowed)}")
        if T < 2:
            raise UserError(f"T is {T}, it must be at least 2: raise the number of noise levels")
        self.T, self.predict, self.variance = T, predict, variance
        self.clip_x_0, self.weight_cap = clip_x_0, weight_cap
        # levels: those drawn in training; focus: a band of them that is drawn more often
        self.range_checked, self.levels, self.focus = False, (0, T), None
        # Not persistent: made again from the config, they have no place in a checkpoint.
        betas = schedules[schedule](T)
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

    # --- forward process ------------------------------------------------------------------------

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
        Returns mean (B, ...), variance and log_variance_clipped (B, 1, ..., 1). Onto the data,
        t_prev = -1, the mean is x_0 and the variance 0; its logarithm is that of t = 1 instead.
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

    # --- what the network's output means --------------------------------------------------------

    def target(self, x_0, noise, t):
        """What the network should answer, (B, ...): noise, x_0, or v, which mixes them so that
        neither is ever divided by a small number:

            v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x_0      (2202.00512 app. D)
        """
        signal, sigma = self.signal_sigma(t, x_0)
        return {"noise": noise, "x_0": x_0, "v": signal * noise - sigma * x_0}[self.predict]

    def x_0_from_output(self, out, x_t, t):
        """Solve for x_0, unclipped: (B, ...). Of a learned variance's 2C channels, the first C."""
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
        learned: out's last C channels, -1 for the small and 1 for the large one, mix the fixed ones
        in between (improved DDPM eq. 15).
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

    # --- training -------------------------------------------------------------------------------

    def training_loss(self, network, x_0, t=None, noise=None):
        """Loss of each example (B,): mean squared error of the prediction (DDPM eq. 14), and for
        learned variances the hybrid objective L_simple + 0.001 L_vlb (improved DDPM eq. 16).

        network: (x_t, t) -> out of x_t's shape, with 2C channels for variance="learned"
        x_0:     (B, ...), in [-1, 1] where clip_x_0 is set; t: (B,), noise: (B, ...), or drawn
        Raises UserError for a first batch outside of [-1, 1], ValueError for unfit shapes.
        """
        self.check_range(x_0)
        if t is None:
            t = self.draw_levels(len(x_0), x_0.device)
        noise = torch.randn_like(x_0) if noise is None else noise
        if t.shape != x_0.shape[:1] or noise.shape != x_0.shape:
            raise ValueError(f"training_loss: x_0 {tuple(x_0.shape)} does not fit "
                             f"t {tuple(t.shape)} or noise {tuple(noise.shape)}")
        x_t = self.q_sample(x_0, t, noise)
        out = network(x_t, t)
        channels = x_0.shape[1] * (2 if self.variance == "learned" else 1)
        wanted = (x_0.shape[0], channels, *x_0.shape[2:])
        if out.shape != wanted:
            raise ValueError(f"training_loss: the network's {tuple(out.shape)} must be {wanted}")
        error = (at_least_float32(out[:, :x_0.shape[1]]) - self.target(x_0, noise, t)) ** 2
        loss = self.loss_weight(t).to(x_t.dtype) * error.flatten(1).mean(1)
        if self.variance == "learned":
            # L_vlb is a *sum* over T terms, of which we draw one: T * 0.001 times that one.
            loss = loss + self.T / 1000 * self.vlb_loss(out, x_0, x_t, t)
        return loss

    def focus_on(self, band):
        """Draw half of the levels from band = (first, end), first .. end - 1, and half from all;
        None: all of them from all."""
        if band and not 0 <= band[0] < band[1] <= self.T:
            raise UserError(f"focus is {band}, it must be two levels, first < end, in "
                            f"[0, {self.T}]")
        self.focus = tuple(band) if band else None

    def draw_levels(self, n, device):
        """The noise levels t (n,) of a training batch.

        Paper: uniform. We: after focus_on, half of them from a band. Because: not all levels are
        as hard. Near 0 an edge is sharpened; above, it is decided what is where and how many there
        are of it, and that takes longest to learn (likewise 2403.03206 sec. 3.1).
        """
        t = torch.randint(*self.levels, (n,), device=device)
        if self.focus is None or self.levels != (0, self.T):  # validation asks for its own levels
            return t
        band = torch.randint(*self.focus, (n,), device=device)
        return torch.where(torch.rand(n, device=device) < 0.5, band, t)

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
        """What the squared error of the network's output is multiplied by at t: (B,).

        A squared error of x_0 counts SNR = alpha_bar / (1 - alpha_bar) times in that of the noise,
        SNR + 1 times in that of v: the cleaner a level, the more, without a limit. weight_cap sets
        one: min(SNR, cap) for "noise", which is Min-SNR (2303.09556 sec. 3.4; usually 5), and
        min(SNR + 1, cap) for "v" and for "x_0". None: ones, also for "x_0", where the nearly clean
        levels, at which x_0 is nearly known, then hardly count, and fine detail is learnt late.
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
        """Measure Var(x_0 | x_t), a dimension, for variance="analytic" (Analytic-DPM, 2201.06503).

        The best predictor of x_0 errs by just that variance, so it is the network's mean squared
        error on data x_0 (B, ...): at `levels` of the T noise levels, and between them by
        interpolation. (Their eq. 8 writes it with the score: (1 - alpha_bar) / alpha_bar *
        (1 - mean of noise_pred^2), the same number, but the small difference of two large ones.)
        """
        ts = self.timesteps(min(levels, self.T))[::-1]  # upwards
        # Even pure noise leaves no more open than the data's own variance. But where noise is
        # predicted, x_0 is divided by sqrt(alpha_bar), and a small error becomes a huge one.
        data_variance = x_0.double().var(dim=0, correction=0).mean().item()
        most = data_variance if self.predict == "noise" else math.inf
        noise = torch.Generator(device="cpu").manual_seed(0)
        errors = []
        for level in ts:
            t = torch.full((len(x_0),), level, device=x_0.device)
            x_t = self.q_sample(x_0, t, torch.randn(x_0.shape, generator=noise).to(x_0))
            error = self.predictions(network(x_t, t), x_t, t)[0] - x_0
            errors.append(min(error.double().square().mean().item(), most))
        self.x_0_variance.copy_(torch.from_numpy(np.interp(range(self.T), ts, errors)))

    def check_range(self, x_0):
        """Are the images in [-1, 1]? On the first batch only, as it waits for the device; and not
        in compiled code, whose graph would break here: train.make_compilable calls it."""
        if self.range_checked or not self.clip_x_0 or torch.compiler.is_compiling():
            return
        self.range_checked = True
        low, high = x_0.min().item(), x_0.max().item()
        if not (low >= -1.001 and high <= 1.001):  # "not", so that NaNs are caught as well
            raise UserError(f"the first batch's pixels are in [{low:.3g}, {high:.3g}], they must "
                            "be in [-1, 1]: scale 8-bit pixels by x / 127.5 - 1")
        if low >= 0:  # bright pictures may be right, so this can only be a warning
            warnings.warn(f"the first batch's pixels are in [{low:.3g}, {high:.3g}], none below "
                          "0: if they were scaled to [0, 1], use 2 * x - 1")

    # --- sampling -------------------------------------------------------------------------------
    # All of them: `generators` as in randn; `x_T` the noise to start from, by default drawn;
    # `on_step(k, t, x, pred_x_0)` is called after step k, which left level t, with the x it made:
    # for films and progress bars. The network's train/eval mode is the caller's business.

    def timesteps(self, steps):
        """`steps` levels evenly spread from T-1 down to 0, a list of ints; of one step, [T-1].
        Raises UserError unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.T:
            raise UserError(f"steps is {steps}, it must be in [1, {self.T}]: "
                            f"the model was trained at {self.T} noise levels")
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
    def sample(self, network, shape, steps=None, generators=None, x_T=None, on_step=None):
        """Ancestral sampling (DDPM alg. 2) on `steps` of the T levels: x_0, (B, ...)."""
        x = randn(shape, generators, self.betas.device) if x_T is None else at_least_float32(x_T)
        pairs = self.pairs(self.T if steps is None else steps, len(x), x.device)
        for k, (t, t_prev) in enumerate(pairs):
            x, log_variance, pred_x_0 = self.p_mean_variance(network(x, t), x, t, t_prev)
            if k < len(pairs) - 1:  # the last step lands on the data: no noise
                noise = randn(x.shape, generators, x.device, x.dtype)
                x = x + torch.exp(0.5 * log_variance) * noise
            if on_step is not None:
                on_step(k, int(t[0]), x, pred_x_0)
        return x

    @torch.no_grad()
    def ddim_sample(self, network, shape, steps, eta=0.0, generators=None, x_T=None, on_step=None):
        """DDIM (2010.02502 eq. 12): x_0, (B, ...). eta in [0, 1] scales the noise (eq. 16): at 0
        x_T alone decides the result, at 1 the sampler is as random as the ancestral one.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta is {eta}, it must be in [0, 1]: 0 is DDIM, 1 is DDPM")
        x = randn(shape, generators, self.betas.device) if x_T is None else at_least_float32(x_T)
        for k, (t, t_prev) in enumerate(self.pairs(steps, len(x), x.device)):
            pred_x_0, pred_noise = self.predictions(network(x, t), x, t)
            alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
            beta = 1 - alpha_bar / alpha_bar_prev
            sigma = eta * (beta * (1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
            # The last step has alpha_bar_prev = 1, not alphas_cumprod[0]: it returns pred_x_0.
            direction = (1 - alpha_bar_prev - sigma ** 2).clamp(min=0).sqrt()
            x = expand(alpha_bar_prev.sqrt(), x) * pred_x_0 + expand(direction, x) * pred_noise
            if eta > 0:
                x = x + expand(sigma, x) * randn(x.shape, generators, x.device, x.dtype)
            if on_step is not None:
                on_step(k, int(t[0]), x, pred_x_0)
        return x

    @torch.no_grad()
    def ddim_invert(self, network, x_0, steps, start=0, corrections=0, generators=None,
                    on_step=None):
        """Run DDIM's ODE backwards (2010.02502 sec. 4.3): the x_T from which ddim_sample, with the
        same network and steps, returns x_0 (paper sec. 3).

        Nearly: a step up takes the noise seen at its lower end for that at its upper end. Each of
        the `corrections` then asks the network at the upper end, as the step down will, and takes
        the step again with what it predicts there; from the second on halfway only, as the whole
        way overshoots. At high levels a little matters: there it is decided what goes where.

        start: 0 begins with a step from the data. The noise of that step is what the network's idea
        of x_0 lacks, divided by a sigma near 0: outlines of the picture, not noise, and many times
        as large, which stay in x_T. Above 0, fresh noise (see randn) carries x_0 to level `start`,
        and inversion goes on from there to those of the `steps` levels that are above it.

        Here on_step's t is the level reached.
        """
        if not 0 <= start < self.T:
            raise UserError(f"start is {start}, it must be a noise level, in [0, {self.T - 1}]")
        x = at_least_float32(x_0)
        first = start if start > 0 else -1  # -1: the data
        levels = [first] + [t for t in reversed(self.timesteps(steps)) if t > first]
        levels = torch.tensor(levels, device=x.device)[:, None].expand(-1, len(x))
        if start > 0:
            x = self.q_sample(x, levels[0], randn(x.shape, generators, x.device, x.dtype))
        for k, (t_prev, t) in enumerate(zip(levels[:-1], levels[1:])):
            level = t_prev.clamp(min=0)  # no network was trained at -1; t = 0 is next to it
            pred_x_0, pred_noise = self.predictions(network(x, level), x, level)
            pred_x_0 = torch.where(expand(t_prev, x) < 0, x, pred_x_0)  # at -1, x *is* x_0
            higher = self.q_sample(pred_x_0, t, pred_noise)
            for n in range(corrections if t_prev[0] >= 0 else 0):  # from -1 every noise leads back
                pred_x_0, _ = self.predictions(network(higher, t), higher, t)
                signal, sigma = self.signal_sigma(t_prev, x)
                again = self.q_sample(pred_x_0, t, (x - signal * pred_x_0) / sigma)
                higher = again if n == 0 else (higher + again) / 2
            x = higher
            if on_step is not None:
                on_step(k, int(t[0]), x, pred_x_0)
        return x

    @torch.no_grad()
    def inpaint(self, network, x_0, mask, steps, resamples=1, generators=None):
        """Ancestral sampling of the part of x_0 where mask is 1, given the rest (RePaint alg. 1).

        After each step down, the known part of x is replaced by x_0 noised to the level reached.
        What was drawn did not know of it yet: so the step is done `resamples` times, going back up
        by q(x_t | x_prev) between, until both parts agree. mask: broadcasts to x_0 (B, ...).
        Returns x_0 exactly where mask is 0.
        """
        x = randn(x_0.shape, generators, x_0.device)
        for t, t_prev in self.pairs(steps, len(x_0), x_0.device):
            last = bool(t_prev[0] < 0)
            for again in range(1 if last else resamples):
                if again:
                    alpha = expand(self.alpha_bar(t) / self.alpha_bar(t_prev), x)
                    noise = randn(x.shape, generators, x.device, x.dtype)
                    x = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
                x, log_variance, _ = self.p_mean_variance(network(x, t), x, t, t_prev)
                known = x_0
                if not last:
                    noise = randn(x.shape, generators, x.device, x.dtype)
                    x = x + torch.exp(0.5 * log_variance) * noise
                    noise = randn(x.shape, generators, x.device, x.dtype)
                    known = self.q_sample(x_0, t_prev, noise)
                x = torch.where(mask.bool(), x, known)
        return x


def evaluating(sample):
    """Decorates a model's sample(): it draws in eval mode, without dropout, and the model is then
    in the mode that it was in, also after an error or Ctrl-C."""
    @functools.wraps(sample)
    def wrapped(self, *args, **settings):
        was_training = self.training
        self.eval()
        try:
            return sample(self, *args, **settings)
        finally:
            self.train(was_training)
    return wrapped


# --- guidance -----------------------------------------------------------------------------------
def guided(network, cond, uncond, scale):
    """Classifier-free guidance (2207.12598) as a function (x_t, t) -> out for the samplers.

        out = uncond + scale * (cond - uncond)

    Off at scale = 1, where only the conditional branch runs; else both run in one batch of 2B.
    0 is the unconditional model (its variance aside). (That paper's w is scale - 1.)

    network:      (x_t, t, **cond) -> out, (B, C, ...), or (B, 2C, ...) with learned variances: then
                  only the first C are guided, and the variance is the conditional branch's
    cond, uncond: dicts name -> tensor (B, ...), with the same names
    """
    if cond.keys() != uncond.keys():
        raise ValueError(f"guided: cond has {sorted(cond)}, uncond has {sorted(uncond)}")
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
