"""In which dtype a draft computes on this machine, whatever it is stored in."""

import re
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from dflash_mlx.draft.model import DFlashDraft


def bfloat16_is_native() -> bool:
    """Whether the default device has bfloat16 itself; a CPU and the M1 and M2 emulate it."""
    device = mx.default_device()
    if device.type == mx.cpu:
        return False
    # Apple's GPU generations: 13 is the M1, 14 the M2, 15 the M3.
    architecture = str(mx.device_info(device).get("architecture", ""))
    generation = re.match(r"applegpu_g(\d+)", architecture)
    return generation is None or int(generation[1]) >= 15


def activation_dtype(stored: mx.Dtype, quantized: bool, native: bool) -> mx.Dtype:
    """The dtype of a draft's activations.

    float16 is for storage only: context features leave its range, and the draft then proposes
    noise without any error.

    Args:
        stored: what the draft's weights (or their scales) are stored in.
        quantized: whether it has quantized layers.
        native: whether the device has bfloat16 itself.
    """
    if stored == mx.float16 or (quantized and stored == mx.bfloat16):
        return mx.bfloat16 if native else mx.float32
    return stored


def parameters(draft: DFlashDraft) -> dict[str, mx.array]:
    """A draft's arrays by their published names, in the draft's order."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(draft.parameters())))


def stored_dtype(draft: DFlashDraft) -> mx.Dtype:
    """The floating dtype that most of a draft's parameters are stored in."""
    nbytes: dict[mx.Dtype, int] = {}
    for array in parameters(draft).values():
        if mx.issubdtype(array.dtype, mx.floating):
            nbytes[array.dtype] = nbytes.get(array.dtype, 0) + array.nbytes
    return max(nbytes, key=lambda dtype: nbytes[dtype])


def is_quantized(draft: DFlashDraft) -> bool:
    """Whether any layer of a draft is quantized."""
    return any("scales" in module for module in draft.modules())


def set_activation_dtype(draft: DFlashDraft) -> None:
    """Cast a draft's floating parameters, lazily, to the dtype that it computes in here."""
    draft.set_dtype(
        activation_dtype(stored_dtype(draft), is_quantized(draft), bfloat16_is_native())
    )
