"""Text from outside: read from files, and checked to be text before it is used."""

from pathlib import Path

from dflash_mlx.errors import DFlashError


def argument_text(argument: str) -> str:
    """An argument of a command as the UTF-8 it is, in a locale that knows ASCII alone as well.

    There Python keeps other bytes as surrogates. What is no UTF-8 stays as it is.
    """
    try:
        return argument.encode("ascii", "surrogateescape").decode()
    except UnicodeError:
        return argument


def check_text(text: str, what: str = "The text") -> str:
    """The same text, if every character of it can be encoded.

    Exported chats hold halves of emoji, and a command line may hold bytes of another encoding;
    Python keeps both as lone surrogates, which no tokenizer takes.

    Raises:
        DFlashError: one is there; the message says which and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        found = f"half of a character (U+{code:04X})"
        if 0xDC80 <= code <= 0xDCFF:
            found = f"a byte that is no UTF-8 (0x{code - 0xDC00:02X})"
        where = f"behind {before!r}" if before else "at its start"
        raise DFlashError(
            f"{what} has {found} {where}, at character {error.start + 1}; take it out or mend it."
        ) from error
    return text


def read_text(file: Path) -> str:
    """A file's text; a byte order mark before it is no harm.

    Raises:
        DFlashError: it cannot be read, is not UTF-8 or holds nothing.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise DFlashError(f"There is no file {file}.") from error
    except OSError as error:
        raise DFlashError(f"{file} cannot be read: {error.strerror or error}.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DFlashError(f"{file} is UTF-16; save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DFlashError(
            f"{file} is not UTF-8: line {line} has the byte 0x{data[error.start]:02X} at byte "
            f"{error.start}; save it as UTF-8."
        ) from error
    if not text.strip():
        raise DFlashError(f"{file} holds no text.")
    return text


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, and their numbers; only a line feed ends one.

    JSON strings may hold other characters that `splitlines` would cut at.
    """
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
