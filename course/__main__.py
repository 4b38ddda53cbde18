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
    for name, words, out in (
            ("handout", "make the students' folder", "a new folder"),
            ("check", "run the public tests on the files here", None),
            ("reveal", "put a solution here; its points are gone", None),
            ("figures", "draw the expected pictures", "a folder"),
            ("grade", "grade a submission: results.json", "a folder"),
            ("gradescope", "make the autograder", "a .zip")):
        add = commands.add_parser(name, help=words, description=words).add_argument
        if name == "grade":
            add("submission", help="folder of a student's files")
        if name in ("check", "reveal"):
            add("exercises", nargs="*" if name == "check" else 1, type=exercise, help="numbers")
        if out:
            add("out", type=check_folder, help=out)
        if name.startswith("grade"):
            add("--hidden", help="folder of more hidden tests: test_7_*.py for exercise 7")
    args = parser.parse_args(argv)
    from course import grade, handout, parts
    if args.command == "reveal":
        if not args.exercises[0].hints:
            raise UserError(f"{args.exercises[0].number}: there is no solution here to reveal")
        parts.restore(ROOT, parts.blanks(args.exercises[0]), f"{parts.REVEALED}\n")
    elif args.command == "grade":
        print(grade.grade(args.submission, args.out, args.hidden)["score"])
    elif args.command == "gradescope":
        handout.archive(args.out, args.hidden)
    elif args.command == "check":
        grade.check(args.exercises or EXERCISES, ROOT)
    elif args.command == "handout":
        handout.handout(args.out)
    else:
        from course import figures  # the models, slow to import
        figures.draw(args.out)


if __name__ == "__main__":
    sys.exit(main())
