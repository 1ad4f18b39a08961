"""Running the command line as a user does: in this process, in another, and in a terminal."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from typer.testing import CliRunner, Result

from dflash_mlx.cli import app

PROGRAM = [sys.executable, "-c", "from dflash_mlx.cli import main; main()"]


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """The command line in this process; stdin is not a terminal."""
    return CliRunner().invoke(app, list(arguments), input=stdin, prog_name="dflash-mlx")


def spawn(
    arguments: Sequence[str], *, env: Mapping[str, str] | None = None, **options: object
) -> subprocess.Popen:
    """The command line as another process; its working directory is this one's."""
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
        **options,  # type: ignore[call-overload]
    )


def complaint(result: Result, code: int) -> str:
    """The one sentence of a command that failed with this exit code, without a traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("dflash-mlx: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]
