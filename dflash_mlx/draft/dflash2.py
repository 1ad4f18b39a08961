"""The DFlash 2 draft: block convolutions, and a selector that scores whole chains of tokens."""

from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import DFlash2Config, DraftConfig
from dflash_mlx.draft.context import Context, LayerGroup
from dflash_mlx.draft.model import DFlashDraft, Layer
from dflash_mlx.draft.proposals import Choice, Proposals


class BlockConvolution(nn.Module):
    """Short causal convolutions before (side 0) and after (side 1) a sublayer.

    Each kernel is a fixed one per channel plus one per group of channels that depends on the
    sublayer's normed input u. Nothing reaches in from before the block.
    """

    def __init__(self, dim: int, kernel_size: int, group_size: int):
        super().__init__()
        self.kernel_size, self.group_size = kernel_size, group_size
        self.base_kernel = mx.zeros((2, kernel_size, dim))
        rows = 2 * kernel_size * (dim // group_size)
        self.kernel_projection = nn.Linear(dim, rows, bias=False)

    def kernels(self, u: mx.array) -> mx.array:
        """u [B, L, H] -> [B, L, 2, K, H], one kernel per row, side, tap and channel."""
        B, L, H = u.shape
        shape = (B, L, 2, self.kernel_size, H // self.group_size)
        dynamic = self.kernel_projection(u).reshape(shape)
        return self.base_kernel + mx.repeat(dynamic, self.group_size, axis=-1)

    @staticmethod
    def convolve(kernels: mx.array, x: mx.array) -> mx.array:
        """kernels [B, L, K, H] of one side over x [B, L, H]: row t sees rows t - K + 1 … t."""
        L, K = x.shape[1], kernels.shape[2]
        padded = mx.pad(x, [(0, 0), (K - 1, 0), (0, 0)])
        out = mx.zeros_like(x)
        for tap in range(K):
            first = K - 1 - tap
            out = out + kernels[:, :, tap] * padded[:, first : first + L]
        return out


class ConvolvedLayer(Layer):
    """A draft layer whose sublayers stand between convolutions driven by their normed input."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__(config, index)
        second = cast(DFlash2Config, config.dflash2)
        sizes = (config.hidden_size, second.conv_kernel_size, second.conv_group_size)
        self.attention_conv = BlockConvolution(*sizes)
        self.mlp_conv = BlockConvolution(*sizes)

    def __call__(
        self, x: mx.array, group: LayerGroup, index: int, rope: nn.Module, offset: int
    ) -> mx.array:
        u = self.input_layernorm(x)
        kernels, convolve = self.attention_conv.kernels(u), BlockConvolution.convolve
        out = self.self_attn(convolve(kernels[:, :, 0], u), group, index, rope, offset)
        x = x + convolve(kernels[:, :, 1], out)
        u = self.post_attention_layernorm(x)
        kernels = self.mlp_conv.kernels(u)
        return x + convolve(kernels[:, :, 1], self.mlp(convolve(kernels[:, :, 0], u)))


class CandidateSelector(nn.Module):
    """Scores each position's likeliest tokens by how well they follow the one chosen before.

    S_t(a, b) = logit_t(b) + <A[a] * (W h_t), B[b]>, h_t the block's normed hidden state.
    """

    def __init__(self, dim: int, vocab_size: int, rank: int):
        super().__init__()
        self.predecessor_codebook = mx.zeros((vocab_size, rank))
        self.successor_codebook = mx.zeros((vocab_size, rank))
        self.hidden_projection = nn.Linear(dim, rank, bias=False)

    def select(
        self,
        anchor: mx.array,
        hidden: mx.array,
        logits: mx.array,
        top_k: int,
        temperature: float,
    ) -> Proposals:
        """Choose one token after the other.

        Args:
            anchor: [1], the token before the first position.
            hidden: [m, H].
            logits: [m, V].
            top_k: candidates per position.
            temperature: 0 takes the best score; above, the tokens are drawn from
                softmax(S / temperature) over the candidates, which is then their sparse q.
        """
        logits = logits.astype(mx.float32)
        candidates = mx.argpartition(-logits, kth=top_k - 1, axis=-1)[:, :top_k]
        own = mx.take_along_axis(logits, candidates, axis=-1)
        projected = self.hidden_projection(hidden)
        successors = self.successor_codebook[candidates]
        tokens, q, confidence, before = [], [], [], anchor
        for t in range(hidden.shape[0]):
            driven = self.predecessor_codebook[before[0]] * projected[t]
            scores = own[t] + (successors[t] @ driven).astype(mx.float32)
            if temperature:
                scores = scores / temperature
                choice = mx.random.categorical(scores)
            else:
                choice = mx.argmax(scores)
            q.append(mx.softmax(scores))
            confidence.append(q[t][choice])
            before = candidates[t][choice][None]
            tokens.append(before)
        drawn = mx.concatenate(tokens)
        if temperature:
            return Proposals(drawn, mx.stack(q), candidates, mx.stack(confidence))
        return Proposals(drawn, confidence=mx.stack(confidence))


class DFlash2Draft(DFlashDraft):
    """A draft in the parameter tree published as `DFlash2DraftModel`."""

    layer_class = ConvolvedLayer
    # The selector draws a position given the one before, so its blocks hang together.
    samples_proposals = True

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        second = cast(DFlash2Config, config.dflash2)
        self.candidate_selector = CandidateSelector(
            config.hidden_size, config.vocab_size, second.selector_rank
        )

    def propose(
        self,
        anchor: mx.array,
        context: Context,
        count: int,
        embed: Callable[[mx.array], mx.array],
        head: Callable[[mx.array], mx.array],
        choose: Choice,
    ) -> Proposals:
        """As DFlash 1's, but the selector chooses; of `choose` only the temperature counts."""
        second = cast(DFlash2Config, self.config.dflash2)
        embeddings = embed(self._block(anchor))
        hidden = self(embeddings * second.input_embedding_scale, context)[:, 1 : count + 1]
        logits = head(hidden.astype(embeddings.dtype))[0]
        logits = self._capped(logits.astype(mx.float32) * second.output_multiplier)
        return self.candidate_selector.select(
            anchor, hidden[0], logits, second.selector_top_k, choose.temperature
        )
