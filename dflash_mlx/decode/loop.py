"""The DFlash decode loop: draft, verify, accept, commit (arXiv:2602.06036, section 3)."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import cast

import mlx.core as mx

from dflash_mlx.decode.acceptance import acceptance_rule, log_probabilities
from dflash_mlx.decode.agreement import Agreement, Alone
from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.clock import CycleClock
from dflash_mlx.decode.copying import Copying
from dflash_mlx.decode.device import DeviceWork, queue
from dflash_mlx.decode.emission import (
    COPIED,
    NOTHING_DRAFTED,
    Drafting,
    Emission,
    Judged,
    Token,
    Unread,
)
from dflash_mlx.decode.forwards import Forwards
from dflash_mlx.decode.guide import Guided
from dflash_mlx.decode.options import Options
from dflash_mlx.decode.phases import phase
from dflash_mlx.decode.plain import KeyedChoice, draft_choice, plain_choice
from dflash_mlx.decode.prefill import Prefilled, prefill
from dflash_mlx.decode.statistics import Statistics
from dflash_mlx.decode.steering import grown, narrowed, tell
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.policy import Policy
from dflash_mlx.propose import Lattice, Proposals
from dflash_mlx.target import TargetView

CANDIDATES = 16  # tokens of a position that a tree may choose from; further ones hardly ever pay


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
        self._choice, self._agreed = agreement.choice(own), agreement.proposals
        self._processors = tuple(options.logits_processors or ())
        self._rule = acceptance_rule(self._choice, self._processors, options.stop_tokens)
        sampled = options.sample_proposals
        self._proposing = draft_choice(own, draft.samples_proposals if sampled is None else sampled)
        taps = draft.target_layer_ids if drafting or keep_cache else ()
        self._target = Forwards(view, draft, cache, options, taps)
        self._guided = Guided(options.guide, cache)
        self._copying = Copying(cache, self.policy, options.copies and drafting)
        self._interrupts = agreement.interrupts()
        self._clock = clock or CycleClock()
        self._history_start = len(cache.tokens)  # where a plain mlx_lm cache began
        self._temp = own.sampler.temp if isinstance(own, KeyedChoice) else 1.0
        self._most = 0
        self._taken = False

    def run(self, prompt: list[int], refill: Sequence[int] = ()) -> Generator[Token, None, None]:
        """Emit the continuation of a prompt, one token at a time.

        Args:
            prompt: ids that follow what the cache stands for; at least one.
            refill: ids to run before the prompt, for a cache that has to be filled again.
        """
        with closing(self.steps(prompt, refill)) as steps:
            for step in steps:
                if not isinstance(step, Prefilled):
                    yield from step
                elif told := self.options.prompt_progress_callback:
                    told(step.done, step.total)

    def steps(
        self, prompt: list[int], refill: Sequence[int] = ()
    ) -> Generator[Prefilled | Iterator[Token], None, None]:
        """`run` in turns that another sequence may come between: prefill chunks, then cycles.

        A cycle's tokens come as an iterator that waits for the device. They are emitted as they are
        taken; a caller that takes fewer than all ends the generation.
        """
        with self._interrupts:
            try:
                yield from self._prefill(prompt, refill)
                waiting: Emission = self.plain(mx.array(prompt[-1:]), prefill=True)
                yield Prefilled(len(refill) + len(prompt), len(refill) + len(prompt))
                while not self.finished:
                    # The device gets its next work before the host emits. A forward of the target
                    # must wait until the rejected rows of the last one are rolled back.
                    proposals = following = None
                    count, copied = self.choose(waiting)
                    if count:
                        proposals = self.propose(waiting, count)
                    elif not (copied or self._target.verifying) and self._continues(waiting):
                        following = self.plain(waiting.anchor)
                    self._taken = False
                    yield self.emit(waiting, followed=proposals is not None)
                    self.finished |= not self._taken
                    self.commit()
                    self._interrupts.check()
                    if self.finished:
                        break
                    anchor = waiting.anchor
                    if proposals is not None:
                        waiting = self.verify(anchor, proposals)
                    elif copied:
                        waiting = self.copy(waiting, copied)
                    else:
                        waiting = following or self.forced(anchor) or self.plain(anchor)
            finally:
                self.close()

    def stop(self, retract: int = 0) -> None:
        """End the generation with the token that was handed over last.

        Args:
            retract: tokens of the last cycle that nobody shall see, and that the cache shall not
                stand for; of a plain step's there is no way back.
        """
        if self._target.verifying:
            # The first row is the anchor's, which an earlier cycle emitted.
            retract = min(retract, len(self._target.behind) - 1)
            if retract > 0:
                del self.cache.tokens[-retract:]
        self.finished = True

    def spoil(self) -> None:
        """Another sequence had the device meanwhile, so this cycle's time tells nothing."""
        self._clock.spoil()

    def _prefill(
        self, prompt: list[int], refill: Sequence[int]
    ) -> Generator[Prefilled, None, None]:
        """Run all of a prompt but its last token."""
        self._history_start += len(refill)
        if self.cache.prompt_begin is not None:
            self._history_start, self.cache.prompt_begin = self.cache.prompt_begin, None
        tokens, size = [*refill, *prompt[:-1]], self.options.prefill_step_size
        copies = self._copying.on
        yield from prefill(self._target, self.cache, tokens, lambda: size, self._interrupts, copies)
        self.cache.tokens.append(prompt[-1])
        self._guided.begin()
        self._copying.begin()

    @phase("choice")
    def choose(self, waiting: Emission) -> tuple[int, list[int]]:
        """How many proposals to draft behind the tokens that wait, or what to copy there; neither
        in a plain cycle."""
        if waiting.known is not None:
            self._tell(waiting)
        self._most = self._most_proposals(waiting)
        copied = self._copying.tokens(waiting.known, self._most, self._target.cached)
        return 0 if copied else self.policy.choose(self._most, self._target.cached), copied

    @phase("draft")
    def propose(self, waiting: Emission, count: int) -> Proposals | Lattice:
        """Draft: one forward over context and block proposes the tokens after the anchor, or
        candidates for a tree of them."""
        context, view, draft = self.cache.context, self.view, self.draft
        known = waiting.known or ()
        context.before = known[-2] if len(known) > 1 else self.cache.tokens[-1]
        with DeviceWork(self.cache):
            self._target.feed.flush()
            nodes = self.policy.nodes
            if nodes and view.takes_trees(self.cache.target):
                lattice = draft.lattice(
                    waiting.anchor,
                    context,
                    count,
                    view.embed,
                    view.head,
                    self._proposing,
                    width=min(nodes, CANDIDATES),
                    temp=self._temp,
                )
                queue(*lattice.arrays)
                return lattice
            proposals = self._agreed(
                draft.propose(
                    waiting.anchor, context, count, view.embed, view.head, self._proposing
                )
            )
            queue(proposals.tokens, proposals.signs if self.policy.learns else None)
            return proposals

    def verify(self, anchor: mx.array, proposals: Proposals | Lattice) -> Emission:
        """Verify as many of the proposals as are worth it, and accept."""
        if isinstance(proposals, Lattice):
            narrow, drafting = grown(self.policy, proposals)
        else:
            narrow, drafting = narrowed(self.policy, proposals)
        wanted, forced = self._guided.revise(narrow, self._most)
        if not wanted.tokens.size:
            return self.plain(anchor, drafting)
        return self._judged(anchor, wanted, drafting, forced)

    def copy(self, waiting: Emission, tokens: list[int]) -> Emission:
        """Verify copied tokens, and accept; where they were behind a token that came out otherwise
        than was thought, others, or none."""
        if waiting.known is None:
            with phase("choice"):
                tokens = self._copying.tokens((), self._most, self._target.cached)
        drafting = COPIED if tokens else NOTHING_DRAFTED
        wanted, forced = self._guided.revise(Proposals(mx.array(tokens, mx.int32)), self._most)
        if not wanted.tokens.size:
            self._clock.spoil()  # the device had nothing to do while the host looked
            return self.plain(waiting.anchor)
        return self._judged(waiting.anchor, wanted, drafting, forced)

    def forced(self, anchor: mx.array) -> Judged | None:
        """Verify what a guide leaves no choice about, without a draft; None where it leaves one."""
        if not self._guided:
            return None
        wanted, forced = self._guided.revise(Proposals(mx.zeros(0, mx.int32)), self._most)
        return self._judged(anchor, wanted, NOTHING_DRAFTED, forced) if forced else None

    @phase("verify")
    def _judged(
        self, anchor: mx.array, proposals: Proposals, drafting: Drafting, forced: bool
    ) -> Judged:
        """One forward judges all proposals, and the host reads the verdict."""
        context = self._target.cached
        with DeviceWork(self.cache):
            block = mx.concatenate([anchor, proposals.tokens.astype(anchor.dtype)])
            logits, features = self._target.verify(block, proposals.tree)
            self._copying.read_on()
            with phase("accept"):
                logits = self._guided.restrict(logits, proposals)
                verdict = self._rule.judge(logits, proposals, self._history(anchor))
                self._target.accept(features, verdict.accepted + 1, verdict.path)
            return Judged(verdict, proposals.tokens.size, context, drafting, forced)

    @phase("plain")
    def plain(
        self, anchor: mx.array, drafting: Drafting = NOTHING_DRAFTED, prefill: bool = False
    ) -> Unread:
        """One plain step of the target, queued and not read."""
        context = self._target.cached
        with DeviceWork(self.cache):
            history = self._history(anchor)
            logits = self._guided.restrict(self._target.run(anchor)[:, -1])
            for process in self._processors:
                logits = process(cast(mx.array, history), logits)
            logprobs = log_probabilities(logits)
            token = self._choice(logprobs)
            self._choice.move(1)
            queue(token, logprobs)
            self._copying.read_on()
            return Unread(token, logprobs, context, drafting, prefill)

    def emit(self, waiting: Emission, followed: bool) -> Generator[Token, None, None]:
        """Hand over what waits, up to a stop token or the last one allowed.

        Args:
            followed: whether a draft's forward was queued already.
        """
        counts = self.statistics
        counts.target_forwards += not waiting.prefill
        counts.proposed += waiting.proposed
        counts.plain_forwards += not waiting.prefill and not waiting.proposed
        copied = waiting.drafting.copied
        counts.copies += waiting.proposed * copied
        with DeviceWork(self.cache):
            tokens = list(waiting.tokens())
        if waiting.known is None:
            self._tell(waiting, followed)
        for token in tokens:
            counts.emitted += 1
            counts.accepted += token.from_draft
            counts.copied += token.from_draft and copied
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

    @phase("rollback")
    def commit(self) -> None:
        """Keep the rows of emitted tokens in the target's caches, and no others."""
        self._target.commit()

    def close(self) -> None:
        """Leave a kept cache standing for the tokens that were emitted, however it ended."""
        self.policy.finish()
        if not self.cache.valid:
            return
        self.commit()
        self._step_ahead()
        if self.keep_cache:
            self._target.close()

    def _step_ahead(self) -> None:
        """Leave samplers, processors and random state as mlx_lm does: one token ahead."""
        if not self.statistics.emitted:
            return
        ahead = self.statistics.emitted + 1 - self._choice.decided
        if ahead <= 0 or self._rule.at_once:
            self._choice.move(ahead)
        elif self._target.behind:
            self.plain(mx.array(self._target.behind))

    def _tell(self, waiting: Emission, followed: bool = False) -> None:
        if self._guided:
            self._clock.spoil()  # a guide takes time of its own
        tell(self.policy, self._clock, waiting, followed)

    def _history(self, anchor: mx.array) -> mx.array | None:
        """What plain decoding shows a logits processor with the anchor's row: [n] ids."""
        if not self._processors:
            return None
        known = mx.array(self.cache.tokens[self._history_start :])
        return known if self._target.behind else mx.concatenate([known, anchor])

    def _room(self, waiting: Emission) -> float:
        """Tokens that may follow those that wait."""
        if waiting.known and not self.options.stop_tokens.isdisjoint(waiting.known):
            return 0
        if self.options.max_tokens < 0:
            return float("inf")
        return self.options.max_tokens - self.statistics.emitted - len(waiting)

    def _continues(self, waiting: Emission) -> bool:
        """Whether a plain step is worth queuing before the tokens that wait are known."""
        return not self._guided and (self.keep_cache or self._room(waiting) > 0)

    def _most_proposals(self, waiting: Emission) -> int:
        """Proposals that the next cycle may verify."""
        most = min(self.draft.most_proposals, self._room(waiting) - 1)
        start, position = self.options.quantized_kv_start, self._target.position
        if self.options.kv_bits is not None and position < start:
            # Rows on both sides of the start would see keys of both kinds.
            most = min(most, start - position - 1)
        return int(max(most, 0))
