"""The DFlash decode loop: draft, verify, accept, commit (arXiv:2602.06036, section 3)."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import (
    generation_stream,
    maybe_quantize_kv_cache,
)

from dflash_mlx.decode.acceptance import (
    acceptance_rule,
    log_probabilities,
    read,
)
from dflash_mlx.decode.agreement import Agreement, Alone
from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.clock import CycleClock
from dflash_mlx.decode.emission import Emission, Token
from dflash_mlx.decode.feed import ContextFeed
from dflash_mlx.decode.guide import restrict
from dflash_mlx.decode.options import Options
from dflash_mlx.decode.phases import phase
from dflash_mlx.decode.plain import KeyedChoice, plain_choice
from dflash_mlx.decode.sampling import Drawn, Likeliest
from dflash_mlx.decode.statistics import Statistics
from dflash_mlx.draft import Choice, DFlashDraft
from dflash_mlx.errors import UnsupportedTarget
from dflash_mlx.policy import Cycle, Policy
from dflash_mlx.propose import Proposals
from dflash_mlx.target import TargetView, Transaction


@dataclass(frozen=True)
class Prefilled:
    """So many tokens of a prompt, of so many, have been run."""

    done: int
    total: int


class Decoder:
    """One generation over one sequence: `steps` is the algorithm, the other methods its parts.

    `cache.tokens` grows as tokens are emitted. However the generation ends, a cache that is kept
    then stands for exactly these tokens.
    """

    def __init__(
        self,
        view: TargetView,
        draft: DFlashDraft,
        cache: PromptCache,
        policy: Policy,
        options: Options,
        *,
        drafting: bool,
        keep_cache: bool,
        clock: CycleClock | None = None,
        agreement: Agreement | None = None,
    ):
        agreement = agreement or Alone()
        self.view, self.draft, self.cache = view, draft, cache
        self.policy, self.options, self.keep_cache = agreement.policy(policy), options, keep_cache
        self.statistics = Statistics()
        self.finished = False
        own = plain_choice(options.sampler, options.random_state)
        self._plain, self._agreed = agreement.choice(own), agreement.proposals
        self._rule = acceptance_rule(self._plain, options.logits_processors, options.stop_tokens)
        sampled = options.sample_proposals
        if sampled is None:
            sampled = draft.samples_proposals
        self._choose: Choice = Likeliest()
        if sampled and isinstance(own, KeyedChoice):
            self._choose = Drawn(own.sampler, own.draws)
        self._taps: Sequence[int] = draft.target_layer_ids if drafting or keep_cache else ()
        self._feed = ContextFeed(draft, cache.context)
        self._interrupts = agreement.interrupts()
        self._clock = clock or CycleClock()
        self._transaction: Transaction | None = None
        self._verified = self._most = 0
        self._taken = False
        # Tokens in the target's caches, and where a plain mlx_lm cache began.
        self._rows = self._history_start = self._text_start = len(cache.tokens)
        self._shift = cache.context.offset - self._rows

    def run(self, prompt: list[int], refill: Sequence[int] = ()) -> Generator[Token, None, None]:
        """Emit the continuation of a prompt, one token at a time.

        Args:
            prompt: ids that follow what the cache stands for; at least one.
            refill: ids to run before the prompt, for a cache that has to be filled again.
        """
        with closing(self.steps(prompt, refill)) as steps:
            for step in steps:
                if isinstance(step, Prefilled):
                    self.options.prompt_progress_callback(step.done, step.total)
                else:
                    yield from step

    def steps(
        self, prompt: list[int], refill: Sequence[int] = ()
    ) -> Generator[Prefilled | Iterator[Token], None, None]:
        """`run` in turns that another sequence may come between: prefill chunks, then cycles.

        A cycle's tokens come as an iterator that waits for the device. They are emitted as they are
        taken; a caller that takes fewer than all ends the generation.
        """
        with self._interrupts:
            try:
                refill = list(refill)
                self._history_start += len(refill)
                if self.cache.prompt_begin is not None:
                    self._history_start = self.cache.prompt_begin
                    self.cache.prompt_begin = None
                yield from self._prefill([*refill, *prompt])
                self.cache.tokens.append(prompt[-1])
                self._text_start = len(self.cache.tokens)
                waiting = self.plain_forward(mx.array(prompt[-1:]))
                waiting.forwards = 0
                total = len(refill) + len(prompt)
                yield Prefilled(total, total)
                anchor = waiting.last
                while not self.finished:
                    # The device gets its next work before the host emits. A forward of the target
                    # must wait until the rejected rows of the last one are rolled back.
                    proposals = following = None
                    with phase("choice"):
                        self._learn(waiting)
                        self._most = self._most_proposals(waiting)
                        count = self.policy.choose(self._most, self._rows)
                    if count:
                        self.cache.context.before = self._before(waiting)
                        proposals = self.propose(anchor, count)
                    elif self._transaction is None and self._continues(waiting):
                        following = self.plain_forward(anchor)
                    self._taken = False
                    yield self.emit(waiting, followed=proposals is not None)
                    self.finished |= not self._taken
                    self.commit()
                    self._interrupts.check()
                    if self.finished:
                        break
                    if proposals is not None:
                        waiting = self.judge(anchor, proposals)
                    else:
                        waiting = following or self.forced(anchor) or self.plain_forward(anchor)
                    anchor = waiting.last
            finally:
                self.close()

    def stop(self, retract: int = 0) -> None:
        """End the generation with the token that was handed over last.

        Args:
            retract: tokens of the last cycle that nobody shall see, and that the cache shall not
                stand for; of a plain step's there is no way back.
        """
        if self._transaction is not None:
            # The first row is the anchor's, which an earlier cycle emitted.
            retract = min(retract, len(self.cache.tokens) - self._rows - 1)
            if retract > 0:
                del self.cache.tokens[-retract:]
        self.finished = True

    def fill(
        self, tokens: list[int], step: Callable[[], int] | None = None
    ) -> Generator[Prefilled, None, None]:
        """Prefill alone: run tokens into the cache, chunk by chunk, and emit nothing.

        Args:
            tokens: ids that follow what the cache stands for.
            step: gives the most tokens of the next chunk; None: `prefill_step_size`.
        """
        with self._interrupts:
            try:
                # The last token of a prompt is left to give logits, which nobody wants here.
                yield from self._prefill([*tokens, 0], step)
            finally:
                self.close()

    def _prefill(
        self, prompt: list[int], step: Callable[[], int] | None = None
    ) -> Generator[Prefilled, None, None]:
        """Run all of a prompt but its last token, in mlx_lm's chunks."""
        total, done = len(prompt), 0
        yield Prefilled(done, total)
        while total - done > 1:
            size = step() if step else self.options.prefill_step_size
            chunk = prompt[done : min(done + size, total - 1)]
            done += len(chunk)
            # A draft whose layers all slide sees nothing of what lies far before the end.
            seen = self._feed.reaches(total - done)
            with self._cycle():
                self._forward(mx.array(chunk), self._taps if seen else ())
                self.cache.tokens += chunk
                mx.eval([c.state for c in self.cache.target])
                self._feed.settle()
            mx.clear_cache()
            yield Prefilled(done, total)
            self._interrupts.check()

    @phase("draft")
    def propose(self, anchor: mx.array, count: int) -> Proposals:
        """Draft: one forward over context and block proposes the tokens after the anchor."""
        with self._cycle():
            self._feed.flush()
            context, view = self.cache.context, self.view
            proposals = self._agreed(
                self.draft.propose(anchor, context, count, view.embed, view.head, self._choose)
            )
            if self.policy.learns and proposals.confidence is not None:
                _queue(proposals.tokens, proposals.confidence)
            else:
                _queue(proposals.tokens)
            return proposals

    def judge(self, anchor: mx.array, proposals: Proposals) -> Emission:
        """Verify as many of the proposals as are worth it."""
        confidence, context, read = proposals.confidence, self._rows, False

        def confidences() -> list[float]:
            nonlocal read
            read = True
            with phase("waiting"):
                return _floats(confidence)

        with phase("choice"):
            m = self.policy.narrow(confidences)
        wanted, forced = self._revised(proposals.first(m))
        some = wanted.tokens.size
        judged = self.verify(anchor, wanted) if some else self.plain_forward(anchor)
        judged.drafted, judged.context, judged.forced = proposals.tokens.size, context, forced
        judged.confidence, judged.read = confidence, read
        return judged

    def forced(self, anchor: mx.array) -> Emission | None:
        """Verify what a guide leaves no choice about, without a draft; None where it leaves one."""
        if self.options.guide is None:
            return None
        wanted, forced = self._revised(Proposals(mx.zeros(0, mx.int32)))
        if not forced:
            return None
        context = self._rows
        judged = self.verify(anchor, wanted)
        judged.context, judged.forced = context, True
        return judged

    @phase("guide")
    def _revised(self, proposals: Proposals) -> tuple[Proposals, bool]:
        """Proposals as a guide wants them, and whether it put some of its own in."""
        guide = self.options.guide
        if guide is None:
            return proposals, False
        guide.follow(self.cache.tokens[self._text_start :])
        with self._cycle():
            proposed = read(proposals.tokens)
        tokens, forced = guide.revise(proposed, self._most)
        return Proposals(mx.array(tokens, mx.int32)), forced

    @phase("guide")
    def _restricted(self, logits: mx.array, proposed: Sequence[int] = ()) -> mx.array:
        """Logits [n, V], being computed, without what a guide does not allow."""
        guide = self.options.guide
        if guide is None:
            return logits
        _queue(logits)
        guide.follow(self.cache.tokens[self._text_start :])
        return restrict(logits, guide.allowed(proposed))

    @phase("verify")
    def verify(self, anchor: mx.array, proposals: Proposals) -> Emission:
        """Verify and accept: one forward judges all proposals, and the host reads the verdict."""
        with self._cycle():
            self._transaction = self.view.begin(self.cache.target)
            block = mx.concatenate([anchor, proposals.tokens.astype(anchor.dtype)])
            logits, features = self._transaction.forward(block[None], self._taps)
            _queue(logits, *features)
            with phase("accept"):
                rows = logits[0]
                if self.options.guide is not None:
                    rows = self._restricted(rows, read(proposals.tokens))
                verdict = self._rule.judge(rows, proposals, self._history(anchor))
                self._verified = verdict.accepted + 1
                kept = [tap[:, : self._verified] for tap in features]
                self._feed.add(kept, self._verified)
            return Emission(
                verdict.tokens, verdict.logprobs, verdict.accepted, proposals.tokens.size
            )

    @phase("plain")
    def plain_forward(self, anchor: mx.array) -> Emission:
        """One plain step of the target, queued and not read."""
        with self._cycle():
            history = self._history(anchor)
            logits = self._restricted(self._forward(anchor, self._taps)[:, -1])
            for process in self.options.logits_processors:
                logits = process(cast(mx.array, history), logits)
            logprobs = log_probabilities(logits)
            token = self._plain(logprobs)
            self._plain.move(1)
            _queue(token, logprobs)
            return Emission(token, logprobs, context=self._rows - 1)

    def emit(self, waiting: Emission, followed: bool) -> Generator[Token, None, None]:
        """Hand over what waits, up to a stop token or the last one allowed.

        Args:
            followed: whether a draft's forward was queued already.
        """
        counts = self.statistics
        counts.target_forwards += waiting.forwards
        counts.proposed += waiting.proposed
        counts.plain_forwards += waiting.forwards and not waiting.drafted
        with self._cycle():
            tokens = list(waiting)
        if waiting.known is None:
            self._learn(waiting, read=True, followed=followed)
        for token in tokens:
            counts.emitted += 1
            counts.accepted += token.from_draft
            self.cache.tokens.append(token.id)
            self.finished = (
                token.id in self.options.stop_tokens or counts.emitted == self.options.max_tokens
            )
            if counts.emitted % 256 == 0:
                mx.clear_cache()
            self._clock.leave()
            with phase("text"), self._interrupts.open():
                yield token
            self._clock.back()
            if self.finished:
                break
        self._taken = True

    def spoil(self) -> None:
        """Another sequence had the device meanwhile, so this cycle's time tells nothing."""
        self._clock.spoil()

    @phase("rollback")
    def commit(self) -> None:
        """Keep the rows of emitted tokens in the target's caches, and no others."""
        if self._feed.full:
            with self._cycle():
                self._feed.flush()
                _queue(*self.cache.context.arrays)
        if self._transaction is None:
            return
        with self._cycle():
            kept = min(len(self.cache.tokens) - self._rows, self._verified)
            self._transaction.commit(kept)
            self._transaction = None
            self._rows += kept
            self._quantize()

    def close(self) -> None:
        """Leave a kept cache standing for the tokens that were emitted, however it ended."""
        self.policy.finish()
        if not self.cache.valid:
            return
        self.commit()
        self._step_ahead()
        if not self.keep_cache:
            return
        with self._cycle():
            behind = self.cache.tokens[self._rows :]
            if behind:
                self._forward(mx.array(behind), self._taps)
            self._feed.rewind(self._shift + self._rows)
            self.cache.evaluate()

    def _step_ahead(self) -> None:
        """Leave samplers, processors and random state as mlx_lm does: one token ahead."""
        if not self.statistics.emitted:
            return
        ahead = self.statistics.emitted + 1 - self._plain.decided
        behind = self.cache.tokens[self._rows :]
        if ahead <= 0 or self._rule.at_once:
            self._plain.move(ahead)
        elif behind:
            self.plain_forward(mx.array(behind))

    def _learn(self, waiting: Emission, read: bool = False, followed: bool = False) -> None:
        """Tell the policy how a cycle went, as soon as its tokens are known."""
        if not self.policy.learns or (waiting.known is None and not read):
            return
        if self.options.guide is not None:
            self._clock.spoil()  # a guide takes time of its own
        lap = self._clock.lap(waiting.drafted > 0, followed)
        if waiting.forwards:
            self.policy.observe(
                Cycle(
                    waiting.context,
                    lap,
                    waiting.drafted,
                    0 if waiting.forced else waiting.proposed,
                    0 if waiting.forced else waiting.accepted,
                    _floats(waiting.confidence),
                    waiting.read,
                )
            )

    def _forward(self, tokens: mx.array, taps: Sequence[int]) -> mx.array:
        """A forward whose rows [n] all stay: logits [1, n, V]."""
        logits, features = self.view.forward(tokens[None], self.cache.target, taps)
        self._feed.add(features, tokens.size)
        self._rows += tokens.size
        self._quantize()
        return logits

    def _quantize(self) -> None:
        o = self.options
        try:
            maybe_quantize_kv_cache(
                self.cache.target, o.quantized_kv_start, o.kv_group_size, o.kv_bits
            )
        except NotImplementedError as error:
            raise UnsupportedTarget(
                "This target has sliding-window caches, which mlx-lm cannot quantize; leave out "
                "kv_bits."
            ) from error

    def _history(self, anchor: mx.array) -> mx.array | None:
        """What plain decoding shows a logits processor with the anchor's row: [n] ids."""
        if not self.options.logits_processors:
            return None
        known = self.cache.tokens[self._history_start :]
        unread = len(self.cache.tokens) == self._rows
        return mx.concatenate([mx.array(known), anchor]) if unread else mx.array(known)

    def _room(self, waiting: Emission) -> float:
        """Tokens that may follow those that wait."""
        if waiting.known and not self.options.stop_tokens.isdisjoint(waiting.known):
            return 0
        if self.options.max_tokens < 0:
            return float("inf")
        return self.options.max_tokens - self.statistics.emitted - len(waiting)

    def _before(self, waiting: Emission) -> int:
        """The token before the anchor, which is the last one that waits."""
        known = waiting.known or ()
        return known[-2] if len(known) > 1 else self.cache.tokens[-1]

    def _continues(self, waiting: Emission) -> bool:
        """Whether a plain step is worth queuing before the tokens that wait are known."""
        if self.options.guide is not None:
            return False
        return self.keep_cache or self._room(waiting) > 0

    def _most_proposals(self, waiting: Emission) -> int:
        """Proposals that the next cycle may verify."""
        most = min(self.draft.most_proposals, self._room(waiting) - 1)
        o = self.options
        if o.kv_bits is not None:
            rows = self._shift + self._rows + (self._verified if self._transaction else 0)
            # Rows on both sides of the start would see keys of both kinds.
            if rows < o.quantized_kv_start:
                most = min(most, o.quantized_kv_start - rows - 1)
        return int(max(most, 0))

    def _cycle(self) -> "_DeviceWork":
        return _DeviceWork(self.cache)


class _DeviceWork:
    """Work on the generation stream; whatever breaks it leaves the cache invalid."""

    def __init__(self, cache: PromptCache):
        self._cache = cache
        self._stream = mx.stream(generation_stream)

    def __enter__(self) -> None:
        self._stream.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._stream.__exit__(kind, *rest)
        if kind is not None:
            self._cache.invalidate()


def _floats(array: mx.array | None) -> list[float]:
    return [] if array is None else cast(list[float], array.tolist())


@phase("queuing")
def _queue(*arrays: mx.array | None) -> None:
    """Start computing, without waiting for it as far as MLX allows."""
    mx.async_eval(*arrays)
