"""Which token a new draft's blocks are masked with: one that no text holds."""

import re
from collections.abc import Iterator

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.errors import DFlashError

_MASKS = ("<|mask|>", "<mask>", "[MASK]", "<|mask_token|>")
# Tokens that a vocabulary keeps free, as families name them.
_FREE = re.compile(r"reserved|unused|placeholder|dummy|extra_|SPECIAL_\d|pad_id|fim_pad", re.I)


def mask_token(vocab_size: int, tokenizer: TokenizerWrapper, wanted: str | None = None) -> int:
    """The id of a token to mask with, below vocab_size.

    Without a wish it is, of those that there are, the first of: the tokenizer's mask, an unused row
    of the embedding, padding, a reserved token, a special token that neither ends texts nor stands
    in the chat template.

    Args:
        vocab_size: rows of the target's embedding.
        tokenizer: the target's.
        wanted: a token or its id.

    Raises:
        DFlashError: what is wanted is no such token, or there is none.
    """
    if wanted is not None:
        return _named(wanted, vocab_size, tokenizer)
    found = next(mask_tokens(vocab_size, tokenizer), None)
    if found is not None:
        return found
    raise DFlashError(
        "The tokenizer has neither a mask token, nor padding, an unused id or a special token to "
        "spare, so the draft's blocks cannot be masked; name a token that texts do not hold with "
        "--mask-token."
    )


def mask_tokens(vocab_size: int, tokenizer: TokenizerWrapper) -> Iterator[int]:
    """The ids below vocab_size that would do, each once, in the order of `mask_token`."""
    given = set(tokenizer.eos_token_ids)
    for found in _candidates(tokenizer):
        if found is not None and 0 <= found < vocab_size and found not in given:
            given.add(int(found))
            yield int(found)


def _named(wanted: str, vocab_size: int, tokenizer: TokenizerWrapper) -> int:
    vocabulary = tokenizer.get_vocab()
    found = vocabulary.get(wanted)
    if found is None and wanted.isdecimal() and len(wanted) < 10:
        found = int(wanted)
    if found is None or found >= vocab_size:
        raise DFlashError(
            f"{wanted!r} is no token of the target; give one token or an id below {vocab_size} to "
            "--mask-token."
        )
    if found in tokenizer.eos_token_ids:
        raise DFlashError(
            f"{wanted!r} ends the target's texts, so it cannot mask; give another --mask-token."
        )
    return int(found)


def _candidates(tokenizer: TokenizerWrapper) -> Iterator[int | None]:
    inner, vocabulary = tokenizer._tokenizer, tokenizer.get_vocab()
    yield getattr(inner, "mask_token_id", None)
    yield from (vocabulary.get(name) for name in _MASKS)
    yield max(vocabulary.values()) + 1
    yield getattr(inner, "pad_token_id", None)
    template = inner.chat_template
    written = template if isinstance(template, str) else str(template or "")
    used = {getattr(inner, name, None) for name in ("bos_token_id", "unk_token_id")}
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    spare = [(name, i) for name, i in added if i not in used and name not in written]
    yield from (i for name, i in spare if _FREE.search(name))
    special = set(getattr(inner, "all_special_ids", ()))
    decoder = getattr(inner, "added_tokens_decoder", {})
    special |= {i for i, token in decoder.items() if getattr(token, "special", False)}
    yield from (i for _, i in reversed(spare) if i in special)
