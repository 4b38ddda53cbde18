"""What a training writes to its folder and to the screen.

    STAGE.pt        the checkpoint: see checkpoint.py
    STAGE.json      its settings, for people to read
    metrics.jsonl   a line of figures now and then, for people and `python -m lab.plots RUN`
    samples/        pictures drawn during the training
"""

import dataclasses
import json
import math
import time

import torch

from support.checkpoint import examples_seen, save_checkpoint
from support.tools import UserError, peak_memory


class Run:
    """The folder of a training, and its figures since the last line of metrics.jsonl. Losses stay
    on the device until they are written, as reading one makes the CPU wait for the GPU."""

    def __init__(self, stage, folder, model, settings, clip, checkpoint):
        self.stage, self.folder, self.path = stage, folder, folder / f"{stage}.pt"
        self.settings, self.figures = settings, {}
        self.about = {"stage": stage, "config": dataclasses.asdict(model.config), "clip": clip,
                      "run": settings}
        self.first, self.examples = checkpoint["step"], examples_seen(checkpoint)
        self.first_losses = dict(checkpoint.get("first_losses", {}))  # see lab/again.py
        self.losses, self.waited, self.waited_in_all = [], 0.0, 0.0

    def begin(self):
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(self.about, indent=2) + "\n")

    def timed(self, batches):
        """The batches; adds up how long each one took to arrive."""
        self.begun = self.started = asked = time.time()
        for batch in batches:
            self.waited += time.time() - asked
            yield batch
            asked = time.time()

    def add(self, loss, norm):
        # A NaN gradient ruins the weights, so treat it like a NaN loss.
        self.losses.append(torch.where(norm.isfinite(), loss.detach(), norm))

    def report(self, step, figures):
        self.figures |= figures
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"stage": self.stage, "step": step} | figures) + "\n")

    def write(self, step, model, rate):
        """Check and report the steps since the last time. Checks the weights too, or they could be
        saved as NaN: a step's loss is that of the weights before it."""
        loss = torch.stack(self.losses).mean().item()
        finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
        if not (math.isfinite(loss) and finite):
            wrong = "a weight is no longer finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise UserError(f"{self.stage}, step {step}: {wrong}. The last checkpoint is kept: try "
                            "a smaller --lr, with --resume")
        if step <= 200:
            self.first_losses[step] = loss
        count, seconds = self.settings["batch_size"] * len(self.losses), time.time() - self.started
        self.examples += count
        self.report(step, {"examples": self.examples, "loss": loss, "lr": rate,
                           "images_per_s": count / seconds, "data_wait": self.waited / seconds})
        self.waited_in_all += self.waited
        self.losses, self.waited, self.started = [], 0.0, time.time()
        return {"loss": f"{loss:.4f}", "images_per_s": f"{count / seconds:.0f}"}

    def save(self, step, model, ema, optimizers):
        """Everything that resuming needs; the random numbers need no state (see train.py)."""
        save_checkpoint(self.path, self.about | {
            "step": step, "figures": self.figures, "first_losses": self.first_losses,
            "ema": ema.model.state_dict(),
            "model": model.state_dict(), "optimizer": [o.state_dict() for o in optimizers],
        })

    def summary(self, device):
        seconds, steps = time.time() - self.begun, self.settings["steps"] - self.first
        speed = steps * self.settings["batch_size"] / seconds
        print(f"{self.stage}: steps {self.first} to {self.settings['steps']}, {seconds / 60:.1f} "
              f"minutes, loss {self.figures['loss']:.4f}, {speed:.0f} images/s, waiting for data "
              f"{self.waited_in_all / seconds:.1%}, {peak_memory(device):.1f} GB")
