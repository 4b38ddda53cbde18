"""The part of a file that an exercise is about: find it, judge it, replace it. Nothing is run."""

import ast
import hashlib
import json
import re
import textwrap
import zlib
from dataclasses import replace

from course.exercises import ROOT
from support.tools import UserError

BEGINS, ENDS = "# Exercise begins.", "# Exercise ends."  # a region of a function
REVEALED = "# Revealed: no points."
ANSWERS = "course/reference.bin"  # in a handout, packed: nobody reads it by accident
REFUSED = set("""open fdopen load save savez fromfile tofile memmap mmap read_text read_bytes
    write_text write_bytes eval exec compile globals vars sys os inspect importlib pytest testing
    scaled_dot_product_attention""".split())


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
    node, first, end = span(source, exercise)
    found = [n for n in list(ast.walk(node))[1:]
             if isinstance(n, ast.stmt) and first < n.lineno <= end]
    nested = {inner for n in found for inner in list(ast.walk(n))[1:]}
    return ast.Module([n for n in found if n not in nested], [])


def put(source, exercise, text):
    """The file with other lines in the exercise's place, indented as those that were there."""
    _, first, end = span(source, exercise)
    lines = source.splitlines()
    indent = re.match(" *", next(line for line in lines[first:end] if line.strip())).group()
    lines[first:end] = textwrap.indent(text, indent).splitlines()
    return "\n".join(lines) + "\n"


def refused(tree):
    """Why these statements are not run, in a few words; None if they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "Unfinished":
            return "not begun"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return "refused: the body imports; use what the file imports already"
        for word in vars(node).values():  # names, attributes, strings
            if isinstance(word, str) and (word in REFUSED or word.startswith("__")):
                return f"refused: the body uses {word[:40]!r}, which no exercise needs"


def fingerprint(tree):
    """Equal for statements that differ in layout, comments and names of local variables only."""
    text, nodes = ast.unparse(tree), [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    for k, name in enumerate(dict.fromkeys(n.id for n in nodes if isinstance(n.ctx, ast.Store))):
        text = re.sub(rf"\b{name}\b", f"local{k}", text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hints(exercise):
    """{fingerprint: hint} of the known mistakes; a handout has it ready."""
    found, source = dict(exercise.hints), (ROOT / exercise.file).read_text()
    for old, new, hint in exercise.mistakes:
        wrong = put(source, exercise, text_of(source, exercise).replace(old, new))
        found[fingerprint(statements(wrong, exercise))] = hint
    return found


def blanks(exercise):
    """(file, part) of what a handout leaves blank: the exercise, and where its answer is used."""
    also = [(file, replace(exercise, function=name)) for file, name in exercise.also]
    return [(exercise.file, exercise), *also]


def restore(pieces, comment=""):
    """Put our own lines into the files of a handout, this one."""
    ours = json.loads(zlib.decompress((ROOT / ANSWERS).read_bytes()))
    for file, part in pieces:
        text = comment + text_of(ours[file], part)
        (ROOT / file).write_text(put((ROOT / file).read_text(), part, text))


def reveal(exercise):
    if not exercise.hints:
        raise UserError(f"{exercise.number}: there is no solution here to reveal")
    restore(blanks(exercise), f"{REVEALED}\n")
