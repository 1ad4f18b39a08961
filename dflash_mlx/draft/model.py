"""The draft: a block of proposals in one forward (arXiv:2602.06036), whatever its packaging."""

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import DraftConfig, MarkovConfig
from dflash_mlx.draft.context import Context
from dflash_mlx.draft.heads import Block, ConfidenceHead, Head, make_head
from dflash_mlx.draft.layer import make_layer
from dflash_mlx.draft.projection import ContextProjection, kind_of
from dflash_mlx.draft.proposals import Choice, as_choice
from dflash_mlx.draft.rope import make_rope
from dflash_mlx.errors import CheckpointError, DFlashError
from dflash_mlx.propose import Lattice, Proposals

Embed = Callable[[mx.array], mx.array]


class DFlashDraft(nn.Module):
    """A draft in DFlash 1's parameter names; the readers in `formats` translate others.

    Where it has no embedding or head of its own, `propose` borrows the target's, as functions.
    """

    # Where a window limits what full-attention layers see, the first tokens stay visible.
    sinks = 4
    least_window, most_window = 16, 2**24

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        taps, dim, eps = len(config.target_layer_ids), config.hidden_size, config.rms_norm_eps
        vocabulary, context = config.vocabulary, config.context
        self.fc = nn.Linear(taps * config.target_hidden_size, dim, bias=False)
        self.hidden_norm = nn.RMSNorm(dim, eps=eps)
        self.layers = [make_layer(config, i) for i in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(dim, eps=eps)
        if context.tap_norms:
            norms = [nn.RMSNorm(config.target_hidden_size, eps=eps) for _ in range(taps)]
            self.aux_hidden_norms = norms
        if context.fusion:
            self.layer_fusion_weights = mx.zeros((config.num_hidden_layers, taps))
        if vocabulary.own_embedding:
            self.embed_tokens = nn.Embedding(cast(int, vocabulary.size), dim)
        if vocabulary.mask_embedding:
            self.mask_embedding = mx.zeros((dim,))
        if vocabulary.own_head and not vocabulary.tied:
            rows = cast(int, vocabulary.draft_size or vocabulary.size)
            self.lm_head = nn.Linear(dim, rows, bias=False)
        if vocabulary.draft_size is not None:
            self.d2t = mx.zeros((vocabulary.draft_size,), mx.int64)
        head = make_head(config)
        self._head_name = head.name or "_plain_rows"
        self[self._head_name] = head
        if config.confidence:
            rank = config.head.rank if isinstance(config.head, MarkovConfig) else 0
            self.confidence_head = ConfidenceHead(dim, rank * config.confidence_with_markov)
        try:
            self._ropes = [make_rope(layer.rope, config.head_dim) for layer in config.layers]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The draft's rope_scaling {config.layers[0].rope.scaling} cannot be used: {error}."
            ) from error
        self._full_limit: int | None = None
        self._projections: list[ContextProjection] = []
        # The layers of each group, and each layer's group and place in it.
        self._members: list[list[int]] = []
        self._places: list[tuple[int, int]] = []

    @property
    def head(self) -> Head:
        """What makes proposals of a block."""
        return cast(Head, self[self._head_name])

    @property
    def block_size(self) -> int:
        """Rows of a block, the anchor's included."""
        return self.config.block_size

    @property
    def most_proposals(self) -> int:
        """Proposals that a block makes at most."""
        return self.config.most_proposals

    @property
    def samples_proposals(self) -> bool:
        """Whether proposals are better drawn than the likeliest, above temperature 0."""
        return self.head.samples

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """The target layers whose outputs are tapped, 0-based; -1 is the embedding's output."""
        return self.config.target_layer_ids

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the draft's activations."""
        return self.hidden_norm.weight.dtype

    @property
    def reach(self) -> int | None:
        """Context positions that a block can still see; None when it sees all of them."""
        reach = 0
        for layer in self.config.layers:
            if layer.window is None:
                return None
            reach = max(reach, layer.window if layer.anchored else layer.window - 1)
        return reach

    def rope(self, layer: int) -> nn.Module:
        """Rotary positions of a layer."""
        return self._ropes[layer]

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
        if type(window) is not int or not self.least_window <= window <= self.most_window:
            raise DFlashError(
                f"The draft window is {window!r:.40}; give at least {self.least_window} tokens, "
                f"and at most {self.most_window}."
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
        """Layers of equal window, rope and quantization share a projection and a buffer."""
        kinds: dict[tuple, list[int]] = {}
        ropes = [layer.rope for layer in self.config.layers]
        for i, layer in enumerate(self.layers):
            kind = ropes.index(ropes[i]), *kind_of(layer.self_attn)
            kinds.setdefault(kind, []).append(i)
        self._members = list(kinds.values())
        self._places = [(0, 0)] * len(self.layers)
        for group, members in enumerate(self._members):
            for index, i in enumerate(members):
                self._places[i] = (group, index)
        self._projections = [
            ContextProjection([self.layers[i].self_attn for i in members], self._apart)
            for members in self._members
        ]

    @property
    def _apart(self) -> bool:
        """Whether context rows go to keys and values layer by layer."""
        context = self.config.context
        return context.layer_norms or context.fusion or self.config.attention.fused

    def condense(self, features: Sequence[mx.array]) -> mx.array:
        """The outputs of the taps, in their order, [1, n, Ht] each -> context features [n, F].

        F is H, or layers * H where each layer sees features of its own.
        """
        taps, context = [tap[0].astype(self.dtype) for tap in features], self.config.context
        if context.tap_norms:
            taps = [norm(tap) for norm, tap in zip(self.aux_hidden_norms, taps, strict=True)]
        c = self.fc(mx.concatenate(taps, axis=-1))
        if context.fusion:
            shares = mx.softmax(self.layer_fusion_weights, axis=-1)
            mixed = shares @ mx.stack(taps, axis=1)
            return self.hidden_norm(c[:, None] + mixed).reshape(c.shape[0], -1)
        return self.hidden_norm(c)

    def remember(self, context: Context, c: mx.array) -> None:
        """Add the positions that follow `context.offset` to the context, in place.

        Args:
            context: of this draft's `make_context`.
            c: their context features [n, F], of `condense`.
        """
        kinds = zip(context.groups, self._projections, self._members, strict=True)
        for group, project, members in kinds:
            rope = self._ropes[members[0]]
            for start, stop in group.wanted(c.shape[0]):
                if start < stop:
                    seen = self._seen(c[start:stop], members)
                    group.append(*project(seen, rope, context.offset + start))
        context.offset += c.shape[0]

    def _seen(self, c: mx.array, members: Sequence[int]) -> list[mx.array]:
        """Context features [n, F] as some layers see them, [n, H] each; one where all are alike."""
        if not self._apart:
            return [c]
        if self.config.context.fusion:
            own = mx.split(c, len(self.layers), axis=-1)
            return [own[i] for i in members]
        if self.config.context.layer_norms:
            return [self.layers[i].input_layernorm(c) for i in members]
        return [c] * len(members)

    def extend(self, context: Context, features: Sequence[mx.array] | mx.array) -> None:
        """Add positions to the context by the outputs of the taps.

        Args:
            context: of this draft's `make_context`.
            features: [1, n, Ht] of each tap in their order, or joined, [1, n, taps * Ht].
        """
        if isinstance(features, mx.array):
            features = tuple(mx.split(features, len(self.target_layer_ids), axis=-1))
        self.remember(context, self.condense(features))

    def __call__(self, embeddings: mx.array, context: Context) -> mx.array:
        """The block's hidden states after the final norm.

        Args:
            embeddings: [1, L, H] of the anchor and the masks, at positions context.offset …
            context: all committed positions.

        Returns:
            [1, L, H], row i proposing the token at position context.offset + i, or the one behind
            it where the anchor's row proposes too.
        """
        x = embeddings.astype(self.dtype)
        places = zip(self.layers, self._places, self._ropes, strict=True)
        for layer, (group, index), rope in places:
            x = layer(x, context.groups[group], index, rope, context.offset)
        return self.norm(x)

    def propose(
        self,
        anchor: mx.array,
        context: Context,
        count: int,
        embed: Embed,
        head: Embed,
        choose: Choice | Callable[[mx.array], Proposals],
    ) -> Proposals:
        """One forward: proposals for the `count` positions after the anchor.

        Args:
            anchor: [1], the last sampled token; its own features do not exist yet.
            context: all positions before the anchor.
            count: 1 … most_proposals.
            embed: the target's embedding, [1, L] -> [1, L, H]; left aside if the draft has one.
            head: the target's head, [1, m, H] -> [1, m, V]; left aside if the draft has one.
            choose: picks tokens from logits [m, V]. A chain asks row by row, in order, with [1, V];
                of a reduced vocabulary, tokens that the draft lacks have -inf.

        Returns:
            Proposals in the target's ids. Their confidence is a chance, 0 … 1: what the draft's
            confidence head says, after the sigmoid, with the tokens' own likelihood beside it,
            or else that likelihood.
        """
        block = self._block(anchor, context, count, embed, head)
        proposals = self.head.propose(block, as_choice(choose))
        if self.config.confidence:
            previous = mx.concatenate([anchor, proposals.tokens[:-1].astype(anchor.dtype)])
            embedded = self.head.embed_previous(previous)
            proposals.likelihood = proposals.confidence
            proposals.confidence = self.confidence_head(block.rows, embedded)
        return proposals

    def lattice(
        self,
        anchor: mx.array,
        context: Context,
        count: int,
        embed: Embed,
        head: Embed,
        choose: Choice | Callable[[mx.array], Proposals],
        *,
        width: int,
        temp: float = 1.0,
    ) -> Lattice:
        """One forward: candidates for a tree over the `count` positions after the anchor.

        Args:
            anchor, context, count, embed, head, choose: as for `propose`.
            width: candidates of a position, at most.
            temp: temperature of the text to come, 1 where it is greedy.
        """
        block = self._block(anchor, context, count, embed, head)
        return self.head.lattice(block, as_choice(choose), width, temp)

    def _block(
        self, anchor: mx.array, context: Context, count: int, embed: Embed, head: Embed
    ) -> Block:
        """One forward, ready for the head."""
        embeddings = self._embed_block(anchor, embed)
        if self.config.input_scale != 1.0:
            embeddings = embeddings * self.config.input_scale
        hidden = self(embeddings, context)[0]
        return Block(
            anchor=anchor,
            before=anchor if context.before is None else mx.array([context.before], anchor.dtype),
            hidden=hidden,
            first=self.config.first_row,
            count=count,
            logits=lambda h: self._logits(h.astype(embeddings.dtype), head),
            embed=lambda tokens: self._embed(tokens[None], embed)[0],
            spread=self._spread,
            to_target=self._to_target,
        )

    def _embed(self, tokens: mx.array, embed: Embed) -> mx.array:
        """Tokens [1, L] -> [1, L, H], by the draft's own embedding if it has one."""
        if not self.config.vocabulary.own_embedding:
            return embed(tokens)
        scale = self.config.vocabulary.embedding_scale
        embedded = self.embed_tokens(tokens)
        return embedded if scale == 1.0 else embedded * scale

    def _embed_block(self, anchor: mx.array, embed: Embed) -> mx.array:
        """The anchor [1] and the masks: [1, block_size, H]."""
        masks = self.block_size - 1
        if not self.config.vocabulary.mask_embedding:
            filler = mx.full((masks,), self.config.mask_token_id, anchor.dtype)
            return self._embed(mx.concatenate([anchor, filler])[None], embed)
        first = self._embed(anchor[None], embed)
        mask = self.mask_embedding.astype(first.dtype)
        return mx.concatenate([first, mx.broadcast_to(mask, (1, masks, mask.size))], axis=1)

    def _logits(self, hidden: mx.array, head: Embed) -> mx.array:
        """Hidden states [n, H] -> base logits [n, Vd]."""
        config = self.config
        if not config.vocabulary.own_head:
            logits = head(hidden[None])[0]
        elif config.vocabulary.tied:
            logits = self.embed_tokens.as_linear(hidden)
        else:
            logits = self.lm_head(hidden)
        if config.output_multiplier != 1.0:
            logits = logits.astype(mx.float32) * config.output_multiplier
        cap = config.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def _to_target(self, tokens: mx.array) -> mx.array:
        """Ids of the draft's own vocabulary -> the target's."""
        return tokens + self.d2t[tokens] if "d2t" in self else tokens

    def _spread(self, logits: mx.array) -> mx.array:
        """Logits [n, Vd] -> [n, V], -inf for tokens that a reduced vocabulary lacks."""
        vocabulary = self.config.vocabulary
        if vocabulary.draft_size is None:
            return logits
        whole = mx.full((logits.shape[0], cast(int, vocabulary.size)), -mx.inf, logits.dtype)
        whole[:, self._to_target(mx.arange(vocabulary.draft_size))] = logits
        return whole
