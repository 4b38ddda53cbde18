"""What every command needs but has nothing to do with unCLIP: device, precision, errors, options.

A student can skip this file. Worth knowing: `autocast` chooses the precision, and a user's mistake
is a UserError, which `user_errors` turns into one line and exit code 2.
"""

import argparse
import functools
import math
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch


class UserError(argparse.ArgumentTypeError):
    """A user's mistake in one line: the value, the rule, the fix. argparse adds the option."""


class Unfinished(UserError):
    """What an exercise of the course raises in place of its solution."""

    def __init__(self, exercise):  # a text if a worker process sends it on
        super().__init__(exercise if isinstance(exercise, str) else f"exercise {exercise} is "
                         f"unfinished; to go on without: python -m course reveal {exercise}")


def choose_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", "mps", ... -> torch.device. UserError if it isn't there."""
    count = torch.cuda.device_count()
    there = ["cpu", *["mps"][: torch.backends.mps.is_available()],
             *["cuda"][:count], *(f"cuda:{k}" for k in range(count))]
    name = ("cuda" if count else "cpu") if name == "auto" else name
    if name not in there:
        raise UserError(f"--device {name}: use one that this machine has: {', '.join(there)}")
    return torch.device(name)


def autocast(device):
    """Compute in bfloat16 where the hardware multiplies it fast; weights stay in float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # an Apple GPU ("mps") computes in float32, as nobody has tried
        fast = kind == "cpu" and cpu_is_fast_in_bf16()
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


def place(model, device):
    """model.to(device). Apple's GPUs ("mps") have no float64, in which schedules are kept."""
    if device.type == "mps":
        model.to(torch.float32)
    return model.to(device)


@functools.lru_cache
def cpu_is_fast_in_bf16():
    """Whether this CPU multiplies bfloat16 faster than float32. Chips with AMX or AMD's AVX512-BF16
    do; Intel's AVX512-BF16 without AMX is slower than float32. `python -m lab.bench` times both."""
    amx, avx512 = (getattr(torch.cpu, f"_is_{x}_supported", bool)()
                   for x in ("amx_tile", "avx512_bf16"))
    try:
        return amx or avx512 and "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def usable_cores():
    """Processor cores that this process may use: `taskset` can take some away, on Linux."""
    linux = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1


def peak_memory(device):
    """Most memory this process has held so far, in GB: on the GPU, or in main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None and False."""

    def _get_help_string(self, action):
        quiet = action.default is None or action.default is False
        return action.help if quiet else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Defaults in the help; a wrong argument becomes one line instead of a page of usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, **kwargs)
        self.color = False  # Python 3.14 would colour the help by control characters

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def known_failure(e):
    """What to do about a failure of the machine; None if it is the program's own."""
    words = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
    memory = "allocate memory|out of memory|ALLOC_FAILED|is killed by signal|exited unexpectedly"
    if isinstance(e, MemoryError) or re.search(memory, str(e)):
        return (f"out of memory ({words}); try a smaller --batch-size or fewer --workers in "
                "training, a smaller -n or --size in drawing")
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile cannot work here ({words}); leave --compile out"


def user_errors(main):
    """Make main(argv=None) return 0, or 2 after a user's mistake: one line on stderr. At Python's
    prompt and in a notebook, where an exit code goes unseen, it raises UserError instead."""

    @functools.wraps(main)
    def wrapped(argv=None):
        with redirect_stdout(Voice(sys.stdout)), redirect_stderr(Voice(sys.stderr)):
            try:
                main(argv)
                return 0
            except UserError as e:  # from a worker process it comes at the end of a traceback
                message = re.split(r"support\.tools\.\w+: ", str(e))[-1]
            except OSError as e:  # a full disk, a folder that is a file, no permission, ...
                where = f"{e.filename}: " if e.filename else ""
                message = f"{where}{e.strerror or e}; check the path and the free space"
            except (MemoryError, RuntimeError) as e:
                if not (message := known_failure(e)):
                    raise
            except KeyboardInterrupt as e:
                print(f"stopped. {e}", file=sys.stderr)
                return 130  # what a shell reports after Ctrl-C
            message = " ".join(message.split())
            if hasattr(sys, "ps1"):
                raise UserError(message)
            print(f"error: {message}", file=sys.stderr)
            return 2

    return wrapped


class Voice:
    """A stream for print that never fails, as no message is worth a training: what it cannot show
    becomes "?", and one that is closed, full or not there falls silent."""

    def __init__(self, stream):
        self.stream = stream
        self.write("")  # finds out whether it is there

    def write(self, text):
        text = re.sub(r"\x1b(?!\[A)", "?", printable(text, "\r\n\x1b"))  # tqdm goes up by \x1b[A
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except (AttributeError, OSError, ValueError):
            null = open(os.devnull, "w")
            with suppress(AttributeError, OSError, ValueError):
                os.dup2(null.fileno(), self.stream.fileno())  # or Python's exit tries it again
            self.stream = null

    def __getattr__(self, name):
        return getattr(self.stream, name)


def number(kind, least, most, rule):
    """An argument's type: an int or a float from `least` to `most`; None stays None."""
    def parse(text):
        value = None if text is None else kind(text)
        if value is not None and not least <= value <= most:  # true of NaN as well
            raise UserError(f"{text}: must be {rule}")
        return value

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


natural = number(int, 0, 1000, "0 to 1000")
positive = number(int, 1, 10**7, "1 to 10^7")
some = number(int, 1, 10**5, "1 to 100000")
sampling_steps = number(int, 1, 1000, "1 to 1000: the stages have 1000 noise levels")
two_or_more = number(int, 2, 1000, "2 to 1000")
# sample.noise_for multiplies seeds by 8, and PyTorch's CPU generator uses only 32 bits of a seed.
seed_number = number(int, 0, 2**29 - 1, "0 or more, and below 2^29")
finite = number(float, -100, 100, "from -100 to 100")
positive_number = number(float, 1e-30, 1e30, "above 0 and below 1e30")
fraction = number(float, 0, 1, "between 0 and 1")


def printable(text, also=""):
    """Text from files, safe to print: control characters could drive the terminal."""
    return "".join(c if c.isprintable() or c in also else "?" for c in text)


@functools.cache  # each stage of a training opens the same data
def say(line, stream=None):
    """Print a line, once a process: on `stream`, or where the first process speaks for all."""
    print(printable(line), file=stream)
