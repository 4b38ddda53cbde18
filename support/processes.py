"""Processes: signals that ask a training to stop, workers that make its batches, and several
GPUs. A student can skip this file."""

import os
import signal
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@contextmanager
def stop_signals(listen=True):
    """Ctrl-C, SIGTERM (a cluster's preemption) and SIGHUP (a closed terminal) ask a loop to stop:
    yields a list that is empty until then. A second Ctrl-C stops at once. listen=False ignores
    them, as another process decides."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if listen:
            asked.append(number)

    before = {number: signal.signal(number, ask) for number in SIGNALS
              if signal.getsignal(number) != signal.SIG_IGN}  # as nohup has SIGHUP ignored
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    """For a DataLoader's worker processes: the main process decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def in_workers(work, jobs, workers, device):
    """An iterator of work(job), of tensors, for each job in order: made ahead by
    `workers` processes, or here by none. They end with the loop, whatever ends it and whatever they
    are doing. Left to themselves they outlive an error, and Python waits for them at its exit."""
    loader = torch.utils.data.DataLoader(
        jobs, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals,
        collate_fn=work, pin_memory=device.type == "cuda")
    made = iter(loader)
    for worker in getattr(made, "_workers", []):
        worker.terminate = worker.kill  # they ignore SIGTERM, which is the loader's last resort
    try:
        yield made
    finally:
        if workers:
            made._shutdown_workers()


@contextmanager
def joined_processes(device):
    """(rank, world, device): 0, 1 and the device, or this process's own as torchrun started it."""
    if not dist.is_torchelastic_launched():
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()
