"""Two exercises whose solution is not in this repository, graded by closed forms."""

import torch

from diffusion import at_least_float32, expand, guided  # noqa: F401  they may be of use
from support.tools import Unfinished


def guided_between(network, cond, uncond, scale, low, high):
    """Guidance at the levels low <= t <= high alone (2404.07724): a function (x_t, t) -> out.

    An example whose t lies between the levels, both counted, gets diffusion.guided's answer, any
    other the conditional one, exactly. If no example of a batch is guided, the network runs once,
    on B examples.
    """
    raise Unfinished(15)


@torch.no_grad()
def heun_sample(diffusion, network, steps, x_T):
    """DDIM's path in Heun's second-order steps (2206.00364 alg. 1): x_T (B, ...) -> x_0 (B, ...).

    Let y = x / sqrt(alpha_bar) and s = sqrt((1 - alpha_bar) / alpha_bar): DDIM (eta = 0) is Euler's
    method for dy/ds = pred_noise (2010.02502 eq. 14). Heun's takes the Euler step to s_prev, asks
    the network there (at t_prev, with x = sqrt(alpha_bar_prev) * y), and repeats the step from the
    old y with the mean of the two pred_noise. The last step, to the data, stays Euler's: no network
    was trained there. `pairs`, `alpha_bar` and `predictions` of the diffusion are of use.
    """
    raise Unfinished(16)
