"""The tokens that plain decoding chooses, from one row of logits or from many."""

from collections import deque
from typing import Any, cast

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from dflash_mlx.decode.randomness import Draws, RandomState, to_bits
from dflash_mlx.decode.sampling import Drawn, KeyedSampler, Likeliest, Sampler
from dflash_mlx.draft import Choice
from dflash_mlx.errors import DFlashError


class PlainChoice:
    """How plain decoding chooses the next tokens; this one takes the likeliest.

    Attributes:
        decided: tokens chosen so far for good. mlx_lm is one step ahead, so that at the end of a
            generation it has chosen one more than it emitted.
        at_once: whether it may be asked about rows that a rejection will leave unused.
    """

    at_once = True

    def __init__(self) -> None:
        self.decided = 0

    def __call__(self, logprobs: mx.array, depths: mx.array | None = None) -> mx.array:
        """Log-probabilities [n, V] -> tokens [n].

        Row i is chosen as if the tokens of the rows before it had been emitted; or, where `depths`
        [n] are given, as if depths[i] tokens had been.
        """
        return mx.argmax(logprobs, axis=-1)

    def move(self, count: int) -> None:
        """The first `count` tokens stand; where it is negative, the last ones do not after all."""
        self.decided += count


class KeyedChoice(PlainChoice):
    """Draws with the keys that plain decoding would use for the same tokens."""

    def __init__(self, sampler: KeyedSampler, state: RandomState):
        super().__init__()
        self.sampler, self.draws = sampler, Draws(state, sampler.draws_per_token)

    def __call__(self, logprobs: mx.array, depths: mx.array | None = None) -> mx.array:
        return self.sampler.ahead(logprobs, self.draws, depths)

    def move(self, count: int) -> None:
        super().move(count)
        self.draws.move(count)


class OpaqueChoice(PlainChoice):
    """Calls a sampler as plain decoding does, once a token: it may keep state, and it may draw."""

    at_once = False

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.sampler = sampler
        # MLX's random state behind the last calls.
        self._states: deque[mx.array] = deque(maxlen=64)

    def __call__(self, logprobs: mx.array, depths: mx.array | None = None) -> mx.array:
        """Log-probabilities [1, V] -> token [1].

        Raises:
            DFlashError: the sampler gave something else.
        """
        token = self.sampler(logprobs)
        _check(token, logprobs.shape[-1], look=not self._states)
        self._states.append(_state())
        return token

    def move(self, count: int) -> None:
        """Takes back what calls drew from MLX's random state, and nothing that a sampler keeps."""
        super().move(count)
        if count < 0 and mx.array_equal(_state(), self._states[-1]):
            for _ in range(-count):
                self._states.pop()
            mx.random.seed(to_bits(self._states[-1]))


def _check(token: Any, size: int, look: bool) -> None:
    """Refuse what is no token [1] of a vocabulary; `look` at its value, which is waited for."""
    if not isinstance(token, mx.array):
        found = f"a {type(token).__name__}"
    elif token.shape != (1,) or not mx.issubdtype(token.dtype, mx.integer):
        found = f"an array of shape {token.shape} and {str(token.dtype).removeprefix('mlx.core.')}"
    # Beyond the embedding's rows MLX reads whatever memory is there, or ends the process.
    elif look and not 0 <= int(cast(int, token.item())) < size:
        found = f"{token.item()}, and the model's tokens go from 0 to {size - 1}"
    else:
        return
    raise DFlashError(
        f"The sampler gave {found}; it is to give an MLX array of one token id for "
        "log-probabilities [1, V]."
    )


def _state() -> mx.array:
    return cast(mx.array, mx.random.state[0])  # type: ignore[index]


def plain_choice(sampler: Sampler | None, state: RandomState) -> PlainChoice:
    """The choice that a sampler stands for; None is greedy."""
    if sampler is None or sampler is greedy_sampler:
        return PlainChoice()
    if isinstance(sampler, KeyedSampler):
        return KeyedChoice(sampler, state)
    return OpaqueChoice(sampler)


def draft_choice(choice: PlainChoice, sampled: bool) -> Choice:
    """How a draft's tokens are taken: the likeliest, or drawn with the keys of the plain choice.

    Args:
        sampled: whether they are to be drawn, where the plain choice has keys.
    """
    if sampled and isinstance(choice, KeyedChoice):
        return Drawn(choice.sampler, choice.draws)
    return Likeliest()
