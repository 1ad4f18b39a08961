"""Context features as one array, and as the decode loop has them."""

import mlx.core as mx

from dflash_mlx.draft import Context, DFlashDraft


def extend(draft: DFlashDraft, context: Context, features: mx.array) -> None:
    """Add positions to a draft's context by features [1, n, taps * Ht], one tap after the other."""
    draft.extend(context, mx.split(features, len(draft.target_layer_ids), axis=-1))
