"""An exercise's tests in a process of their own, with limits on time and memory.

Whatever a student's code does there (loop for ever, exit, kill, print), the process that grades
only reads from a pipe what becomes of each test, and ends the other in time.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress

LIMIT = 30  # seconds of a processor, for an exercise; four times as many on the clock
MEMORY = 1500 * 2**20  # bytes
EARLY = "the tests did not get to their end: an endless loop, an exit, a kill?"


def run(folder, ids):
    """Run tests in a copy of the repository: [[id, outcome, cause], ...], and the seconds of a
    processor that they took, or None if they did not get to their end."""
    # A server imports once what is slow to import, and forks. Windows cannot.
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    context.set_forkserver_preload(["torch", "pytest", "open_clip"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(str(folder), ids, send, LIMIT), daemon=True)
    process.start()
    send.close()
    reports, end = [], time.time() + 4 * LIMIT
    with suppress(EOFError, OSError, ValueError, TypeError):
        while receive.poll(max(0, end - time.time())):
            reports.append([str(x) for x in json.loads(receive.recv_bytes(10_000))])
    with suppress(OSError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
    process.kill()
    process.join()
    seconds = float(reports.pop()[1]) if reports and reports[-1][0] == "end" else None
    return reports, seconds


def in_child(folder, ids, send, limit):
    with suppress(ImportError, OSError, ValueError, AttributeError):
        os.setsid()
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.chdir(folder)
    sys.path.insert(0, folder)
    for name in [n for n in sys.modules if n.split(".")[0] in ("course", "support")]:
        del sys.modules[name]  # they are the grader's, not this folder's
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import pytest
    import torch

    class Plugin:
        @pytest.fixture
        def same_numbers_on_one_thread(self):  # as in tests/conftest.py, which imports everything
            torch.manual_seed(0)

        def pytest_collectreport(self, report):
            if report.failed or getattr(report, "when", None) == "call":
                say(report.nodeid, report.outcome, cause(report.longrepr))

        pytest_runtest_logreport = pytest_collectreport

    def say(*words):
        send.send_bytes(json.dumps(words).encode())

    torch.set_num_threads(1)
    pytest.main(["--noconftest", "-p", "no:cacheprovider", "--rootdir", folder, *ids], [Plugin()])
    say("end", time.process_time())


def cause(longrepr):
    """Why a test failed, on one line."""
    crash = getattr(longrepr, "reprcrash", None)
    lines = str(crash.message if crash else longrepr or "").split("\n")
    return "; ".join(line.strip() for line in lines if line.strip())[:200]
