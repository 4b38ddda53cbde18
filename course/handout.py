"""The handout: the repository without the solutions, in a plain folder; and what else is made."""

import ast
import json
import re
import zipfile
import zlib
from dataclasses import replace

from course.exercises import EXERCISES, ROOT
from course.grade import NEEDED, copy, hidden_tests
from course.parts import ANSWERS, blanks, hints, put, span, text_of
from support.tools import UserError

COPIED = ("*.py", "support/*.py", "lab/*.py", "course/*.py", "docs/pictures/*",
          "weights/shapes/*.pt", "tests/conftest.py", "tests/core/helpers.py", "requirements.txt",
          "pyproject.toml", "LICENSE")
KNOWN = "from support.tools import Unfinished\n"


def handout(out):
    """Write a new folder: stubs, public tests, ASSIGNMENT.md, answers.md, a notebook, weights."""
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    ours = {file: (ROOT / file).read_text() for e in EXERCISES for file, _ in blanks(e)}
    texts, text = dict(ours), assignment(ours)
    for e in EXERCISES:
        for file, part in blanks(e):
            later = f"# Appears when `python -m course check {e.number}` finds no mistake.\n"
            stub = later * (part != e) + f"raise Unfinished({e.number})"
            texts[file] = put(texts[file], part, stub)
            if KNOWN not in texts[file]:
                texts[file] = texts[file].replace("import torch\n", f"import torch\n{KNOWN}", 1)
    for file in {test.split("::")[0] for e in EXERCISES for test in e.public}:
        texts[file] = public_part(file)
    rows = [replace(e, hidden=(), mistakes=(), hints=hints(e)) for e in EXERCISES]
    table = (ROOT / "course/exercises.py").read_text().partition("def t(")[0]
    texts["course/exercises.py"] = (
        f"{table}EXERCISES = [\n" + "".join(f"    {row!r},\n" for row in rows) + "]\n")
    texts["ASSIGNMENT.md"] = text
    texts["answers.md"] = "\n\n".join(["# Answers", *re.findall("^### (Question.*)", text, re.M)])
    texts["assignment.ipynb"] = json.dumps(notebook(text), indent=1)
    copy(COPIED, out)
    for file, content in texts.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(content, encoding="utf-8")
    (out / ANSWERS).write_bytes(zlib.compress(json.dumps(ours).encode()))


def public_part(file):
    """A test file with its public tests, what they use, and no other test."""
    source = (ROOT / file).read_text()
    public = [test.partition("[")[0] for e in EXERCISES for test in e.public]
    lines, left, kept = source.splitlines(), {}, {}
    for n in ast.parse(source).body[1:]:
        first = min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", ()))])
        left[first] = "\n".join(lines[first - 1:n.end_lineno]) + "\n"
    wanted = r"import |from |pytestmark|@pytest.fixture\(autouse"
    while found := [k for k, text in left.items() if re.match(wanted, text) or any(
            f"{file}::{name}" in public for name in re.findall(r"^def (test_\w+)", text, re.M))]:
        kept |= {k: left.pop(k) for k in found}
        used = set(re.findall(r"\w+", " ".join(kept.values())))
        wanted = rf"(@.*\n)*(def |class )?({'|'.join(used)})\b( = |\(|:|,)"
    return "".join("\n\n" * text.startswith(("def ", "class ", "@")) + text
                   for _, text in sorted(kept.items()))


def assignment(texts):
    """ASSIGNMENT.md: course/assignment.md, and in it each exercise's facts and docstring."""
    text = (ROOT / "course/assignment.md").read_text()
    rows = ["| | exercise | points | minutes | where |", "|---|---|---|---|---|"]
    for e in EXERCISES:
        rows.append(f"| {e.number} | {e.name} | {e.points} | {e.minutes} | `{e.file}` |")
        lines = [line.strip() for line in text_of(texts[e.file], e).splitlines()]
        size = f", {sum(line[:1] not in ('', '#') for line in lines)} lines" * bool(e.mistakes)
        picture = f"\n![](docs/pictures/course_{e.figure}.png)\n" if e.figure else ""
        text = text.replace(f"### {e.number}\n", f"""\
### {e.number}. {e.name}

`{e.function}` in [{e.file}]({e.file}): {e.points} points, {e.minutes} minutes{size}.

```
{ast.get_docstring(span(texts[e.file], e)[0])}
```
{picture}
""")
    return text.replace("{table}", "\n".join(rows))


def archive(out, hidden=None):
    """A zip for Gradescope: the repository, and the two scripts that it runs."""
    tests = hidden_tests(hidden)
    with zipfile.ZipFile(out, "w") as file:
        for pattern in (*NEEDED, "requirements.txt"):
            for path in ROOT.glob(pattern):
                file.write(path, path.relative_to(ROOT))
        for name in ("setup.sh", "run_autograder"):
            file.write(ROOT / "course" / name, name)
        for path in tests:
            file.write(path, f"hidden/{path.name}")


def notebook(text):
    """A thin notebook, made from ASSIGNMENT.md: a check and a figure for each exercise."""
    def cell(kind, source, **more):
        cells.append({"cell_type": kind, "metadata": {}, "source": source, **more})

    cells, empty = [], {"outputs": [], "execution_count": None}
    cell("code", """\
%pip install -q -r requirements.txt
from course.__main__ import main
from course.figures import figure
from course.handout import hand_in""", **empty)
    for block in re.split(r"^(?=###? )", text, flags=re.M):
        cell("markdown", block)
        if number := re.match(r"### (\d+)\.", block):
            e = EXERCISES[int(number[1]) - 1]
            show = f'\nfigure("{e.figure}")' if e.figure else ""
            cell("code", f'main(["check", "{e.number}"]){show}', **empty)
    cell("code", 'hand_in("submission.zip")', **empty)
    return {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": cells}


def hand_in(out):
    """Zip what is handed in: the files of the exercises, and the answers."""
    with zipfile.ZipFile(out, "w") as file:
        for name in sorted({e.file for e in EXERCISES} | {"answers.md"}):
            file.write(ROOT / name, name)
