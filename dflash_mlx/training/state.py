"""A training run's state in one file: weights, optimizer, step. Written whole or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from dflash_mlx.files import replacing


@dataclass(frozen=True)
class State:
    """Where a run is: computed arrays, which any thread can write.

    Attributes:
        step: how many are done.
        weights, optimizer: arrays by their dotted names.
    """

    step: int
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]

    @classmethod
    def of(cls, model: nn.Module, optimizer: optim.Optimizer, step: int) -> "State":
        """The state after `step` steps; what is not computed yet is."""
        state = cls(step, flat(model.parameters()), flat(optimizer.state))
        mx.eval(state.weights, state.optimizer)
        return state

    def save(self, file: Path) -> None:
        """Write it."""
        arrays = {f"model.{name}": value for name, value in self.weights.items()}
        arrays |= {f"optimizer.{name}": value for name, value in self.optimizer.items()}
        write_arrays(file, arrays | {"step": mx.array(self.step)})


def restore_state(file: Path, model: nn.Module, optimizer: optim.Optimizer) -> int:
    """Put a saved state into model and optimizer; returns its step."""
    parts: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
    arrays: Any = mx.load(str(file))
    step = int(arrays.pop("step").item())
    for key, value in arrays.items():
        part, name = key.split(".", 1)
        parts[part].append((name, value))
    model.load_weights(parts["model"])
    optimizer.state = tree_unflatten(parts["optimizer"])
    return step


def flat(tree: Any) -> dict[str, mx.array]:
    """A tree of arrays by their dotted names."""
    return dict(cast(list, tree_flatten(tree)))


def write_arrays(file: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file as a whole.

    Raises:
        OSError: it could not be written; nothing is left of it then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        try:
            mx.save_safetensors(str(partial), arrays, {"format": "mlx"})
        except RuntimeError as error:
            raise OSError(f"{error}") from error
