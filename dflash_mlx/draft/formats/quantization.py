"""MLX's `quantization` block of a config.json, checked before MLX sees it."""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.schema import Integer, Object, Word, either, read, shown
from dflash_mlx.errors import CheckpointError

# Bits and group sizes that MLX has kernels for; it dies of others.
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_MODES = {
    "affine": (AFFINE_BITS, AFFINE_GROUPS),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
_FIELDS = (
    Integer("bits", None, least=0, most=64),
    Integer("group_size", None, least=0),
    Word("mode", "affine", words=tuple(_MODES)),
)


def quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The block as it stands, once its settings and those of single layers are known to be MLX's.

    Raises:
        CheckpointError: they are not.
    """
    for name in ("quantization", "quantization_config"):
        block = read((Object(name, None),), config)[name]
        if block:
            _check(block, name)
            for path, own in block.items():
                if isinstance(own, dict):
                    _check(own, f"{name}.{path[:60]}")
            return block
    return None


def _check(block: Mapping[str, Any], label: str) -> None:
    values = read(_FIELDS, block, label=label)
    missing = [key for key in ("bits", "group_size") if values[key] is None]
    if missing:
        raise CheckpointError(
            f"The draft's config.json has a {label} block without {missing[0]}, so it is not "
            "MLX's; give a draft in the published format or one that was converted for MLX."
        )
    bits, groups = _MODES[values["mode"]]
    for key, legal in (("bits", bits), ("group_size", groups)):
        if values[key] not in legal:
            raise CheckpointError(
                f"The draft's config.json has {label}.{key} {shown(values[key])}; MLX has "
                f"{either(legal)} in the mode {values['mode']}."
            )
