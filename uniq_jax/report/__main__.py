"""The command that draws runs from their files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from uniq_jax.report.write import COMPARISON_FILE, write_comparison, write_report

_DESCRIPTION = """\
Draws a run, finished or not, into WORKDIR/report.html: one file that opens without a network.

    python -m uniq_jax.report WORKDIR
    python -m uniq_jax.report compare WORKDIR WORKDIR ... [--out FILE]

The second form draws several runs over one another, and their accuracy against their size.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    compares = arguments[:1] == ["compare"]
    parser = _comparison_parser() if compares else _report_parser()
    parsed = parser.parse_args(arguments[1:] if compares else arguments)
    try:
        if compares:
            written = [write_comparison(parsed.workdirs, parsed.out)]
        else:
            written = [write_report(workdir) for workdir in parsed.workdirs]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m uniq_jax.report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", metavar="WORKDIR", type=Path, nargs="+", help="of a run")
    return parser


def _comparison_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m uniq_jax.report compare",
        description="Draws the curves of several runs over one another, and accuracy against size.",
    )
    parser.add_argument("workdirs", metavar="WORKDIR", type=Path, nargs="+", help="of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path(COMPARISON_FILE),
        help=f"the page to write; by default {COMPARISON_FILE} in this directory",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
