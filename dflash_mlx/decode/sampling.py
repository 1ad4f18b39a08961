"""Samplers that draw with given keys, for many rows at once, and the draft's use of them."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx_lm.sample_utils as mlx_lm_samplers

from dflash_mlx.decode.randomness import Draws
from dflash_mlx.errors import DFlashError
from dflash_mlx.propose import Proposals

Sampler = Callable[[mx.array], mx.array]
Filter = Callable[[mx.array, mx.array], mx.array]


class KeyedSampler:
    """mlx_lm's sampler chain, which can also draw many tokens ahead with keys of their own."""

    def __init__(
        self,
        temp: float,
        top_p: float,
        min_p: float,
        min_tokens_to_keep: int,
        top_k: int,
        xtc_probability: float,
        xtc_threshold: float,
        xtc_special_tokens: list[int] | None,
    ):
        self.temp = temp
        self._top_k, self._special = top_k, xtc_special_tokens or []
        self._least = min_tokens_to_keep if min_p else 0
        self._draw = mlx_lm_samplers.make_sampler(
            temp,
            top_p,
            min_p,
            min_tokens_to_keep,
            top_k,
            xtc_probability,
            xtc_threshold,
            xtc_special_tokens,
        )
        # XTC tosses its coin before the token is drawn.
        self.draws_per_token = 2 if xtc_probability > 0.0 else 1
        self._filters: list[Filter] = []
        if 0 < top_p < 1.0:
            self._filters.append(lambda x, _: mlx_lm_samplers.apply_top_p(x, top_p))
        if min_p != 0.0:
            self._filters.append(
                lambda x, _: mlx_lm_samplers.apply_min_p(x, min_p, min_tokens_to_keep)
            )
        if xtc_probability > 0.0:
            self._filters.append(_xtc(xtc_probability, xtc_threshold, xtc_special_tokens or []))
        if top_k > 0:
            self._filters.append(lambda x, _: mlx_lm_samplers.apply_top_k(x, top_k))

    def check_vocabulary(self, size: int) -> None:
        """Refuse what a vocabulary of this size has no tokens for, where MLX fails or reads beyond.

        Raises:
            DFlashError: top-k leaves out nothing, or a token that XTC shall spare is none.
        """
        if self._top_k >= size:
            raise DFlashError(
                f"top_k is {self._top_k}, but the model has only {size} tokens; give fewer, or 0 "
                "for all."
            )
        if self._least > size:
            raise DFlashError(
                f"min_tokens_to_keep is {self._least}, but the model has only {size} tokens; give "
                "fewer."
            )
        if any(not 0 <= token < size for token in self._special):
            raise DFlashError(f"xtc_special_tokens go from 0 to {size - 1} for this model.")

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw as mlx_lm does, from MLX's random state: log-probabilities [B, V] -> tokens [B]."""
        return self._draw(logprobs)

    def filtered(self, logprobs: mx.array, uniform: mx.array) -> mx.array:
        """What of each row may be drawn at all; the rest is -inf: [n, V] -> [n, V].

        Args:
            logprobs: untempered log-probabilities.
            uniform: [n, draws_per_token], each row's numbers; XTC tosses its coin with the first.
        """
        for apply in self._filters:
            logprobs = apply(logprobs, uniform)
        return logprobs

    def ahead(self, logprobs: mx.array, draws: Draws, depths: mx.array | None = None) -> mx.array:
        """The next tokens [n], each drawn from its row [n, V] with its own keys.

        Row by row, and `draws` moved in between, they would be the same. Where `depths` [n] are
        given, each less than n, row i is drawn with the keys of the depths[i]th token to come.
        """
        n = logprobs.shape[0]
        uniform = draws.uniform(n)
        if depths is not None:
            uniform = uniform[depths]
        logprobs = self.filtered(logprobs, uniform)
        if draws_by_inverse_cdf():
            return drawn(logprobs, uniform[:, -1], self.temp)
        keys = draws.keys(n) if depths is None else draws.keys(n)[depths]
        rows = [
            mx.random.categorical(logprobs[i : i + 1] * (1.0 / self.temp), key=keys[i, -1])
            for i in range(n)
        ]
        return mx.concatenate(rows)


@mx.compile
def drawn(logits: mx.array, uniform: mx.array, temp: float) -> mx.array:
    """Draw from each row of logits [n, V] with its own number from [0, 1), [n]: tokens [n].

    That is how `mx.random.categorical` draws from a single row: the token in whose share of the
    cumulative weights the number falls. From several rows at once it draws in another way.
    """
    logits = (logits * (1.0 / temp)).astype(mx.float32)
    most = logits.max(axis=-1, keepdims=True)
    weights = mx.where(mx.isinf(most), logits == most, mx.exp(logits - most))
    before = mx.cumsum(weights, axis=-1, inclusive=False)
    at = uniform[:, None] * weights.sum(axis=-1, keepdims=True)
    return (before <= at).sum(axis=-1) - 1


@cache
def draws_by_inverse_cdf() -> bool:
    """Whether this MLX draws from single rows as `drawn` does.

    Should another version draw otherwise, rows are drawn one by one, by MLX itself.
    """
    rows = 4 * mx.random.normal((32, 64), key=mx.random.key(0))
    keys = mx.random.split(mx.random.key(1), 32)
    want = [mx.random.categorical(rows[i : i + 1], key=keys[i]) for i in range(32)]
    uniform = mx.vmap(lambda key: mx.random.uniform(0, 1, key=key))(keys)
    return bool(mx.array_equal(drawn(rows, uniform, 1.0), mx.concatenate(want)).item())


def _xtc(probability: float, threshold: float, special: list[int]) -> Filter:
    """mlx_lm's `apply_xtc` with a coin for each row."""

    def apply(logprobs: mx.array, uniform: mx.array) -> mx.array:
        p = mx.softmax(logprobs, -1)
        above = mx.where(p > threshold, p, mx.inf)
        mask = p > above.min(axis=-1, keepdims=True)
        if special:
            mask[..., special] = False
        spared = uniform[:, :1] > probability
        return mx.where(spared, logprobs, mx.where(mask, -mx.inf, logprobs))

    return apply


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: list[int] | None = None,
) -> Sampler:
    """mlx_lm's `make_sampler`, argument for argument.

    At temperature 0 it is mlx_lm's greedy sampler. Above, the sampler draws what mlx_lm's would
    draw after the same seed; a block is judged in one go with it, and row by row with another.

    Raises:
        DFlashError: an argument that cannot be meant; mlx_lm ignores some, and fails on others
            once a token is drawn.
    """
    _check("temp", temp, math.inf)
    _check("top_p", top_p, 1)
    _check("min_p", min_p, 1)
    _check("xtc_probability", xtc_probability, 1)
    _check("xtc_threshold", xtc_threshold, 0.5)
    _check_count("min_tokens_to_keep", min_tokens_to_keep, 1)
    # As elsewhere, -1 and 0 both mean all tokens.
    _check_count("top_k", top_k, -1)
    if temp == 0:
        return mlx_lm_samplers.greedy_sampler
    return KeyedSampler(
        temp,
        top_p,
        min_p,
        min_tokens_to_keep,
        top_k,
        xtc_probability,
        xtc_threshold,
        xtc_special_tokens,
    )


def _check(name: str, value: Any, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == math.inf:
        upper = "" if most == math.inf else f" to {most:g}"
        raise DFlashError(f"{name} is {value!r:.40}; give a number from 0{upper}.")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DFlashError(f"{name} is {value!r:.40}; give a whole number from {max(least, 0)}.")


class Likeliest:
    """Proposes the likeliest token of each row."""

    def __call__(self, logits: mx.array, position: int = 0) -> Proposals:
        best = logits.max(axis=-1) - mx.logsumexp(logits, axis=-1)
        return Proposals(mx.argmax(logits, axis=-1), mx.exp(best.astype(mx.float32)))

    def among(self, position: int, scores: mx.array) -> tuple[mx.array, mx.array]:
        best = mx.argmax(scores)
        return best, mx.softmax(scores)[best]


class Drawn:
    """Draws proposals from the draft's own rows with the keys that the target's rows will have.

    Sharing what is drawn with makes the two agree often, without either knowing of the other
    (Daliri et al. 2024, drafter-invariant speculative decoding).
    """

    def __init__(self, sampler: KeyedSampler, draws: Draws):
        self.sampler, self.draws = sampler, draws

    def __call__(self, logits: mx.array, position: int = 0) -> Proposals:
        uniform = self.draws.uniform(position + logits.shape[0])[position:]
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = self.sampler.filtered(logprobs, uniform)
        tokens = drawn(logprobs, uniform[:, -1], self.sampler.temp)
        q = mx.softmax(logprobs * (1.0 / self.sampler.temp), axis=-1, precise=True)
        return Proposals(tokens, mx.take_along_axis(q, tokens[:, None], axis=-1)[:, 0])

    def among(self, position: int, scores: mx.array) -> tuple[mx.array, mx.array]:
        uniform = self.draws.uniform(position + 1)[position:, -1]
        chosen = drawn(scores[None], uniform, self.sampler.temp)[0]
        return chosen, mx.softmax(scores * (1.0 / self.sampler.temp))[chosen]
