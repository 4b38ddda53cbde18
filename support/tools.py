"""What every command needs and none of it is about unCLIP: device, processes, arguments, pictures.

A student can skip this file. What is worth knowing: precision is chosen in `autocast`; a user's
mistake is a UserError, which `exit_code` turns into one line and exit code 2; and charts are drawn
with Pillow alone, since a chart is only a map from data to pixels.
Read next: sample.py, which puts the stages together.
"""

import argparse
import functools
import math
import os
import re
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

class UserError(Exception):
    """A user's mistake in one line: the value, the rule, the fix. main() prints it and exits 2."""


# --- the machine -----------------------------------------------------------------------------


def choose_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", ... -> torch.device. Raises UserError if it isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                        "devices; use --device cpu or auto")
    return device


def autocast(device):
    """Compute in bfloat16 where the hardware multiplies it fast; weights stay in float32."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    fast = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else cpu_is_fast_in_bf16()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@functools.lru_cache
def cpu_is_fast_in_bf16():
    """Whether this CPU multiplies bfloat16 faster than float32: not all that can do it are.

    AMX is made for it, and AMD's AVX512-BF16 was twice as fast. Intel's AVX512-BF16 without AMX
    (as in some virtual machines) was not: 150 against 263 GFLOP/s. tests/bench.py prints both.
    """
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        intel = True
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() and not intel


def usable_cores():
    """Processor cores that this process may use, which `taskset` can make fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


# --- processes --------------------------------------------------------------------------------


def rank():
    """Which of the processes this is: 0 when there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def note(text):
    """Print, once however many processes there are."""
    if rank() == 0:
        print(text)


def first_alone(make):
    """make(), by the first process and then by the others, which find what it left on disk."""
    if rank() > 0:
        dist.barrier()
    made = make()
    if rank() == 0 and world_size() > 1:
        dist.barrier()
    return made


class Interrupt:
    """Ctrl-C asks the loop to stop after the step it is in, where everything fits together."""

    def __enter__(self):
        self.asked, self.agreed = False, False
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        self.asked = True
        self.__exit__()  # a second Ctrl-C stops at once

    def agree(self, device):
        """Of several processes all must stop after the same step, or some would wait for ever.
        Of several GPUs each waits for its own here, so they are asked at every tenth step only."""
        self.agreed = self.asked
        if world_size() > 1:
            asked = torch.tensor(float(self.asked), device=device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.agreed = asked.item() > 0

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def peak_memory(device):
    """Most memory this process has held so far, GB: the GPU's, or on a CPU the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --- the command line -------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None and False: those the help's own words explain, if need be."""

    def _get_help_string(self, action):
        said = action.default is None or action.default is False
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Defaults in the help; a wrong argument becomes one line instead of a page of usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def known_failure(e):
    """What to do about a failure that is the machine's and not the program's; None of any other."""
    words = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
    memory = ("allocate memory", "ALLOC_FAILED", "is killed by signal")
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(m in str(e) for m in memory):
        return (f"out of memory ({words}); try a smaller --batch-size or fewer --workers in "
                "training, a smaller -n or --size in drawing")
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile cannot work here ({words}); leave --compile out"
    return None


def exit_code(main):
    """Make main(argv=None) return 0, or 2 after a user's mistake: one line on stderr."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
        except UserError as e:
            # One raised in a worker process arrives as a whole traceback, the message last.
            message = str(e).strip().splitlines()[-1].removeprefix("support.tools.UserError: ")
            print(f"error: {message}", file=sys.stderr)
            return 2
        except OSError as e:  # a full disk, a folder that is a file, no permission, ...
            where = f"{e.filename}: " if e.filename else ""
            print(f"error: {where}{e.strerror or e}; check the path and the room", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as e:
            message = known_failure(e)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as e:
            print(f"stopped. {e}", file=sys.stderr)
            return 130  # what a shell reports after Ctrl-C
        return 0

    return wrapped


def at_least(least, bits=48):
    """An argument's type: whole numbers from `least` up, below 2^bits."""

    def whole_number(text):
        value = int(text)
        if not least <= value < 2**bits:
            allowed = f"{least} or more, and below 2^{bits}"
            raise argparse.ArgumentTypeError(f"{value}: must be {allowed}")
        return value

    return whole_number


natural, positive, two_or_more = at_least(0), at_least(1), at_least(2)
# sample.generators multiplies seeds by 8, and PyTorch's CPU generator uses 32 bits of the result.
seed_number = at_least(0, bits=29)


def finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
    return value


def positive_number(text):
    value = finite(text)
    if not 0 < value < 1e30:  # beyond, float32 would soon be at its end
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and below 1e30")
    return value


def fraction(text):
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value
