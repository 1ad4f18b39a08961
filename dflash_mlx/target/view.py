"""A target as DFlash sees it."""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from dflash_mlx.errors import PairError
from dflash_mlx.target.anatomy import examine
from dflash_mlx.target.branches import can_branch, rotary_modules
from dflash_mlx.target.caches import UNKNOWN, rule_of
from dflash_mlx.target.fast_verify import FastVerify
from dflash_mlx.target.leaf import Leaf, leaves
from dflash_mlx.target.replay import Mixers
from dflash_mlx.target.taps import Features, TappedForward
from dflash_mlx.target.transaction import Transaction
from dflash_mlx.target.trial import branching


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
        """Look at a model by running it once, unevaluated.

        Raises:
            UnsupportedTarget: a part that DFlash needs is not there.
        """
        self.model = model
        found = examine(model)
        self.depth: int = len(found.layer_calls)
        self.hidden_size: int = found.hidden_size
        self.vocab_size: int = found.vocab_size
        self.embed_scale: float = found.embed_scale
        self.streams: int = found.streams
        self._embedding, self._head = found.embedding, found.head
        self._forward = TappedForward(model, found.layer_calls, found.stream_axis)
        self._mixers = Mixers(found.mixers)
        self.fast_verify = FastVerify(model)
        self._rotary = rotary_modules(model)
        self._branching: bool | None = None

    def embed(self, tokens: mx.array) -> mx.array:
        """The token embedding times the family's constant factor, as a draft wants it.

        Args:
            tokens: [B, L].

        Returns:
            [B, L, H]; where the family does more than multiply (a norm, as in muse_glimmer), the
            raw embedding.
        """
        raw = self._embedding(tokens)
        return raw if self.embed_scale == 1.0 else raw * self.embed_scale

    def head(self, hidden: mx.array) -> mx.array:
        """The output head or tied embedding alone: no norm, no cap, no multiplier.

        Args:
            hidden: [B, L, H].

        Returns:
            [B, L, V].
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

    def make_cache(self) -> list[Leaf]:
        """A fresh prompt cache, mlx_lm's own."""
        return make_prompt_cache(self.model)

    def check_taps(self, taps: Sequence[int]) -> None:
        """Raise PairError if a tap is not a layer of this target."""
        self._forward.check_taps(taps)

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
        self, tokens: mx.array, cache: list[Leaf], taps: Sequence[int] = ()
    ) -> tuple[mx.array, Features]:
        """The target's forward; nothing is evaluated.

        Args:
            tokens: [B, L].
            cache: extended in place.
            taps: the layers whose outputs are wanted.

        Returns:
            Logits [B, L, V], and one array [B, L, H] per tap.

        Raises:
            PairError: a tap is not a layer of this target.
        """
        return self._forward(tokens, cache, taps)

    def begin(self, cache: list[Leaf]) -> Transaction:
        """Open a transaction on the cache, for one verify."""
        return Transaction(self._forward, self._mixers, self.fast_verify, cache, self._rotary)

    def takes_trees(self, cache: list[Leaf]) -> bool:
        """Whether a verify on this cache may be of a tree. The first time, the target is tried."""
        if not can_branch(cache):
            return False
        if self._branching is None:
            self._branching = branching(self)
        return self._branching

    def check_cache(self, cache: list[Leaf]) -> None:
        """Raise UnsupportedTarget for a cache that no transaction can take back exactly."""
        for leaf in leaves(cache):
            rule_of(leaf).mark(leaf, False)

    def rolls_back_by(self, cache: list[Leaf]) -> list[str]:
        """How each leaf of this cache goes back after a rejection, in the order of its leaves."""
        rules = [rule_of(leaf) for leaf in leaves(cache)]
        if self._mixers.whole(rules):
            return [UNKNOWN.name] * len(rules)
        return [rule.name for rule in rules]
