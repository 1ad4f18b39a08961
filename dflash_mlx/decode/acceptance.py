"""Which proposals the target agrees with, and the token that follows them.

Each rule is exact: greedy gives the target's argmax chain, the others leave the target's own
sampling distribution unchanged, whatever the draft proposes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from dflash_mlx.decode.phases import phase
from dflash_mlx.decode.sampling import Sampler, VisibleSampler
from dflash_mlx.draft import Proposals

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass
class Verdict:
    """What one verify decided.

    Attributes:
        tokens: the accepted proposals and the bonus token, n + 1 ids.
        logprobs: [>= n + 1, V]; row i is what token i was chosen from, before the sampler.
    """

    tokens: list[int]
    logprobs: mx.array

    @property
    def accepted(self) -> int:
        """How many proposals were accepted."""
        return len(self.tokens) - 1


class AcceptanceRule(Protocol):
    """Judges proposals [m] by the target's logits [m + 1, V]."""

    def judge(self, logits: mx.array, proposals: Proposals, tokens: mx.array | None) -> Verdict:
        """Synchronises with the device.

        Args:
            logits: [m + 1, V]; row i follows the anchor (i = 0) or proposal i - 1.
            proposals: m of them.
            tokens: [n], what plain decoding would show a logits processor at row 0: the prompt
                and what was emitted, the anchor last; None without processors.
        """
        ...


def log_probabilities(logits: mx.array) -> mx.array:
    """Logits [n, V] -> log-probabilities, in the logits' dtype as mlx_lm computes them."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@phase("waiting")
def read(*arrays: mx.array) -> list[int]:
    """The integers of 1-d arrays, one after the other, in one synchronisation."""
    joined = arrays[0] if len(arrays) == 1 else mx.concatenate([a.astype(mx.int32) for a in arrays])
    return cast(list[int], joined.tolist())


def leading(agree: mx.array) -> mx.array:
    """How many entries of a boolean [m] are true before the first false one: [1] int32."""
    return mx.cumprod(agree.astype(mx.int32)).sum(keepdims=True)


class GreedyAcceptance:
    """A proposal is accepted when it is the target's own argmax."""

    def judge(self, logits: mx.array, proposals: Proposals, tokens: mx.array | None) -> Verdict:
        logprobs = log_probabilities(logits)
        choices = mx.argmax(logprobs, axis=-1).astype(mx.int32)
        n = leading(proposals.tokens == choices[:-1])
        count, *chosen = read(n, choices)
        return Verdict(chosen[: count + 1], logprobs)


class SpeculativeSampling:
    """Leviathan et al. 2023: accept d ~ q with probability min(1, p(d) / q(d))."""

    def __init__(self, sampler: VisibleSampler):
        self.sampler = sampler

    def judge(self, logits: mx.array, proposals: Proposals, tokens: mx.array | None) -> Verdict:
        logprobs = log_probabilities(logits)
        p = self.sampler.probabilities(logprobs)
        n, following = accept_or_resample(p, proposals)
        count, last, *proposed = read(n, following, proposals.tokens)
        return Verdict([*proposed[:count], last], logprobs)


def accept_or_resample(p: mx.array, proposals: Proposals) -> tuple[mx.array, mx.array]:
    """Speculative sampling over one block.

    Args:
        p: [m + 1, V] the target's distributions, float32.
        proposals: m tokens d_i drawn from q_i.

    Returns:
        n [1], how many proposals are accepted, and the token that follows them [1]: drawn from
        normalised (p_n - q_n)+ after a rejection, from p_m after none. Both int32.
    """
    d = proposals.tokens[:, None]
    m = d.shape[0]
    p_d = mx.take_along_axis(p[:m], d, axis=-1)[:, 0]
    n = leading(accepts(p_d, _q_of(d, proposals)))
    p_n = following_row(p, n)
    q_n = _q_row(mx.minimum(n, m - 1), proposals, p.shape[-1])
    following = mx.random.categorical(mx.log(mx.where(n < m, residual(p_n, q_n), p_n)))
    return n, following.astype(mx.int32)


def accepts(p_d: mx.array, q_d: mx.array) -> mx.array:
    """Whether each proposal passes, with probability min(1, p(d) / q(d)): boolean [m]."""
    return mx.random.uniform(shape=p_d.shape) * q_d < p_d


def following_row(p: mx.array, n: mx.array) -> mx.array:
    """The target's distribution behind the last accepted proposal: [1, V]."""
    return mx.take(p, n, axis=0)


def residual(p_n: mx.array, q_n: mx.array) -> mx.array:
    """(p - q)+, not normalised: what a rejection leaves to draw from.

    Rounding can leave nothing of it where the two are equal; p itself is right there.
    """
    left = mx.maximum(p_n - q_n, 0.0)
    return mx.where(left.sum() > 0, left, p_n)


def _q_of(d: mx.array, proposals: Proposals) -> mx.array:
    """q_i(d_i) for tokens d [m, 1]: [m]."""
    if proposals.q is None:
        return mx.ones(d.shape[0])
    if proposals.support is None:
        return mx.take_along_axis(proposals.q, d, axis=-1)[:, 0]
    return mx.where(proposals.support == d, proposals.q, 0.0).sum(axis=-1)


def _q_row(i: mx.array, proposals: Proposals, vocab: int) -> mx.array:
    """q_i as a dense row, for i [1]: [1, V]."""
    if proposals.q is not None and proposals.support is None:
        return mx.take(proposals.q, i, axis=0)
    if proposals.q is None:
        support, q = mx.take(proposals.tokens, i)[:, None], mx.ones((1, 1))
    else:
        support = mx.take(cast(mx.array, proposals.support), i, axis=0)
        q = mx.take(proposals.q, i, axis=0)
    return mx.put_along_axis(mx.zeros((1, vocab)), support, q, axis=-1)


class RowByRow:
    """For logits processors and opaque samplers, which may keep state or draw once per call.

    Both are called as plain decoding calls them: one row [1, V] at a time, in order, with plain
    decoding's token history, and never for a row after the first rejection. A visible sampler
    still accepts by the ratio p / q, any other by equality with the token that it draws.
    """

    def __init__(self, sampler: Sampler, processors: Sequence[LogitsProcessor]):
        self.sampler = sampler
        self.processors = processors

    def judge(self, logits: mx.array, proposals: Proposals, tokens: mx.array | None) -> Verdict:
        proposed = read(proposals.tokens)
        m, known = len(proposed), 0 if tokens is None else tokens.shape[0]
        history = None if tokens is None else mx.concatenate([tokens, mx.array(proposed)])
        rows: list[mx.array] = []
        chosen: list[int] = []
        for i in range(m + 1):
            row = logits[i : i + 1]
            for process in self.processors:
                row = process(cast(mx.array, history)[: known + i], row)
            rows.append(log_probabilities(row))
            if i < m and isinstance(self.sampler, VisibleSampler):
                accepted, token = self._test(self.sampler, rows[-1], proposals, i)
            else:
                (token,) = read(self.sampler(rows[-1]))
                accepted = i < m and token == proposed[i]
            chosen.append(token)
            if not accepted:
                break
        return Verdict(chosen, mx.concatenate(rows))

    @staticmethod
    def _test(
        sampler: VisibleSampler, row: mx.array, proposals: Proposals, i: int
    ) -> tuple[bool, int]:
        one = Proposals(
            proposals.tokens[i : i + 1],
            None if proposals.q is None else proposals.q[i : i + 1],
            None if proposals.support is None else proposals.support[i : i + 1],
        )
        p = sampler.probabilities(row)
        n, following = accept_or_resample(mx.concatenate([p, p]), one)
        accepted, token, proposed = read(n, following, one.tokens)
        return bool(accepted), proposed if accepted else token


def acceptance_rule(
    sampler: Sampler | None, processors: Sequence[LogitsProcessor] | None
) -> AcceptanceRule:
    """The rule that is exact for a sampler and makes the most of what is known of it."""
    sampler = sampler or greedy_sampler
    if processors:
        return RowByRow(sampler, processors)
    if sampler is greedy_sampler:
        return GreedyAcceptance()
    if isinstance(sampler, VisibleSampler):
        return SpeculativeSampling(sampler)
    return RowByRow(sampler, ())
