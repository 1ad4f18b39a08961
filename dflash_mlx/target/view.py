"""A target as DFlash sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from dflash_mlx.errors import PairError
from dflash_mlx.target.anatomy import examine
from dflash_mlx.target.caches import UNKNOWN, Rule, leaves, rule_of
from dflash_mlx.target.fast_verify import FastVerify
from dflash_mlx.target.replay import MixerReplay, row_wise_children
from dflash_mlx.target.taps import TapPlan, joined
from dflash_mlx.target.transaction import Transaction
from dflash_mlx.target.watch import Handler, Watch, Watched


class TargetView:
    """What DFlash needs of an mlx-lm model: embedding, head, taps, and a cache it can take back.

    The model stays the user's own object. It is watched only while a forward of this view runs,
    and nothing of it is changed for good.

    Taps count layer calls from 0 in the order of a forward, and give the layer's output. In a
    looped model a layer is called once per loop, and each call is a tap of its own. Tap -1 is the
    embedding's output, as it enters the first layer. A family
    with parallel residual streams (gemma3n, deepseek_v41) gives their mean: no published draft
    says what it wants of them, so this definition is ours, and `streams` is above 1 there.
    """

    def __init__(self, model: nn.Module):
        """Raises UnsupportedTarget when a part that DFlash needs is not there."""
        self.model = model
        found = examine(model)
        self.depth: int = len(found.layer_calls)
        self.hidden_size: int = found.hidden_size
        self.vocab_size: int = found.vocab_size
        self.embed_scale: float = found.embed_scale
        self.streams: int = found.streams
        self._embedding, self._head = found.embedding, found.head
        self._layer_calls, self._stream_axis = found.layer_calls, found.stream_axis
        self._mixers = found.mixers
        self._mixer_children = [c for m in found.mixers or [] for c in row_wise_children(m)]
        self.fast_verify = FastVerify(model)
        self._tap_plans: dict[tuple[int, ...], TapPlan] = {}

    def embed(self, tokens: mx.array) -> mx.array:
        """The token embedding times the family's constant factor, as a draft wants it.

        tokens: [B, L]. Returns [B, L, H]. Where the family does more than multiply (a norm, as
        in muse_glimmer), the raw embedding.
        """
        raw = self._embedding(tokens)
        return raw if self.embed_scale == 1.0 else raw * self.embed_scale

    def head(self, hidden: mx.array) -> mx.array:
        """The output head or tied embedding alone: no norm, no cap, no multiplier.

        hidden: [B, L, H]. Returns [B, L, V].
        """
        return self._head(hidden)

    def head_rows(self, ids: mx.array) -> mx.array | None:
        """The head's weight rows [n, H] of token ids [n]; None where it does more than multiply."""
        head, owner = self._head, getattr(self._head, "__self__", None)
        if owner is self._embedding and isinstance(owner, nn.Embedding | nn.QuantizedEmbedding):
            return owner(ids)
        if isinstance(head, nn.Linear) and "bias" not in head:
            return head.weight[ids]
        if isinstance(head, nn.QuantizedLinear) and "bias" not in head:
            biases = head.get("biases")
            return mx.dequantize(
                head.weight[ids],
                head.scales[ids],
                None if biases is None else biases[ids],
                head.group_size,
                head.bits,
                head.mode,
            )
        return None

    def make_cache(self) -> list[Any]:
        """A fresh prompt cache, mlx_lm's own."""
        return make_prompt_cache(self.model)

    def check_taps(self, taps: Sequence[int]) -> None:
        """Raise PairError if a tap is not a layer of this target."""
        for tap in taps:
            if not -1 <= tap < self.depth:
                raise PairError(
                    f"The draft taps layer {tap} of a target that has layers 0 to "
                    f"{self.depth - 1}; use the target that the draft was trained for."
                )

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Refuse token ids that there is no embedding for: MLX would read beside it.

        Raises:
            PairError: there is one, as where the tokenizer is another model's.
        """
        wrong = next((t for t in tokens if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            raise PairError(
                f"The prompt has the token {wrong}, and the target's embedding has only "
                f"{self.vocab_size} rows; its tokenizer is another model's, or damaged."
            )

    def forward(
        self, tokens: mx.array, cache: list[Any], taps: Sequence[int] = ()
    ) -> tuple[mx.array, mx.array | None]:
        """The target's forward, with the outputs of some layers.

        tokens: [B, L]. Returns (logits [B, L, V], features [B, L, len(taps) * H], concatenated in
        the order of taps, or None without taps). Nothing is evaluated.
        """
        return self.run(tokens, cache, taps, [])

    def record(
        self, tokens: mx.array, cache: list[Any], taps: Sequence[int]
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """`forward` for features that may never be wanted: not joined yet.

        tokens: [B, L]. Returns (logits [B, L, V], each tap's output [B, L, H]).
        """
        return self._recorded(tokens, cache, taps, [])

    def begin(self, cache: list[Any]) -> Transaction:
        """Open a transaction on the cache, for one verify."""
        return Transaction(self, cache)

    def check_cache(self, cache: list[Any]) -> None:
        """Raise UnsupportedTarget for a cache that no transaction can take back exactly."""
        for leaf in leaves(cache):
            rule_of(leaf).mark(leaf, False)

    def rolls_back_by(self, cache: list[Any]) -> list[str]:
        """How each leaf of this cache goes back after a rejection, in the order of its leaves."""
        rules = [rule_of(leaf) for leaf in leaves(cache)]
        if self.replays_whole(rules):
            return [UNKNOWN.name] * len(rules)
        return [rule.name for rule in rules]

    def replays_whole(self, rules: Iterable[Rule]) -> bool:
        """Whether a rejection makes the target run again over the kept tokens."""
        return any(rule is UNKNOWN or (rule.replays and self._mixers is None) for rule in rules)

    def mixer_replay(self) -> MixerReplay:
        """A recorder for the recurrent mixers of one verify."""
        return MixerReplay(self._mixers or [], self._mixer_children)

    def run(
        self,
        tokens: mx.array,
        cache: list[Any],
        taps: Sequence[int],
        handlers: Sequence[tuple[Watched, Handler]],
    ) -> tuple[mx.array, mx.array | None]:
        """`forward` with further modules watched."""
        if taps:
            logits, outputs = self._recorded(tokens, cache, taps, handlers)
            return logits, joined(outputs)
        if not handlers:
            return self.model(tokens, cache=cache), None
        with Watch(handlers):
            return self.model(tokens, cache=cache), None

    def _recorded(
        self,
        tokens: mx.array,
        cache: list[Any],
        taps: Sequence[int],
        handlers: Sequence[tuple[Watched, Handler]],
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        plan, outputs = self._plan(tuple(taps)), list[mx.array]()
        with Watch(plan.watching(outputs, handlers)):
            logits = self.model(tokens, cache=cache)
        return logits, plan.pick(outputs)

    def _plan(self, taps: tuple[int, ...]) -> TapPlan:
        plan = self._tap_plans.get(taps)
        if plan is None:
            self.check_taps(taps)
            plan = self._tap_plans[taps] = TapPlan(taps, self._layer_calls, self._stream_axis)
        return plan
