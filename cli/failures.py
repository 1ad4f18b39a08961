"""Whatever goes wrong in a command, as one sentence; the streams that it is said and written on."""

import codecs
import errno
import io
import os
import sys
from typing import Any

from dflash_mlx.errors import said


class _Closed(io.TextIOBase):
    """A stream that was closed before the program began: saying so is better than silence."""

    encoding = "utf-8"

    def __init__(self, name: str):
        self.name = name

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)


def ready_streams() -> None:
    """Make stdin, stdout and stderr such that every text can be written, and none is missing.

    What a narrower encoding than UTF-8 cannot write becomes a question mark, and what ASCII cannot
    read is read as UTF-8.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = _Closed("stdout")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if (
        isinstance(sys.stdin, io.TextIOWrapper)
        and codecs.lookup(sys.stdin.encoding).name == "ascii"
    ):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def reader_gone(error: Exception) -> bool:
    """Whether an error says that nobody reads our pipe any more."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def settle_stdout() -> None:
    """Write what stdout still holds; where that fails, so that Python's flush at exit does not."""
    try:
        sys.stdout.flush()
        return
    except (OSError, ValueError):
        pass
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # no file behind it
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def explained(error: Exception) -> str | None:
    """What is wrong where the surroundings are; None where it can only be our own fault."""
    if not _has_working_directory():
        return "The working directory has been removed; change to one that is there."
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return "Memory ran out; close other programs, or choose a smaller model or shorter texts."
    if "temp_directory_path" in str(error):  # MLX's own compiler, which looks nowhere else
        place = os.environ.get("TMPDIR", "/tmp")
        return f"There is no directory for temporary files at {place}; set TMPDIR to one."
    if isinstance(error, OSError) and error.errno is not None:
        reason = "it is closed" if error.errno == errno.EBADF else os.strerror(error.errno)
        if error.filename is not None:
            return f"{_named(error.filename)} cannot be used: {reason}."
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EBADF):
            return f"The output cannot be written: {reason}."
        return f"The system refused something: {reason}."
    return None


def _named(filename: Any) -> str:
    name = os.fsdecode(filename) if isinstance(filename, (str, bytes)) else str(filename)
    return name if len(name) <= 300 else f"{name[:300]}…"


def _out_of_memory(error: Exception) -> bool:
    """MLX says so in a RuntimeError, in words that depend on the device."""
    text = said(error)
    return isinstance(error, RuntimeError) and (
        "Unable to allocate" in text or "bad_alloc" in text or "Insufficient Memory" in text
    )


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
