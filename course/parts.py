"""The part of a file that an exercise is about: find it, judge it, replace it. Nothing is run."""

import ast
import hashlib
import json
import re
import textwrap
import zlib
from dataclasses import replace
from pathlib import Path

from support.tools import UserError

BEGINS, ENDS = "# Exercise begins.", "# Exercise ends."  # a region of a function
REVEALED = "# Revealed: no points."
ANSWERS = "course/reference.bin"  # in a handout, packed: nobody reads it by accident
FILES = {"open", "fdopen", "load", "save", "savez", "fromfile", "tofile", "memmap", "mmap",
         "read_text", "read_bytes", "write_text", "write_bytes"}
PYTHON = {"eval", "exec", "compile", "globals", "vars", "sys", "os", "inspect", "importlib"}
PYTHON |= {"testing", "scaled_dot_product_attention"}


def span(source, exercise):
    """The function's syntax tree (if defined twice, the last counts), and where the exercise's
    lines are: source.splitlines()[first:end]."""
    node, lines = ast.parse(source), source.splitlines()
    for name in exercise.function.split("."):
        node = next((n for n in reversed(getattr(node, "body", ()))
                     if getattr(n, "name", None) == name), None)
    if not hasattr(node, "body"):
        raise UserError(f"{exercise.function} is not there: keep every function of the handout")
    documented = ast.get_docstring(node) is not None
    first = node.body[0].end_lineno if documented else node.body[0].lineno - 1
    if not exercise.region:
        return node, first, node.end_lineno
    marks = [k for k in range(first, len(lines)) if lines[k].strip() in (BEGINS, ENDS)][:2]
    if [lines[k].strip() for k in marks] != [BEGINS, ENDS]:
        raise UserError(f'{exercise.function}: keep the comments "{BEGINS}" and "{ENDS}"')
    return node, marks[0] + 1, marks[1]


def text_of(source, exercise):
    """The exercise's lines, without their indentation."""
    _, first, end = span(source, exercise)
    return textwrap.dedent("\n".join(source.splitlines()[first:end]))


def statements(source, exercise):
    """The exercise's statements as a syntax tree, without a docstring."""
    if exercise.region:
        return ast.parse(text_of(source, exercise))
    node = span(source, exercise)[0]
    return ast.Module(node.body[ast.get_docstring(node) is not None:], [])


def put(source, exercise, text):
    """The file with other lines in the exercise's place, indented as those that were there."""
    _, first, end = span(source, exercise)
    lines = source.splitlines()
    indent = re.match(" *", next(line for line in lines[first:end] if line.strip())).group()
    lines[first:end] = textwrap.indent(text, indent).splitlines()
    return "\n".join(lines) + "\n"


def unfinished(tree):
    return any(isinstance(n, ast.Name) and n.id == "Unfinished" for n in ast.walk(tree))


def refused(tree):
    """Why these statements are not run, in one sentence; None if they are."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return "refused: the body imports; use what the file imports already"
        words = [x for x in vars(node).values() if isinstance(x, str)]  # names, attributes, strings
        for word in words:
            if isinstance(node, ast.Constant) and "pytest" not in word.lower():
                continue
            if word in FILES:
                return f"refused: the body uses {word!r}; it may not open files"
            if word in PYTHON or "pytest" in word.lower() or word.startswith("__"):
                return f"refused: the body uses {word[:40]!r}; it may not look at tests or behind"
    return None


def fingerprint(tree):
    """Equal for statements that differ in layout, comments and names of local variables only."""
    text, nodes = ast.unparse(tree), [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    for k, name in enumerate(dict.fromkeys(n.id for n in nodes if isinstance(n.ctx, ast.Store))):
        text = re.sub(rf"\b{name}\b", f"local{k}", text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hints(exercise, source):
    """{fingerprint: hint} of the known mistakes in our `source`; a handout has it ready."""
    if exercise.hints:
        return exercise.hints
    wrong = {hint: put(source, exercise, text_of(source, exercise).replace(old, new))
             for old, new, hint in exercise.mistakes}
    return {fingerprint(statements(text, exercise)): hint for hint, text in wrong.items()}


def blanks(exercise):
    """(file, part) of what a handout leaves blank: the exercise, and where its answer is used."""
    also = [(file, replace(exercise, function=name)) for file, name in exercise.also]
    return [(exercise.file, exercise), *also]


def restore(folder, pieces, comment=""):
    """Put our own lines into the files of a handout."""
    ours = json.loads(zlib.decompress((Path(folder) / ANSWERS).read_bytes()))
    for file, part in pieces:
        path, text = Path(folder) / file, text_of(ours[file], part)
        path.write_text(put(path.read_text(), part, comment + text))
