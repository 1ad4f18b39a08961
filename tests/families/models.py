"""Tiny random models of every family, float32."""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from tests.families.configs import CONFIGS, REFUSED, WIDE

GAIN = 3.0


def lively(path: str, value: Any) -> Any:
    """Give constant parameters random values, so that no part of a model is idle."""
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        return value
    noise = mx.random.normal(value.shape)
    if value.ndim and bool(mx.all(value == value.flatten()[0])):
        return value + 0.2 * noise
    if value.ndim >= 2 and "embed" not in path and "lm_head" not in path:
        # Wider than the default, so that the text depends on the context.
        return value * GAIN
    return value


def configure(module: str, config: dict[str, Any]) -> nn.Module:
    """Build an mlx-lm model from its module name and configuration."""
    source = importlib.import_module(f"mlx_lm.models.{module}")
    config = {"model_type": module, **config}
    return source.Model(source.ModelArgs.from_dict(config))


HALF = "@bfloat16"


def _half(model: nn.Module) -> None:
    """Cast as mlx-lm does when it converts: what the family wants in float32 stays so."""
    wanted = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, value: Any) -> Any:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(mx.bfloat16) if floating and wanted(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def build(family: str, seed: int = 0) -> nn.Module:
    """A tiny random model of a family, evaluated; "family@bfloat16" for one in bfloat16."""
    family, _, half = family.partition("@")
    module, config = ({**CONFIGS, **WIDE}.get(family) or REFUSED[family])[:2]
    mx.random.seed(1000 + seed)
    model = configure(module, config)
    model.update(tree_map_with_path(lively, model.parameters()))
    if half:
        _half(model)
    mx.eval(model.parameters())
    return model
