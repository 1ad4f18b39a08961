"""A draft that knows the text, and is right as often as it is told to be."""

import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from dflash_mlx.draft import Context, Proposals
from dflash_mlx.draft.formats import draft_config
from dflash_mlx.target import TargetView


class SyntheticDraft:
    """Stands for a DFlashDraft. `text` is the whole sequence, prompt included.

    Each proposal is right with probability `right`, so blocks are accepted in none, in part and
    as a whole. It checks that the loop keeps its context at the anchor's position.
    """

    reach = None
    samples_proposals = False

    def __init__(
        self, view: TargetView, text: list[int], right: float, block_size: int = 8, seed: int = 0
    ):
        self.text, self.right, self.block_size = text, right, block_size
        self.most_proposals = block_size - 1
        self.target_layer_ids = (0, view.depth - 1)
        self.vocab = view.vocab_size
        self.hidden_size = view.hidden_size
        self.random = random.Random(seed)
        self.config = draft_config(
            {
                "architectures": ["DFlashDraftModel"],
                "hidden_size": view.hidden_size,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "intermediate_size": 1,
                "vocab_size": view.vocab_size,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e4,
                "num_target_layers": view.depth,
                "block_size": block_size,
                "dflash_config": {
                    "target_layer_ids": list(self.target_layer_ids),
                    "mask_token_id": 0,
                },
            }
        )

    def parameters(self) -> dict[str, Any]:
        return {}

    def make_context(self) -> Context:
        return Context([])

    def condense(self, features: Sequence[mx.array]) -> mx.array:
        assert [tap.shape[::2] for tap in features] == [(1, self.hidden_size)] * 2
        return features[0][0]

    def remember(self, context: Context, c: mx.array) -> None:
        context.offset += c.shape[0]

    def propose(
        self, anchor: mx.array, context: Context, count: int, embed: Any, head: Any, choose: Any
    ) -> Proposals:
        assert anchor.shape == (1,)
        following = self.text[context.offset + 1 : context.offset + 1 + count]
        tokens = []
        for i in range(count):
            token = following[i] if i < len(following) else 0
            if self.random.random() >= self.right:
                token = (token + self.random.randrange(1, self.vocab)) % self.vocab
            tokens.append(token)
        return Proposals(mx.array(tokens))
