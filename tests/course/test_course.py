"""Claims about the course: the table, the handout, grades, hostile submissions, what is written."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from multiprocessing.pool import ThreadPool

import pytest

from course import child, figures, grade, handout
from course.__main__ import main
from course.exercises import EXERCISES, ROOT
from course.parts import REVEALED, put, span, statements, text_of
from support import tools

SOLVABLE = [e for e in EXERCISES if e.mistakes]
FORWARD = EXERCISES[2]  # a short one


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A handout, not to be changed."""
    folder = tmp_path_factory.mktemp("course") / "handout"
    assert main(["handout", str(folder)]) == 0
    return folder


def ours(e):
    return (ROOT / e.file).read_text()


def submit(folder, e, body=None, base=ROOT):
    """A submission of one file, `base`'s with our body or another one."""
    folder.mkdir(parents=True, exist_ok=True)
    body = text_of(ours(e), e) if body is None else body
    (folder / os.path.basename(e.file)).write_text(put((base / e.file).read_text(), e, body))
    return folder


def two_at_a_time(work, items):
    with ThreadPool(2) as pool:
        return list(zip(items, pool.map(work, items), strict=True))


def python(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# --- the table ------------------------------------------------------------------------------------


def test_points_add_up_and_every_row_names_a_function_and_tests_that_are_there():
    assert sum(e.points for e in EXERCISES) == 100
    for e in EXERCISES:
        first, end = span(ours(e), e)[1:]  # finds the function, and balanced comments
        assert end > first and e.public and (e.hidden or not e.mistakes)
        assert ast.get_docstring(span(ours(e), e)[0])
        assert not e.figure or e.figure in figures.FIGURES
        lines = ours(e).splitlines()
        commented = "\n".join([*lines[:first], "# at the margin", *lines[first:]])
        assert ast.dump(statements(commented, e)) == ast.dump(statements(ours(e), e))
        for test in e.public + e.hidden:
            file, _, name = test.partition("::")
            assert f"\ndef {name.partition('[')[0]}(" in (ROOT / file).read_text()


# --- the handout ----------------------------------------------------------------------------------


def test_the_handout_keeps_signatures_and_docstrings_and_holds_no_line_of_a_solution(made):
    texts = {path: path.read_text() for path in made.rglob("*")
             if path.suffix in (".py", ".md", ".ipynb", ".toml", ".txt")}
    there = {line.strip() for text in texts.values() for line in re.split(r"\n|\\n", text)}
    for e in SOLVABLE:
        for line in map(str.strip, text_of(ours(e), e).splitlines()):
            assert len(line) < 20 or line not in there, (e.name, line)
        before, after = (span(text, e)[0] for text in (ours(e), (made / e.file).read_text()))
        assert ast.dump(before.args) == ast.dump(after.args)
        assert ast.get_docstring(before) == ast.get_docstring(after)
    hidden = [test.split("::")[1] for e in EXERCISES for test in e.hidden]
    assert not [test for test in hidden if any(test in text for text in texts.values())]
    assert not (made / ".git").exists() and not [*made.glob("docs/*.md")]


def test_the_handout_is_imported_and_collected_and_what_is_unfinished_ends_in_one_line(made):
    code, out, err = python(made, "-m", "pytest", "--collect-only")
    collected = out.count("::")
    assert code == 0 and collected > sum(len(e.public) for e in EXERCISES), err
    assert "test_gpu" not in out
    code, out, err = python(made, "sample.py", "a red circle", "-n", "1", "--out", "x.png")
    assert code == 2 and err.startswith("error: exercise ") and err.count("\n") == 1
    code, out, err = python(made, "-m", "course", "grade", ".", "graded")
    assert code == 2 and "not a handout" in err and not (made / "graded").exists()
    assert main(["handout", str(made)]) == 2  # there already


def test_the_handout_is_graded_0_and_if_it_is_run_every_public_test_fails(
        made, tmp_path, monkeypatch):
    assert grade.grade(made, tmp_path)["score"] == 0
    monkeypatch.setattr(grade, "refused", lambda tree: None)
    for e, (failed, _) in two_at_a_time(lambda e: grade.attempt(e, made, e.public), EXERCISES):
        assert failed.keys() == set(e.public), e.name


# --- grades ---------------------------------------------------------------------------------------


def test_the_handout_with_one_exercise_solved_gets_its_points_for_each_and_in_time(
        made, tmp_path, monkeypatch):
    # So the repository gets full marks: each exercise is graded by itself.
    seconds, real = [], child.run
    monkeypatch.setattr(grade, "run", lambda *a: seconds.append(real(*a)) or seconds[-1])

    def solve(e):
        submission = submit(tmp_path / str(e.number), e, base=made)
        return grade.grade(submission, tmp_path / f"out {e.number}")

    for e, solved in two_at_a_time(solve, SOLVABLE):
        assert [row["score"] for row in solved["tests"]] == [
            e.points * (e == other) for other in EXERCISES], solved
    assert max(s for _, s in seconds) < child.LIMIT / 3


def test_each_known_mistake_fails_a_test_and_gets_its_own_hint(tmp_path):
    def make(mistake):
        e, old, new, _ = mistake
        wrong = "# mine\n" + text_of(ours(e), e).replace(old, new)
        folder = submit(tmp_path / str(mistakes.index(mistake)), e, wrong)
        return grade.attempt(e, folder, e.public)

    mistakes = [(e, *mistake) for e in SOLVABLE for mistake in e.mistakes]
    for (e, old, _, hint), (failed, said) in two_at_a_time(make, mistakes):
        assert failed and said == [f"hint: {hint}"], (e.name, old)


KILLER = "torch.os.kill(torch.os.getppid(), 9)"  # of the server that starts the tests
HOSTILE = {
    "while True:\n    pass": "end",
    "raise SystemExit(0)": "SystemExit",
    "torch.os._exit(0)": "end",
    "raise KeyboardInterrupt": "did not run",
    "print('1 passed' * 10**6)\nreturn 0 * x_0": "not so: ",
    "return torch.zeros(10**10)": "memory",
    "return helper(x_0)": "helpers go into it",
}


def test_whatever_a_body_does_the_results_are_valid_and_the_rest_is_kept(tmp_path, monkeypatch):
    def results(body):
        out = tmp_path / str([*HOSTILE, KILLER].index(body))
        grade.grade(submit(submit(out, EXERCISES[9]), FORWARD, body), out)
        return json.loads((out / "results.json").read_text())

    monkeypatch.setattr(child, "LIMIT", 3)
    monkeypatch.setattr(grade, "EXERCISES", [FORWARD, EXERCISES[9]])
    monkeypatch.setattr(grade, "refused", lambda tree: None)
    for body, found in [*two_at_a_time(results, HOSTILE), (KILLER, results(KILLER))]:
        assert [row["score"] for row in found["tests"]] == [0, 6] and found["score"] == 6, body
        assert HOSTILE.get(body, "") in found["tests"][0]["output"]


@pytest.mark.parametrize("change, says", [
    (lambda s: s.replace("def q_sample(self, x_0, t, noise)", "def q_sample(self, t)"), None),
    (lambda s: s.replace("def q_sample", "def r_sample"), "is not there"),
    (lambda s: s + "\ndef f(:\n", "does not parse, line"),
    (lambda s: "", "is not there"),
    (lambda s: s.replace("signal * x_0 +", "open('x') +"), "'open', which no exercise needs"),
    (lambda s: s.replace("signal * x_0 +", "torch.os.sep +"), "'os'"),
    (lambda s: s.replace("signal * x_0 +", "getattr(torch, 'os') +"), "'os'"),
    (lambda s: s.replace("return signal * x_0", "import math; return signal * x_0"), "imports"),
    (lambda s: s.replace("return signal * x_0", f"{REVEALED}\n        return signal * x_0"),
     "revealed: no points"),
])
def test_what_is_changed_refused_or_missing_is_said_in_a_sentence(change, says, tmp_path):
    (tmp_path / "diffusion.py").write_text(change(ours(FORWARD)))
    failed, said = grade.attempt(FORWARD, tmp_path, FORWARD.public)
    assert failed and says in said[0] if says else (failed, said) == ({}, [])  # ours
    with pytest.raises(grade.UserError, match="missing"):
        grade.read(FORWARD, tmp_path / "nowhere")


def test_a_lecturers_own_hidden_tests_count_with_the_hidden_ones(made, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/test_3_more.py").write_text("def test_false():\n    assert False\n")
    results = grade.grade(submit(tmp_path / "a", FORWARD, base=made), tmp_path,
                          tmp_path / "hidden")
    assert results["score"] == pytest.approx(0.7 * 4 + 0.3 * 4 / 2)
    assert main(["gradescope", str(tmp_path / "g.zip"), "--hidden", str(tmp_path / "hidden")]) == 0
    assert main(["gradescope", str(tmp_path / "g2.zip"), "--hidden", str(tmp_path / "typo")]) == 2
    assert main(["gradescope", str(tmp_path / "g.zip"), "--hidden", str(tmp_path / "hidden")]) == 0
    assert main(["grade", str(tmp_path / "a"), str(tmp_path), "--hidden", "typo"]) == 2
    names = zipfile.ZipFile(tmp_path / "g.zip").namelist()
    assert {"setup.sh", "run_autograder", "hidden/test_3_more.py", "diffusion.py"} <= set(names)


# --- what is written, the student's commands ------------------------------------------------------


def test_a_student_checks_waits_gets_a_hint_reveals_and_then_has_the_companions(tmp_path, capsys):
    handout.handout(folder := tmp_path / "h")
    loss = EXERCISES[5]
    wrong = text_of(ours(loss), loss).replace(".flatten(1).mean(1)", ".mean()")
    submit(folder, loss, wrong, base=folder)
    code, out, err = python(
        folder, "-c", "from course.__main__ import main; main(['check', '6', '8']); print([main("
        "['reveal', n]) for n in ('3', '4', '5', '8', '15')]); main(['check', '6', '8'])")
    assert out.splitlines()[:3] == [
        " 6 The loss: 0 of 3 tests pass, hint: one loss an example: do not average over them, "
        "waits for 3",
        " 8 Ancestral sampling: 0 of 3 tests pass, not begun", "[0, 0, 0, 0, 2]"], err
    assert "not so: loss is one mean squared error" in out and "Size([])" in out
    assert "8 Ancestral sampling: 3 of 3 tests pass, revealed: no points" in out
    assert "Unfinished" not in text_of((folder / "manipulate.py").read_text(), handout.replace(
        EXERCISES[7], function="resample"))
    (results,) = [row for row in grade.grade(folder, tmp_path)["tests"] if row["name"][0] == "8"]
    assert results["score"] == 0 and "revealed" in results["output"]


def test_every_command_that_is_written_parses(made, monkeypatch):
    class Parsed(BaseException):
        pass

    def parse(self, argv):
        real(self, argv)
        raise Parsed

    real, seen = tools.Parser.parse_args, 0
    monkeypatch.setattr(tools.Parser, "parse_args", parse)
    monkeypatch.chdir(made)
    for path in (made / "ASSIGNMENT.md", *(ROOT / f for f in (
            "docs/exercises.md", "docs/teaching.md", "README.md"))):
        text = path.read_text().replace("STAGE", "decoder").replace("SEED", "1")
        for line in re.findall(r"(?:^|`|&& )python ((?:\w+\.py|-m ).*?)(?=`| && |#|$)", text, re.M):
            words = shlex.split(line)
            name = words[1] if words[0] == "-m" else words[0][:-3]
            if name in ("pytest", "venv"):
                continue
            module = importlib.import_module("course.__main__" if name == "course" else name)
            with pytest.raises(Parsed):
                module.main(words[2 if words[0] == "-m" else 1:])
            seen += 1
    assert seen > 30


def test_the_notebook_runs_with_the_solution_in_place(tmp_path):
    handout.handout(folder := tmp_path / "h")
    for e in SOLVABLE:
        submit((folder / e.file).parent, e, base=folder)
    cells = json.loads((folder / "assignment.ipynb").read_text())["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert sum("check" in cell for cell in code) == len(EXERCISES)
    script = "\n".join(code).replace("%pip", "# %pip")
    checked = [e for e in SOLVABLE if e.figure][:1]  # two seconds each; graded in another test
    script = re.sub(r'main\(\["check", "(\d+)"\]\)', lambda line: line[0] * (
        int(line[1]) in [e.number for e in checked]), script)
    quick = ("import functools, sample\n"
             "sample.Pipeline.decode = functools.partialmethod(sample.Pipeline.decode, steps=2)\n")
    (folder / "cells.py").write_text(quick + "\n".join(dict.fromkeys(script.splitlines())))
    code, out, err = python(folder, "-c", "exec(open('cells.py').read())")  # no file, as there
    for e in checked:
        assert f"{e.number:2} {e.name}: {len(e.public)} of {len(e.public)} tests pass\n" in out, err
    assert {e.file for e in EXERCISES} < set(zipfile.ZipFile(folder / "submission.zip").namelist())
