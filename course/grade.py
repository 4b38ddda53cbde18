"""Checks and grades: the statements of a student, and the tests of an exercise.

The one idea: a function is graded inside the reference, with everyone else's code being right. So a
mistake costs the points of its own exercise and of no other.
"""

import ast
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from course.child import EARLY, run
from course.exercises import EXERCISES, ROOT
from course.parts import (
    REVEALED, blanks, fingerprint, hints, put, refused, restore, statements, text_of,
)
from support.tools import UserError

NEEDED = ("*.py", "support/*.py", "lab/*.py", "course/*.py", "tests/*/*.py")


def read(exercise, folder):
    """An exercise's file in a folder: its text and the exercise's statements."""
    name = Path(exercise.file).name
    found = sorted(Path(folder).rglob(name), key=lambda path: len(path.parts))
    try:
        source = found[0].read_text(encoding="utf-8")
        return source, statements(source, exercise)
    except IndexError:
        raise UserError(f"{name} is missing")
    except SyntaxError as e:
        raise UserError(f"{name} does not parse, line {e.lineno}: {e.msg}")
    except (ValueError, RecursionError, MemoryError, OSError) as e:
        raise UserError(f"{name} cannot be read: {type(e).__name__}")


def copy(patterns, folder):
    """Copy what matches from here into a folder."""
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        to = Path(folder) / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)


def attempt(exercise, submission, ids, inside=True, more=()):
    """({test: why it failed}, what else to say). A test has passed if all its cases ran and passed.

    inside: in a fresh copy of our code, else in the submission itself. more: test files to add.
    """
    try:
        source, tree = read(exercise, submission)
        revealed = ["revealed: no points"] * (REVEALED in text_of(source, exercise))
        if why := refused(tree) or inside and "".join(revealed):
            raise UserError(why)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if inside:
                copy(NEEDED, folder)
                text = put((ROOT / exercise.file).read_text(), exercise, ast.unparse(tree))
                (Path(folder) / exercise.file).write_text(text)
            for path in more:
                shutil.copyfile(path, Path(folder) / "tests/core" / path.name)
            reports, seconds = run(folder if inside else submission, ids)
    except (UserError, RecursionError) as e:
        return dict.fromkeys(ids, ""), [str(e)]
    said = revealed + ([] if seconds else [EARLY])
    failed, lost = {}, next((r[2] for r in reports if "::" not in r[0]), "it did not run")
    for test in ids:
        cases = [r for r in reports if r[0] == test or r[0].startswith(f"{test}[")]
        if broken := [r[2] for r in cases if r[1] != "passed"] or ([] if cases else [lost]):
            failed[test] = broken[0]
    hint = hints(exercise).get(fingerprint(tree))
    return failed, said + [f"hint: {hint}"] * bool(hint)


def sentences(failed, ids):
    """tests/core/test_x.py::test_it_is_so[3] -> "it is so[3]", and the cause below it."""
    for test in (test for test in ids if failed.get(test)):
        helper = "; the body alone is graded: helpers go into it" * ("NameError" in failed[test])
        yield f"   not so: {test.split('::test_')[1].replace('_', ' ')}"
        yield f"      {failed[test]}{helper}"


def check(exercises):
    """Run the public tests of a handout on its own files; print a line an exercise, then why."""
    for e in exercises:
        failed, said = attempt(e, ROOT, e.public, inside=False)
        if not failed and e.hints:
            restore(blanks(e)[1:])
        found = re.findall(r"exercise (\d+) is unfinished", " ".join(failed.values()))
        said += [f"waits for {n}" for n in sorted(set(found), key=int)]
        said.insert(0, f"{len(e.public) - len(failed)} of {len(e.public)} tests pass")
        print(f"{e.number:2} {e.name}: {', '.join(said)}")
        failed = {test: why for test, why in failed.items() if " is unfinished" not in why}
        for line in sentences(failed, e.public):
            print(line, flush=True)


def marks(e, submission, more):
    """An exercise's score, and what to say: public tests give 70% of the points, hidden ones 30%,
    each by the share that passes. more: files with hidden tests of the lecturer's."""
    hidden = e.hidden + tuple(
        f"tests/core/{path.name}::{name}" for path in more
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    failed, said = attempt(e, submission, e.public + hidden, more=more)
    passed = [sum(test not in failed for test in ids) for ids in (e.public, hidden)]
    share, counts = passed[0] / len(e.public), f"{passed[0]} of {len(e.public)} public tests"
    if hidden:
        share = 0.7 * share + 0.3 * passed[1] / len(hidden)
        counts += f", {passed[1]} of {len(hidden)} hidden tests"
    return round(e.points * share, 2), "\n".join([counts, *said, *sentences(failed, e.public)])


def hidden_tests(folder):
    """The files of hidden tests in a lecturer's folder, or none without one."""
    tests = sorted(Path(folder).glob("test_*.py")) if folder else []
    if folder and not tests:
        raise UserError(f"--hidden {folder}: has no test_*.py; check the path")
    return tests


def grade(submission, out, hidden=None):
    """Write OUT/results.json in Gradescope's format, whole again after each exercise.

    hidden: a folder with more hidden tests: test_7_*.py for exercise 7.
    """
    if any(e.hints for e in EXERCISES) or not Path(submission).is_dir():
        raise UserError(f"{submission}: must be a folder, graded in the repository, not a handout")
    tests = hidden_tests(hidden)
    start, path = time.time(), Path(out) / "results.json"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    rows = [{"name": f"{e.number}. {e.name}", "score": 0.0, "max_score": e.points,
             "output": "not graded"} for e in EXERCISES]
    path.parent.mkdir(parents=True, exist_ok=True)
    for row, e in zip(rows, EXERCISES):
        more = [test for test in tests if test.name.startswith(f"test_{e.number}_")]
        row["score"], row["output"] = marks(e, submission, more)
        results = {"score": round(sum(row["score"] for row in rows), 2), "tests": rows,
                   "execution_time": round(time.time() - start)}
        beside.write_text(json.dumps(results))
        os.replace(beside, path)
    return results
