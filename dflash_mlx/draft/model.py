"""The DFlash 1 draft: a block of proposals in one forward (arXiv:2602.06036)."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from dflash_mlx.draft.attention import Attention
from dflash_mlx.draft.config import DraftConfig
from dflash_mlx.draft.context import Context, LayerGroup
from dflash_mlx.draft.projection import ContextProjection, signature
from dflash_mlx.draft.proposals import Choice, Proposals
from dflash_mlx.errors import CheckpointError, DFlashError


class MLP(nn.Module):
    """The gated feed-forward of a Qwen3 layer."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention over context and block, then the MLP."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, group: LayerGroup, index: int, rope: nn.Module, offset: int
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), group, index, rope, offset)
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlashDraft(nn.Module):
    """A draft in the published parameter tree.

    It has no embedding and no head: `propose` borrows the target's, as functions.
    """

    # Where a window limits what full-attention layers see, the first tokens stay visible.
    sinks = 4
    least_window = 16

    layer_class: type[Layer] = Layer
    # Above temperature 0 a position's own marginal ignores what was drawn before it, so sampled
    # blocks are incoherent and likeliest tokens are accepted more often.
    samples_proposals = False

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        taps, dim = len(config.target_layer_ids), config.hidden_size
        self.fc = nn.Linear(taps * dim, dim, bias=False)
        self.hidden_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        self.layers = [self.layer_class(config, i) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        try:
            self._rope = initialize_rope(
                config.head_dim,
                config.rope_theta,
                False,
                config.rope_scaling,
                config.max_position_embeddings,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The draft's rope_scaling {config.rope_scaling} cannot be used: {error}."
            ) from error
        self._full_limit: int | None = None
        self._projections: list[ContextProjection] = []
        self._places: list[tuple[int, int]] = []

    @property
    def block_size(self) -> int:
        """Rows of a block: the anchor and block_size - 1 proposals."""
        return self.config.block_size

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """The target layers whose outputs are tapped, 0-based."""
        return self.config.target_layer_ids

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the draft's activations."""
        return self.hidden_norm.weight.dtype

    @property
    def reach(self) -> int | None:
        """Context positions that a block can still see; None when it sees all of them."""
        windows = [self.config.window(i) for i in range(self.config.num_hidden_layers)]
        return None if None in windows else max(w - 1 for w in windows if w is not None)

    def limit_context(self, window: int) -> None:
        """Let full-attention layers see only the first few tokens and the last `window` or so.

        Raises:
            DFlashError: that would change nothing, or leave too little.
        """
        if self.reach is not None:
            raise DFlashError(
                f"All layers of this draft slide over {self.reach + 1} tokens already; leave the "
                "draft window out."
            )
        if window < self.least_window:
            raise DFlashError(
                f"The draft window is {window}; give at least {self.least_window} tokens."
            )
        self._full_limit = self.sinks + window

    def make_context(self) -> Context:
        """An empty memory for one sequence."""
        if not self._projections or any(p.stale for p in self._projections):
            self._group_layers()
        return Context(
            [p.make_group(self.dtype, self._full_limit, self.sinks) for p in self._projections]
        )

    def _group_layers(self) -> None:
        """Layers of equal window and quantization share a projection and a buffer."""
        kinds: dict[tuple, list[int]] = {}
        for i, layer in enumerate(self.layers):
            a = layer.self_attn
            kind = (a.window, signature(a.k_proj), signature(a.v_proj))
            kinds.setdefault(kind, []).append(i)
        self._places = [(0, 0)] * len(self.layers)
        for group, members in enumerate(kinds.values()):
            for index, i in enumerate(members):
                self._places[i] = (group, index)
        self._projections = [
            ContextProjection([self.layers[i].self_attn for i in members])
            for members in kinds.values()
        ]

    def condense(self, features: mx.array) -> mx.array:
        """Tapped outputs [1, n, taps * H], in the taps' order -> context features [n, H]."""
        return self.hidden_norm(self.fc(features[0].astype(self.dtype)))

    def remember(self, context: Context, c: mx.array) -> None:
        """Add the positions that follow `context.offset` to the context, in place.

        Args:
            context: of this draft's `make_context`.
            c: their context features [n, H].
        """
        for group, project in zip(context.groups, self._projections, strict=True):
            for start, stop in group.wanted(c.shape[0]):
                if start < stop:
                    group.append(*project(c[start:stop], self._rope, context.offset + start))
        context.offset += c.shape[0]

    def extend(self, context: Context, features: mx.array) -> None:
        """Add positions to the context by their tapped outputs [1, n, taps * H]."""
        self.remember(context, self.condense(features))

    def __call__(self, embeddings: mx.array, context: Context) -> mx.array:
        """The block's hidden states after the final norm.

        Args:
            embeddings: [1, L, H] of the anchor and the masks, at positions context.offset …
            context: all committed positions.

        Returns:
            [1, L, H], row i proposing the token at position context.offset + i.
        """
        x = embeddings.astype(self.dtype)
        for layer, (group, index) in zip(self.layers, self._places, strict=True):
            x = layer(x, context.groups[group], index, self._rope, context.offset)
        return self.norm(x)

    def propose(
        self,
        anchor: mx.array,
        context: Context,
        count: int,
        embed: Callable[[mx.array], mx.array],
        head: Callable[[mx.array], mx.array],
        choose: Choice,
    ) -> Proposals:
        """One forward: proposals for the `count` positions after the anchor.

        Args:
            anchor: [1], the last sampled token; its own features do not exist yet.
            context: all positions before the anchor.
            count: 1 … block_size - 1.
            embed: the target's embedding, [1, L] -> [1, L, H].
            head: the target's head, [1, m, H] -> [1, m, V].
            choose: picks tokens from logits [m, V].
        """
        embeddings = embed(self._block(anchor))
        hidden = self(embeddings, context)[:, 1 : count + 1]
        return choose(self._capped(head(hidden.astype(embeddings.dtype))[0]))

    def _block(self, anchor: mx.array) -> mx.array:
        """The anchor and the masks: [1] -> [1, block_size]."""
        masks = mx.full((self.block_size - 1,), self.config.mask_token_id, anchor.dtype)
        return mx.concatenate([anchor, masks])[None]

    def _capped(self, logits: mx.array) -> mx.array:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap
