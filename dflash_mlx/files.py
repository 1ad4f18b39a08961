"""Small files that are written as a whole or not at all."""

import os
import tempfile
from pathlib import Path


def replace_file(file: Path, text: str) -> None:
    """Write a file so that no reader and no crash ever sees half of it.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
