"""Files that are written as a whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dflash_mlx.errors import DFlashError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A file to write beside `file`, of the same ending, which takes its place in the end.

    No reader and no crash ever sees half of `file`; where the block fails it stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(file.suffix, f".{file.name[:100]}.", file.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, _mode(file))
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def replace_file(file: Path, content: str | bytes) -> None:
    """Write a file as a whole, and make its directory; text as UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    # A lone surrogate, which no UTF-8 has, becomes the escape that JSON knows it by.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_bytes(data)


def write_result(file: Path, content: str | bytes) -> None:
    """`replace_file` where a user said; links are followed.

    What is there and is no regular file, as /dev/stdout, is written into as it is.

    Raises:
        DFlashError: it cannot be written; what was there before is whole.
    """
    try:
        file = file.resolve()
        if not file.parent.is_dir():
            raise DFlashError(f"{file} cannot be written: there is no directory {file.parent}.")
        if not file.exists() or file.is_file():
            replace_file(file, content)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
    except (OSError, ValueError) as error:
        raise _refused(file, error) from error


def check_writable(file: Path) -> None:
    """Find out before long work whether `write_result` could write its result.

    Raises:
        DFlashError: there is no such directory, it is one itself, or the system refuses.
    """
    try:
        folder = file.absolute().parent
        if not folder.is_dir():
            raise DFlashError(f"{file} cannot be written: there is no directory {folder}.")
        if file.is_dir():
            raise DFlashError(f"{file} cannot be written: it is a directory.")
        if not file.exists() or file.is_file():
            tempfile.TemporaryFile(dir=file.resolve().parent).close()
    except (OSError, ValueError) as error:
        raise _refused(file, error) from error


def _refused(file: Path, error: Exception) -> DFlashError:
    # A ValueError is a name with a zero byte in it, or a DFlashError that says all already.
    if isinstance(error, DFlashError):
        return error
    reason = error.strerror if isinstance(error, OSError) else error
    return DFlashError(f"{file} cannot be written: {reason}.")


def _mode(file: Path) -> int:
    """The permissions of the file that is there, or those that a new one would get."""
    if file.exists():
        return file.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
