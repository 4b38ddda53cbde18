"""What every command needs but has nothing to do with unCLIP: device, precision, signals, options.

A student can skip this file. Worth knowing: `autocast` chooses the precision, and a user's mistake
is a UserError, which `user_errors` turns into one line and exit code 2.
"""

import argparse
import functools
import math
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch


class UserError(Exception):
    """A user's mistake in one line: the value, the rule, the fix."""


def choose_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", ... -> torch.device. Raises UserError if it isn't there."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name not in ("cpu", *["cuda"][:count], *(f"cuda:{k}" for k in range(count))):
        raise UserError(f"--device {name}: this machine has the device cpu and {count} of the kind "
                        "cuda; use --device cpu or auto")
    return torch.device(name)


def autocast(device):
    """Compute in bfloat16 where the hardware multiplies it fast; weights stay in float32."""
    kind = torch.device(device).type
    fast = (torch.cuda.get_device_capability(device) >= (8, 0) if kind == "cuda"
            else cpu_is_fast_in_bf16())
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


@functools.lru_cache
def cpu_is_fast_in_bf16():
    """Whether this CPU multiplies bfloat16 faster than float32. Chips with AMX or AMD's AVX512-BF16
    do; Intel's AVX512-BF16 without AMX, as in some virtual machines, is slower than float32.
    `python -m lab.bench` prints both."""
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


@contextmanager
def stop_signals(listen=True):
    """Ctrl-C, SIGTERM (a cluster's preemption) and SIGHUP (a closed terminal) ask a loop to stop:
    yields a list that is empty until then. A second Ctrl-C stops at once. listen=False ignores
    them, as another process decides."""
    asked, before = [], {}

    def ask(number, frame):
        if listen and asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.extend([number] if listen else [])

    if threading.current_thread() is threading.main_thread():  # other threads get no signals
        before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def ignore_signals(worker):
    """For a DataLoader's worker processes: the main process decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def batches_of(loader):
    """iter(loader), whose worker processes end with the loop, whatever ends it and whatever they
    are doing. Left to themselves they outlive an error, and Python waits for them at its exit."""
    batches = iter(loader)
    workers = getattr(batches, "_workers", [])  # it has none where this process does the work
    for worker in workers:
        worker.terminate = worker.kill  # they ignore SIGTERM, which is the loader's last resort
    try:
        yield batches
    finally:
        if workers:
            batches._shutdown_workers()


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None and False."""

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
    """What to do about a failure of the machine; None if it is the program's own."""
    words = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
    memory = ("allocate memory", "ALLOC_FAILED", "is killed by signal")
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(m in str(e) for m in memory):
        return (f"out of memory ({words}); try a smaller --batch-size or fewer --workers in "
                "training, a smaller -n or --size in drawing")
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile cannot work here ({words}); leave --compile out"


def user_errors(main):
    """Make main(argv=None) return 0, or 2 after a user's mistake: one line on stderr."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
            return 0
        except UserError as e:
            # From a worker process it arrives as a whole traceback, whose last line is the message.
            message = str(e).strip().splitlines()[-1].removeprefix("support.tools.UserError: ")
        except OSError as e:  # a full disk, a folder that is a file, no permission, ...
            where = f"{e.filename}: " if e.filename else ""
            message = f"{where}{e.strerror or e}; check the path and the free space"
        except (MemoryError, RuntimeError) as e:
            message = known_failure(e)
            if message is None:
                raise
        except KeyboardInterrupt as e:
            print(f"stopped. {e}", file=sys.stderr)
            return 130  # what a shell reports after Ctrl-C
        print(f"error: {message}", file=sys.stderr)
        return 2

    return wrapped


def number(kind, least, most, rule):
    """An argument's type: an int or a float from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:  # true of NaN as well
            raise argparse.ArgumentTypeError(f"{text}: must be {rule}")
        return value

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


natural = number(int, 0, 2**48, "0 or more, and at most 2^48")
positive = number(int, 1, 2**48, "1 or more, and at most 2^48")
sampling_steps = number(int, 1, 1000, "1 to 1000: the stages have 1000 noise levels")
two_or_more = number(int, 2, 2**48, "2 or more, and at most 2^48")
# sample.noise_for multiplies seeds by 8, and PyTorch's CPU generator uses only 32 bits of a seed.
seed_number = number(int, 0, 2**29 - 1, "0 or more, and below 2^29")
finite = number(float, -1e30, 1e30, "finite")
positive_number = number(float, 1e-30, 1e30, "above 0 and below 1e30")
fraction = number(float, 0, 1, "between 0 and 1")
