"""JSON as people's files have it: with a byte order mark, or not JSON at all."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; a byte order mark before it is no harm.

    Raises:
        ValueError: it is no JSON; the message says why, and where that is known.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except ValueError as error:
        # Python refuses to make a number of some thousands of digits.
        raise ValueError("it has a number of too many digits") from error
