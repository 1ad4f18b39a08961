"""Conversations in files."""

import json
from pathlib import Path
from typing import Any

from dflash_mlx.conversation.template import Message
from dflash_mlx.errors import DFlashError
from dflash_mlx.files import write_result
from dflash_mlx.json_text import parse_json

_FORMAT = "dflash-mlx conversation"


def save(file: Path, messages: list[Message], **about: Any) -> None:
    """Write messages and what is `about` them (JSON values) to a file.

    Raises:
        DFlashError: it cannot be written.
    """
    content = {"format": _FORMAT, **about, "messages": messages}
    write_result(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load(file: Path) -> dict[str, Any]:
    """Read what `save` wrote: its `about` values and "messages".

    Raises:
        DFlashError: it cannot be read, or is something else.
    """
    try:
        content = parse_json(file.read_bytes())
    except FileNotFoundError as error:
        raise DFlashError(f"There is no file {file}.") from error
    except OSError as error:
        raise DFlashError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DFlashError(f"{file} is no saved conversation: it is not JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DFlashError(f"{file} is no saved conversation; /save writes one.")
    messages = content.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DFlashError(f"{file} is damaged: its messages cannot be read.")
    return content


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )
