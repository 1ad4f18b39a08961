"""What a conversion is asked to do."""

from dataclasses import dataclass

import mlx.core as mx

from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.quantize import Quantization, dequantize_draft, quantize_draft
from dflash_mlx.errors import DFlashError

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True)
class Task:
    """What is asked for: one of quantizing and dequantizing, or neither, and a dtype."""

    wanted: Quantization | None
    dequantize: bool
    dtype: str | None
    keep: tuple[str, ...]

    @classmethod
    def choose(
        cls,
        bits: int | None,
        group_size: int | None,
        mode: str,
        dtype: str | None,
        keep: tuple[str, ...],
        dequantize: bool,
    ) -> "Task":
        """The task of `convert`'s arguments.

        Raises:
            DFlashError: they do not go together, or MLX lacks them.
        """
        quantizing = bits is not None or group_size is not None or mode != "affine"
        if quantizing and dequantize:
            raise DFlashError("A draft is quantized or dequantized, not both; leave one out.")
        if dtype is not None and dtype not in DTYPES:
            raise DFlashError(f"There is no dtype {dtype}; give one of {', '.join(DTYPES)}.")
        if not quantizing and not dequantize and dtype is None:
            raise DFlashError(
                "Nothing is asked for; give 4 or 8 bits, a mode, dequantize, or a dtype."
            )
        if keep and not quantizing:
            raise DFlashError("Layers can be kept only where others are quantized; give bits too.")
        wanted = Quantization.choose(bits, group_size, mode) if quantizing else None
        return cls(wanted, dequantize, dtype, keep)

    @property
    def words(self) -> str:
        """The task in words."""
        what = "dequantized" if self.dequantize else "as stored"
        if self.wanted is not None:
            bits, mode, group = self.wanted.bits, self.wanted.mode, self.wanted.group_size
            what = f"{bits} bit, {mode}, group size {group}"
        return f"{what}, {self.dtype}" if self.dtype else what

    @property
    def suffix(self) -> str:
        """What to append to a draft's name."""
        if self.wanted is None:
            return self.dtype or "dequantized"
        return f"{self.wanted.bits}bit" if self.wanted.mode == "affine" else self.wanted.mode

    def apply(self, draft: DFlashDraft) -> dict[str, str]:
        """Change a draft lazily; returns why layers were left, by path."""
        if self.dtype is not None:
            draft.set_dtype(DTYPES[self.dtype])
        if self.wanted is not None:
            return quantize_draft(draft, self.wanted, self.keep)
        if self.dequantize:
            dequantize_draft(draft)
        return {}
