"""Where pages go: whole, or not at all."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from uniq_jax.report.comparison_page import comparison_page, names_of
from uniq_jax.report.files import read_run
from uniq_jax.report.run_page import run_page

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"


def write_report(workdir: Path) -> Path:
    """Draws a run, finished or not, into `WORKDIR/report.html`.

    The same files give the same page, byte for byte.

    Returns:
      The page's path.

    Raises:
      ValueError: if `workdir` is not a run's directory, or a file in it is not what it should be.
      OSError: if the page cannot be written.
    """
    path = workdir / REPORT_FILE
    _write(path, run_page(read_run(workdir)))
    return path


def write_comparison(workdirs: Sequence[Path], path: Path) -> Path:
    """Draws several runs into one page.

    Args:
      workdirs: two or more.
      path: of the page.

    Returns:
      `path`.

    Raises:
      ValueError: if there are fewer, or one is not a run's directory.
      OSError: if the page cannot be written.
    """
    if len(workdirs) < 2:
        raise ValueError(f"compare needs two runs or more, not {len(workdirs)}")
    runs = [read_run(workdir) for workdir in workdirs]
    _write(path, comparison_page(list(zip(names_of(workdirs), runs))))
    return path


def _write(path: Path, text: str) -> None:
    # In the same directory, as os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
