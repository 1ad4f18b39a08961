"""Samplers whose distribution speculative sampling can see."""

from collections.abc import Callable

import mlx.core as mx
import mlx_lm.sample_utils as mlx_lm_samplers

from dflash_mlx.draft import Proposals

Sampler = Callable[[mx.array], mx.array]


class VisibleSampler:
    """mlx_lm's sampler chain, which also tells the distribution that it draws from."""

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
        self._filters: list[Callable[[mx.array], mx.array]] = []
        if 0 < top_p < 1.0:
            self._filters.append(lambda x: mlx_lm_samplers.apply_top_p(x, top_p))
        if min_p != 0.0:
            self._filters.append(
                lambda x: mlx_lm_samplers.apply_min_p(x, min_p, min_tokens_to_keep)
            )
        if xtc_probability > 0.0:
            special = xtc_special_tokens or []
            self._filters.append(lambda x: _xtc(x, xtc_probability, xtc_threshold, special))
        if top_k > 0:
            self._filters.append(lambda x: mlx_lm_samplers.apply_top_k(x, top_k))

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draw as mlx_lm does: log-probabilities [B, V] -> tokens [B]."""
        return self._draw(logprobs)

    def probabilities(self, logprobs: mx.array) -> mx.array:
        """The distribution that a call draws from, for each row on its own.

        Where XTC is on, its coin is tossed once per row, and the row's distribution is the one
        that the coin left.

        Args:
            logprobs: [n, V] untempered log-probabilities.

        Returns:
            [n, V] float32, each row summing to one.
        """
        for apply in self._filters:
            logprobs = apply(logprobs)
        return mx.softmax(logprobs.astype(mx.float32) * (1.0 / self.temp), axis=-1, precise=True)


def _xtc(logprobs: mx.array, probability: float, threshold: float, special: list[int]) -> mx.array:
    heads = mx.random.uniform(shape=(logprobs.shape[0], 1)) <= probability
    # With probability one, mlx_lm's own coin always falls the same way.
    return mx.where(heads, mlx_lm_samplers.apply_xtc(logprobs, 1.0, threshold, special), logprobs)


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
    draw, and speculative sampling accepts more of the draft's proposals through it than through
    one whose distribution is hidden.
    """
    if temp == 0:
        return mlx_lm_samplers.greedy_sampler
    return VisibleSampler(
        temp,
        top_p,
        min_p,
        min_tokens_to_keep,
        top_k,
        xtc_probability,
        xtc_threshold,
        xtc_special_tokens,
    )


class Likeliest:
    """Proposes the likeliest token of each row; q is one-hot."""

    temperature = 0.0

    def __call__(self, logits: mx.array) -> Proposals:
        best = logits.max(axis=-1) - mx.logsumexp(logits, axis=-1)
        return Proposals(mx.argmax(logits, axis=-1), confidence=mx.exp(best.astype(mx.float32)))


class Drawn:
    """Draws proposals from the draft's own rows through the target's sampler; q is full."""

    def __init__(self, sampler: VisibleSampler):
        self.sampler = sampler
        self.temperature = sampler.temp

    def __call__(self, logits: mx.array) -> Proposals:
        logits = logits.astype(mx.float32)
        q = self.sampler.probabilities(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        drawn = mx.random.categorical(mx.log(q))
        confidence = mx.take_along_axis(q, drawn[:, None], axis=-1)[:, 0]
        return Proposals(drawn, q, confidence=confidence)
