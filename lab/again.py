"""Are trained weights what their stored commands make? Begins each training again, and compares.

    python -m lab.again --weights weights/cifar10

A checkpoint holds the command of its training and the losses of its first 200 steps, as means over
50 steps or fewer. The batch and the noise of a step depend on the seed alone, so the command gives
the same losses again, but for rounding, which differs between machines. The commands are run from
here: a relative --root must lead to the same pictures. Steps at which only one of the two trainings
wrote a loss are left out; after an interruption in these 200 steps, means may be of other steps.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.evaluate import trained
from stages import needs_clip
from support.checkpoint import load_checkpoint
from support.drawing import SHIPPED
from support.tools import Parser, UserError, user_errors

TOLERANCE = 0.02  # of a loss


def losses_again(stage, checkpoint, folder):
    """{step: loss} of the first steps of the checkpoint's command, run anew in `folder`."""
    last, world = max(checkpoint["first_losses"]), checkpoint["run"]["world"]
    _, *words = shlex.split(checkpoint["run"]["command"])  # "python" and what follows it
    words = [stage if word == "all" else word for word in words]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command = [sys.executable, *(torchrun if world > 1 else []), *words, "--out", str(folder)]
    training, log, losses = subprocess.Popen(command), folder / "metrics.jsonl", {}
    while max(losses, default=0) < last and training.poll() is None:
        time.sleep(1)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        told = [json.loads(line) for line in lines if line.endswith("\n")]
        losses = {x["step"]: x["loss"] for x in told if x["stage"] == stage and "loss" in x}
    training.terminate()
    training.wait()
    if max(losses, default=0) < last:
        raise UserError(f"{stage}: this command does not work here: {shlex.join(command)}")
    return losses


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.again", description="Begin trainings again and compare losses")
    parser.add_argument("--weights", type=Path, help="folder (default: as sample.py)")
    args = parser.parse_args(argv)
    weights, different = args.weights or SHIPPED, []
    for stage in trained(weights):
        checkpoint = load_checkpoint(weights / f"{stage}.pt", stage)
        if not checkpoint.get("first_losses"):
            print(f"{stage}: was trained before first losses were kept")
            continue
        with tempfile.TemporaryDirectory() as folder:
            if needs_clip(stage):
                shutil.copy(weights / "clip.pt", folder)
            losses = losses_again(stage, checkpoint, Path(folder))
        for step in sorted(losses.keys() & checkpoint["first_losses"]):
            loss = checkpoint["first_losses"][step]
            same = abs(losses[step] - loss) <= TOLERANCE * abs(loss)
            different += [] if same else [stage]
            print(f"{stage} {step}: {loss:.4f}, again {losses[step]:.4f}", flush=True)
    if different:
        raise UserError(f"other losses than in the training: {', '.join(dict.fromkeys(different))}")


if __name__ == "__main__":
    sys.exit(main())
