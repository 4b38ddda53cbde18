"""The course's commands: `python -m course --help`."""

import sys

from course import grade, handout, parts
from course.exercises import EXERCISES
from support.sheets import check_folder, file_ending
from support.tools import Parser, number, user_errors

LAST = len(EXERCISES)
exercise = number(int, 1, LAST, f"the number of an exercise, 1 to {LAST}")


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
        if name == "check":
            add("exercises", nargs="*", type=exercise, help="numbers (default: all)")
        if name == "reveal":
            add("exercise", type=exercise, help="its number")
        if name == "grade":
            add("submission", help="folder of a student's files")
        if out:
            add("out", type=file_ending(".zip") if name == "gradescope" else check_folder, help=out)
        if name.startswith("grade"):
            add("--hidden", help="folder of more hidden tests: test_7_*.py for exercise 7")
    args = parser.parse_args(argv)
    if args.command == "handout":
        handout.handout(args.out)
    elif args.command == "check":
        grade.check([EXERCISES[n - 1] for n in args.exercises] or EXERCISES)
    elif args.command == "reveal":
        parts.reveal(EXERCISES[args.exercise - 1])
    elif args.command == "grade":
        print(grade.grade(args.submission, args.out, args.hidden)["score"])
    elif args.command == "gradescope":
        handout.archive(args.out, args.hidden)
    else:
        from course import figures  # the models, slow to import
        figures.draw(args.out)


if __name__ == "__main__":
    sys.exit(main())
