"""Claims about devices, errors and arguments: a user's mistake is one line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import tools
from support.sheets import check_folder
from support.tools import UserError, choose_device, usable_cores, user_errors


@pytest.mark.parametrize("name", ["cuda:01", "cuda:300", "cuda:99999999999999", "gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_a_users_mistake(name):
    with pytest.raises(UserError, match=f"--device {name}"):
        choose_device(name)


def run(error):
    @user_errors
    def main(argv):
        raise error

    return main([])


@pytest.mark.parametrize("where", ["", "Caught RuntimeError in DataLoader worker process 0.\n"])
def test_any_other_failure_keeps_its_traceback(where):
    with pytest.raises(RuntimeError, match="mat1"):
        run(RuntimeError(f"{where}mat1 and mat2 shapes cannot be multiplied"))


def test_cores_that_taskset_takes_away_are_not_counted(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3}, raising=False)
    assert usable_cores() == 1


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
])
def test_out_of_memory_is_one_line(error, capsys):
    assert run(error) == 2
    said = capsys.readouterr().err
    assert "--batch-size" in said and said.count("\n") == 1


def test_no_input_is_replaced_and_nothing_is_made_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("ours.JPG").touch()
    Path("dir.png").mkdir()
    for path in ("new/newer", "new/a.png", "a.webp", "dir.png/a.png", "ours.JPG"):
        check_folder(path)
    for path in ("file", "file/in", "dir.png", "ours.JPG"):
        with pytest.raises(UserError, match="cannot write into|would replace"):
            check_folder(path, inputs=["dir.png/../ours.JPG"])
    assert len(list(tmp_path.iterdir())) == 3


def test_no_stream_can_stop_a_command(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert user_errors(lambda argv: print(sys.stderr.isatty()))([]) == 0


def test_what_a_stream_cannot_show_is_a_question_mark():
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    tools.Voice(stream).write("\ré круг \x1b[31m\udce9\n")
    assert stream.buffer.getvalue() == b"\r\xe9 ???? ?[31m?\n"


def test_a_command_runs_into_a_pipe_that_nobody_reads():
    reader, pipe = os.pipe()
    os.close(reader)
    command = [sys.executable, Path(tools.__file__).parent.parent / "train.py", "--help"]
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_notebook_gets_the_line_as_an_exception(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(UserError, match="^the line$"):
        run(UserError("Traceback ...\nsupport.tools.UserError: the\nline\n"))


@pytest.mark.parametrize("kind, good, bad", [
    (tools.natural, {"0": 0, "7": 7}, ["-1", "1.5", "x", str(2**40)]),
    (tools.positive, {"1": 1}, ["0", str(2**60)]),
    (tools.some, {"100000": 100000}, ["0", "1000000000000"]),
    (tools.two_or_more, {"2": 2}, ["1", str(2**47)]),
    (tools.finite, {"-3": -3, "100": 100}, ["nan", "1e300"]),
    (tools.seed_number, {"0": 0}, [str(2**29)]),
    (tools.positive_number, {"0.5": 0.5}, ["0", "-1", "nan", "inf", "1e300"]),
    (tools.fraction, {"0": 0, "1": 1}, ["1.01", "-0.1", "nan"]),
])
def test_arguments_have_the_types_that_they_say(kind, good, bad):
    assert all(kind(text) == value for text, value in good.items())
    assert kind(None) is None
    for text in bad:
        with pytest.raises((UserError, ValueError)):
            kind(text)


@pytest.mark.parametrize("fast", [True, False])
def test_autocast_is_on_just_where_bfloat16_is_fast(monkeypatch, fast):
    monkeypatch.setattr(tools, "cpu_is_fast_in_bf16", lambda: fast)
    with tools.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
