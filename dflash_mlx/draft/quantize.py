"""Which layers of a draft are quantized, and how: the same for files and in memory."""

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from dflash_mlx.draft.dtype import stored_dtype
from dflash_mlx.draft.formats import Packaging
from dflash_mlx.draft.model import DFlashDraft
from dflash_mlx.errors import CheckpointError, DFlashError

# Legal bits and group sizes of each mode; the first group size is the default.
LEGAL: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


@dataclass(frozen=True)
class Quantization:
    """How a layer is quantized: `bits` a weight, a scale for each `group_size` of a row."""

    group_size: int
    bits: int
    mode: str

    @classmethod
    def choose(
        cls, bits: int | None = None, group_size: int | None = None, mode: str = "affine"
    ) -> "Quantization":
        """Settings that MLX has; None is the mode's own, if it has one.

        Raises:
            DFlashError: a value that the mode does not have; the message lists those it has.
        """
        if mode not in LEGAL:
            raise DFlashError(f"There is no mode {mode}; give {_either(LEGAL)}.")
        all_bits, group_sizes = LEGAL[mode]
        if bits is None and len(all_bits) == 1:
            bits = all_bits[0]
        if bits not in all_bits:
            said = "needs its bits" if bits is None else f"has no {bits} bits"
            raise DFlashError(f"Mode {mode} {said}; give {_either(all_bits)} bits.")
        group_size = group_sizes[0] if group_size is None else group_size
        if group_size not in group_sizes:
            legal = _either(sorted(group_sizes))
            raise DFlashError(f"Mode {mode} has no group size {group_size}; give {legal}.")
        return cls(group_size, bits, mode)

    @classmethod
    def of(cls, layer: nn.Module) -> "Quantization | None":
        """The settings of a layer; None at full precision."""
        return cls(layer.group_size, layer.bits, layer.mode) if "scales" in layer else None

    def __str__(self) -> str:
        return f"{self.bits} bit {self.mode}/{self.group_size}"


def linear_layers(draft: DFlashDraft) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every layer that is quantized or could be, in the draft's order.

    Norms, convolution base kernels and codebooks are not among them.
    """
    leaves = tree_flatten(draft.leaf_modules(), is_leaf=nn.Module.is_module)
    for path, module in cast(list[tuple[str, nn.Module]], leaves):
        if hasattr(module, "to_quantized") or "scales" in module:
            yield path, module


def width(layer: nn.Module) -> int:
    """Inputs of a linear layer."""
    packed = layer.weight.shape[-1]
    return packed * 32 // layer.bits if "scales" in layer else packed


def quantize_draft(
    draft: DFlashDraft, wanted: Quantization, keep: Sequence[str] = ()
) -> dict[str, str]:
    """Quantize a draft's linear layers, in place and lazily.

    Layers that are quantized otherwise already are dequantized first.

    Args:
        draft: at full precision, or quantized to no fewer bits than wanted.
        wanted: how.
        keep: patterns as of file names; layers whose path matches one are left as they are.

    Returns:
        Why a layer was left as it was, by path.

    Raises:
        DFlashError: a pattern matches no layer, no layer can be quantized, or the draft has fewer
            bits already.
    """
    layers = dict(linear_layers(draft))
    for pattern in keep:
        if not any(fnmatchcase(path, pattern) for path in layers):
            some = ", ".join(list(layers)[:3])
            raise DFlashError(f"No layer matches {pattern}; the draft's layers are {some}, ….")
    dtype = stored_dtype(draft)
    left: dict[str, str] = {}
    changed: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        now = Quantization.of(layer)
        if any(fnmatchcase(path, pattern) for pattern in keep):
            left[path] = "kept"
        elif layer.weight.shape[0] < 2:
            left[path] = "one output"
        elif width(layer) % wanted.group_size:
            left[path] = f"{width(layer)} wide, which {wanted.group_size} does not divide"
        elif now is not None and now.bits < wanted.bits:
            raise DFlashError(
                f"The draft is quantized to {now.bits} bits already, and {wanted.bits} would only "
                "make it larger; use it as it is, or quantize the original."
            )
        elif now != wanted:
            plain = layer if now is None else dequantized(layer, dtype)
            changed[path] = plain.to_quantized(**asdict(wanted))
    if not changed and len(left) == len(layers):
        raise DFlashError(
            f"No layer of this draft can be quantized with group size {wanted.group_size}, or all "
            "are kept; give another group size or keep fewer."
        )
    draft.update_modules(tree_unflatten(list(changed.items())))
    draft.eval()
    return left


def dequantize_draft(draft: DFlashDraft) -> None:
    """Bring all layers of a draft back to full precision, in place and lazily.

    Raises:
        DFlashError: none is quantized.
    """
    dtype = stored_dtype(draft)
    layers = [(path, layer) for path, layer in linear_layers(draft) if "scales" in layer]
    if not layers:
        raise DFlashError("The draft is not quantized, so there is nothing to dequantize.")
    draft.update_modules(
        tree_unflatten([(path, dequantized(layer, dtype)) for path, layer in layers])
    )


def dequantized(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The full-precision layer that a quantized one stands for, lazily."""
    plain: nn.Module = nn.Linear(1, 1, bias=False)
    if isinstance(layer, nn.QuantizedEmbedding):
        plain = nn.Embedding(1, 1)
    plain.weight = weight_rows(layer, 0, layer.weight.shape[0]).astype(dtype)
    if "bias" in layer:
        plain.bias = layer.bias
    return plain


def weight_rows(layer: nn.Module, start: int, stop: int) -> mx.array:
    """Rows of the weight that a layer stands for, [stop - start, width], lazily."""
    if "scales" not in layer:
        return layer.weight[start:stop]
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight[start:stop],
        layer.scales[start:stop],
        None if biases is None else biases[start:stop],
        layer.group_size,
        layer.bits,
        layer.mode,
    )


def quantization_block(
    draft: DFlashDraft, packaging: Packaging | None = None
) -> dict[str, Any] | None:
    """mlx-lm's `quantization` block for a draft as it is; None when no layer is quantized.

    The commonest settings stand at the top; other layers have their own, or false, under the
    packaging's names, or ours where none is given.
    """
    found = {path: Quantization.of(layer) for path, layer in linear_layers(draft)}
    counts = Counter(settings for settings in found.values() if settings is not None)
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    block: dict[str, Any] = asdict(common)
    for path, settings in found.items():
        if settings != common:
            name = path if packaging is None else packaging.theirs(path)
            block[name] = False if settings is None else asdict(settings)
    return block


def quantize_like(
    draft: DFlashDraft,
    block: dict[str, Any],
    tensors: Container[str],
    packaging: Packaging | None = None,
) -> None:
    """Give a draft the quantized layers that a checkpoint has, for its weights to be loaded into.

    Args:
        draft: at full precision; changed in place.
        block: the config's `quantization`, with settings of single layers under their paths.
        tensors: names in the checkpoint, ours; a layer with scales among them is quantized.
        packaging: whose names the block uses; None for ours.

    Raises:
        CheckpointError: settings that MLX does not have.
    """

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in tensors:
            return False
        if packaging is not None:
            path = packaging.theirs(path)
        own = block.get(path, block.get(f"model.{path}", True))
        return dict(own) if isinstance(own, dict) else bool(own)

    try:
        nn.quantize(
            draft,
            group_size=block["group_size"],
            bits=block["bits"],
            mode=block.get("mode", "affine"),
            class_predicate=settings,
        )
    except KeyError as error:
        raise CheckpointError(
            f"The draft's config.json has a quantization block without {error}, so it is not "
            "MLX's; give a draft in the published format or one that was converted for MLX."
        ) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The draft's config.json has a quantization block that cannot be used: {error}."
        ) from error


def _either(values: Any) -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} or {last}" if first else last
