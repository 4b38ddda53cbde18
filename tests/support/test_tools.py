"""Claims about devices, errors and arguments: a user's mistake is one line."""

import argparse

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


def test_where_nothing_can_be_written_is_said_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "new" / "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match="cannot write into"):
            check_folder(path)


@pytest.mark.parametrize("kind, good, bad", [
    (tools.natural, {"0": 0, "7": 7}, ["-1", "1.5", "x", str(2**60)]),
    (tools.positive, {"1": 1}, ["0"]),
    (tools.seed_number, {"0": 0}, [str(2**29)]),
    (tools.positive_number, {"0.5": 0.5}, ["0", "-1", "nan", "inf", "1e300"]),
    (tools.fraction, {"0": 0, "1": 1}, ["1.01", "-0.1", "nan"]),
])
def test_arguments_have_the_types_that_they_say(kind, good, bad):
    assert all(kind(text) == value for text, value in good.items())
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


@pytest.mark.parametrize("fast", [True, False])
def test_autocast_is_on_just_where_bfloat16_is_fast(monkeypatch, fast):
    monkeypatch.setattr(tools, "cpu_is_fast_in_bf16", lambda: fast)
    with tools.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
