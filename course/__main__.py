"""The course's commands: `python -m course --help`."""

import sys

from course.exercises import EXERCISES, ROOT
from support.sheets import check_folder
from support.tools import Parser, UserError, user_errors


def exercise(text):
    """An argument's type: an exercise by its number."""
    found = [e for e in EXERCISES if str(e.number) == text]
    if not found:
        raise UserError(f"{text}: must be the number of an exercise, 1 to {len(EXERCISES)}")
    return found[0]


@user_errors
def main(argv=None):
    parser = Parser("python -m course", description="The assignment: made, checked, graded.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = {}
    for name, words in {
        "handout": "make the students' folder", "gradescope": "make the autograder's zip",
        "grade": "grade a submission: OUT/results.json", "figures": "draw the expected pictures",
        "check": "run the public tests here", "reveal": "see a solution, for its points",
    }.items():
        add[name] = commands.add_parser(name, help=words, description=words).add_argument
    add["grade"]("submission", help="folder with the student's files")
    for name in ("handout", "gradescope", "grade", "figures"):
        add[name]("out", type=check_folder, help="a .zip" if name == "gradescope" else "a folder")
    for name in ("gradescope", "grade"):
        add[name]("--hidden", help="folder of more hidden tests: test_7_*.py for exercise 7")
    add["check"]("exercises", nargs="*", type=exercise, help="their numbers (default: all)")
    add["reveal"]("exercise", type=exercise, help="its number")
    args = parser.parse_args(argv)

    from course import figures, grade, handout, parts
    if args.command == "handout":
        handout.handout(args.out)
    elif args.command == "gradescope":
        handout.archive(args.out, args.hidden)
    elif args.command == "grade":
        print(grade.grade(args.submission, args.out, args.hidden)["score"])
    elif args.command == "figures":
        figures.draw(args.out)
    elif args.command == "check":
        grade.check(args.exercises or EXERCISES, ROOT)
    elif not args.exercise.hints:
        raise UserError(f"{args.exercise.number}: there is no solution here to reveal")
    else:
        parts.restore(ROOT, parts.blanks(args.exercise), f"{parts.REVEALED}\n")


if __name__ == "__main__":
    sys.exit(main())
