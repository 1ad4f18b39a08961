"""Text to token ids and back, whatever the tokenizer makes of it."""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.errors import DFlashError, said
from dflash_mlx.texts import check_text


def encode_text(
    tokenizer: TokenizerWrapper, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a text.

    Raises:
        DFlashError: the tokenizer cannot; some mistakes in its files show only here. Or the text
            is none, see `check_text`.
    """
    check_text(text)
    try:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except Exception as error:
        # The tokenizer libraries raise whatever their code runs into.
        raise DFlashError(
            f"The target's tokenizer cannot encode this text: {said(error)}; if other texts fail, "
            "too, look at its tokenizer_config.json."
        ) from error


def add_token(detokenizer: Any, token: int) -> None:
    """Give a token that a target wrote to mlx_lm's detokenizer.

    Raises:
        DFlashError: it cannot take it; tokenizers have ids without a text now and then.
    """
    try:
        detokenizer.add_token(token)
    except Exception as error:
        # As when a text is encoded: whatever the library's code runs into.
        raise DFlashError(
            f"The target wrote token {token}, and its tokenizer has no text for it; its "
            "tokenizer.json is damaged or another model's."
        ) from error
