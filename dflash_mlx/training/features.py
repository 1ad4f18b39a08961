"""The target's features of each sample, computed once and kept on disk while a run lasts."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dflash_mlx.training.batches import Batch, Sample

# How a dtype's bits are kept in NumPy, which has no bfloat16.
_BITS: dict[mx.Dtype, Any] = {
    mx.float32: np.dtype(np.uint32),
    mx.float16: np.dtype(np.uint16),
    mx.bfloat16: np.dtype(np.uint16),
}


class FeatureStore:
    """Features of samples, read back from the second time on that a sample is asked for.

    Each sample has its place in one file from the start, as far as the bytes allowed reach; the
    features of the others are computed every time. What was written before a run stopped serves
    when it goes on, so that a resumed run sees the same numbers.
    """

    def __init__(
        self,
        directory: Path,
        samples: Sequence[Sample],
        compute: Callable[[mx.array], mx.array],
        most_bytes: int,
    ):
        """Nothing is written yet.

        Args:
            directory: made when the first features come; `remove` deletes it.
            samples: those that batches are made of.
            compute: tokens [B, T] -> features [B, T, W], right as far as a row is no padding.
            most_bytes: of the file.
        """
        self.directory, self._compute = directory, compute
        shape = compute(mx.array([[0]]))  # not evaluated
        self._width, self._dtype, self._bits = shape.shape[-1], shape.dtype, _BITS[shape.dtype]
        self._data, self._marks = directory / "features.bin", directory / "kept.bin"
        lengths = np.array([len(sample.tokens) for sample in samples], dtype=np.int64)
        ends = np.cumsum(lengths)
        self._starts = ends - lengths
        self._fits = ends * self._width * self._bits.itemsize <= most_bytes
        self._kept = np.zeros(len(samples), dtype=np.uint8)
        if self._marks.is_file() and self._data.is_file():
            kept = np.fromfile(self._marks, dtype=np.uint8)
            if len(kept) == len(self._kept):
                self._kept = kept

    def features(self, batch: Batch) -> mx.array:
        """Features [B, T, width] of a batch; what stands on padding means nothing."""
        if not self._kept[batch.indices].all():
            features = self._compute(mx.array(batch.tokens))
            if self._fits[batch.indices].any():
                try:
                    self._write(batch, features)
                except OSError:  # no room: the run does without
                    self.remove()
                    self._fits[:] = False
            return features
        rows, columns = batch.tokens.shape
        bits = np.zeros((rows, columns, self._width), dtype=self._bits)
        for row, index in enumerate(batch.indices):
            length = int(batch.lengths[row])
            bits[row, :length] = self._place(int(index), length)
        return mx.array(bits).view(self._dtype)

    def remove(self) -> None:
        """Delete what is kept."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._kept[:] = 0

    def _write(self, batch: Batch, features: mx.array) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        bits = np.array(features.view(mx.uint32 if self._bits.itemsize == 4 else mx.uint16))
        with open(self._data, "r+b" if self._data.exists() else "w+b") as out:
            for row, index in enumerate(batch.indices):
                if self._fits[index] and not self._kept[index]:
                    out.seek(int(self._starts[index]) * self._width * self._bits.itemsize)
                    out.write(bits[row, : batch.lengths[row]].tobytes())
        new = self._kept.copy()
        new[batch.indices] |= self._fits[batch.indices]
        # The marks after the data: features that are marked are whole.
        new.tofile(self._marks)
        self._kept = new

    def _place(self, index: int, length: int) -> np.ndarray:
        start = int(self._starts[index]) * self._width * self._bits.itemsize
        count = length * self._width
        kept = np.fromfile(self._data, dtype=self._bits, count=count, offset=start)
        return kept.reshape(length, self._width)
