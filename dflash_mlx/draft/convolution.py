"""DFlash 2's short convolutions over the rows of a block."""

import mlx.core as mx
import mlx.nn as nn


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
