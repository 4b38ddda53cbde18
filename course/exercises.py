"""The table of exercises, from which handout, checks and grades are made.

An exercise is the body of a function, or a region of it between two comment lines. Its problem is
the function's docstring and a paragraph of assignment.md. Its public tests come with the handout,
the hidden ones do not. Tests are named by how they begin; one [case] of a test can be meant alone.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Exercise:
    number: int
    name: str
    points: int
    minutes: int
    file: str
    function: str  # "f" or "Class.f"
    public: tuple  # ids of tests
    hidden: tuple
    mistakes: tuple  # known: (right, wrong, hint), a change of our code; none if open
    region: bool = False
    figure: str = ""  # expected, of figures.py
    also: tuple = ()  # (file, function) that contain the answer: blank until it is revealed
    hints: dict = field(default_factory=dict)  # in a handout, in place of mistakes: by fingerprint


def t(file, *names):
    """The ids of the tests in tests/*/test_<file>.py that begin so."""
    (path,) = ROOT.glob(f"tests/*/test_{file}.py")
    there, ids = re.findall(r"^def test_(\w+)", path.read_text(), re.M), []
    for name in names:
        start, bracket, case = name.partition("[")
        (found,) = [x for x in there if x.startswith(start)]
        ids.append(f"{path.relative_to(ROOT).as_posix()}::test_{found}{bracket}{case}")
    return tuple(ids)


EXERCISES = [Exercise(number, *row) for number, row in enumerate([
    ("Along a great circle", 4, 15, "manipulate.py", "slerp",
     t("manipulate", "slerp_turns"), t("exercises", "slerp_in_two_halves"),
     (("in (1 - theta, theta)", "in (theta, 1 - theta)", "theta = 0 must give a, theta = 1 b"),
      (".clamp(-1 + 5e-9, 1 - 5e-9)", "", "equal a and b: keep sin(omega) above 0"))),
    ("Tell a network the time", 4, 20, "networks.py", "timestep_embedding",
     t("exercises", "time_embedding") + t("networks", "timestep_embedding_has"),
     t("networks", "timestep_embedding_holds"),
     (("angles.cos(), angles.sin()", "angles.sin(), angles.cos()", "cosines first, then sines"),
      ("t.device) / (dim // 2)", "t.device) / dim", "of dim / 2 frequencies, i is i / (dim / 2)"))),
    ("Jump to a noise level", 4, 15, "diffusion.py", "GaussianDiffusion.q_sample",
     t("exercises", "noise_alone", "noising_unit"), t("diffusion", "q_sample_mixes"),
     (("signal * x_0 + sigma", "signal ** 2 * x_0 + sigma ** 2", "the roots: variances add to 1"),
      ("signal * x_0 + sigma", "sigma * x_0 + signal", "alpha_bar is what is left of the data")),
     False, "forward", (("diffusion.py", "GaussianDiffusion.target"),)),
    ("What the answer means", 8, 40, "diffusion.py", "GaussianDiffusion.predictions",
     t("diffusion", "a_right_answer", "clipping_bounds"), t("diffusion", "ancestral_step"),
     (("x_t - sigma * out}", "x_t + sigma * out}", "put x_t and v in: the noise must cancel"),
      ("clip and self.clip_x_0", "clip", "embeddings are not clipped: self.clip_x_0 says so")),
     False, "denoising"),
    ("One step back", 8, 45, "diffusion.py", "GaussianDiffusion.step",
     t("diffusion", "q_posterior_is", "q_posterior_keeps", "q_posterior_at"),
     t("diffusion", "variance_of_a_jump", "ancestral_step"),
     (("c1 = alpha_bar_prev", "c1 = alpha_bar", "x_0 is scaled as at the level you step to"),
      ("alpha_bar / alpha_bar_prev", "1 - self.betas[t]", "a jump: alpha is a ratio of alpha_bars"),
      ("beta * (1 - alpha_bar_prev) / (1 - alpha_bar)", "beta", "x_0 is known: less than beta"))),
    ("The loss", 6, 30, "diffusion.py", "GaussianDiffusion.training_loss",
     t("diffusion", "loss_of_the_best", "loss_is_one", "loss_refuses"),
     t("diffusion", "mean_gets_no_gradient", "loss_draws"),
     ((".flatten(1).mean(1)", ".mean()", "one loss an example: do not average over them"),
      ("self.target(x_0, noise, t)", "noise", "what is asked for depends on self.predict")),
     True, "levels"),
    ("Guidance", 6, 30, "diffusion.py", "guided",
     t("diffusion", "guidance_moves"), t("diffusion", "guidance_of"),
     (("mean = out_uncond", "mean = out_cond", "scale 1 must give cond: start from uncond"),
      ("[mean, out_cond[", "[mean, out_uncond[", "the variance channels are those of cond")),
     False, "guidance"),
    ("Ancestral sampling", 8, 40, "diffusion.py", "GaussianDiffusion.sample",
     t("exercises", "ancestral_sampling") + t("diffusion", "samplers_visit_their[sample]",
                                              "an_image_depends[sample-settings0]"),
     t("diffusion", "ancestral_with_all"),
     (("0.5 * log_var", "log_var", "noise is scaled by a standard deviation: half the log"),
      ("< len(pairs) - 1", "< len(pairs)", "the last step lands on the data: no noise")),
     False, "denoising", (("manipulate.py", "resample"),)),
    ("DDIM", 8, 45, "diffusion.py", "GaussianDiffusion.ddim_sample",
     t("exercises", "ddim_noises") + t("diffusion", "eta_scales", "ddim_survives",
                                     "samplers_visit_their[ddim_sample]"),
     t("diffusion", "ddim_on", "ddim_with_eta"),
     (("self.alpha_bar(t_prev)", "self.alpha_bar(t_prev.clamp(min=0))", "end at alpha_bar = 1"),
      ("_prev - sigma ** 2)", "_prev)", "the fresh noise takes its share of the variance"))),
    ("Attention", 6, 30, "networks.py", "attention",
     t("networks", "attention_on"), t("networks", "picture_attention", "block_equals"),
     (("q * q.shape[-1] ** -0.5", "q", "divide by the root of d: a sum of d products grows so"),
      ("masked_fill(~mask", "masked_fill(mask", "mask is True where a query *may* look")), True),
    ("Who sees whom", 4, 20, "networks.py", "causal_mask",
     t("networks", "causal_mask", "changing_a_token"), t("prior", "prior_ignores"),
     ((" | itself", "", "a padding token sees itself, or its softmax is 0 / 0"),
      ("key_mask[:, None]", "key_mask[:, :, None]", "padding is not *seen*: it masks columns")),
     False, "sequence"),
    ("A step with a cache", 8, 45, "ar_prior.py", "AutoregressivePrior.sample",
     t("ar_prior", "the_cached_pass"), t("ar_prior", "sampled_codes"),
     (("position[i]", "position[0]", "each code has its own position"),
      ("repeat(len(branches))", "repeat_interleave(len(branches))", "all cond, then all uncond"),
      ("torch.cat([past, own], dim=4)", "own", "keep the keys of all earlier tokens")), True),
    ("What the decoder is told", 8, 45, "decoder.py", "Decoder.condition",
     t("decoder", "image_embedding_acts", "dropped_conditions", "null_embedding", "padding_tokens"),
     t("decoder", "the_unet_is_told", "a_missing_condition"),
     (("(keep_image_emb, image_emb,", "(~keep_image_emb, image_emb,", "keep: True where it stays"),
      ("text_mask & keep_caption", "text_mask", "tokens of a dropped caption are masked out")),
     False, "guidance"),
    ("A crop with true neighbours", 8, 45, "upsampler.py", "training_pair",
     t("upsampler", "a_pair_is_drawn", "no_corruption"), t("upsampler", "corruption_comes"),
     (("min(max(top - margin, 0), config.low_size - window_side)", "max(top - margin, 0)",
       "at the bottom border the window must slide up"),
      ("f * (top - window_top)", "f * top", "cut in the window's own coordinates")), True),
    ("Guidance between two levels", 5, 40, "course/open_exercises.py", "guided_between",
     t("exercises", "guidance_acts", "without_a_guided"), (), ()),
    ("A Heun step", 5, 60, "course/open_exercises.py", "heun_sample",
     t("exercises", "heun_on", "heun_with", "heun_asks"), (), ()),
], start=1)]
