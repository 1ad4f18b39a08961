"""What a conversion did, in figures."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """One linear layer.

    Attributes:
        path: its name in the draft.
        shape: outputs and inputs.
        before, after: dtype or quantization.
        bytes_before, bytes_after: of all its arrays.
        quantized: whether it is quantized afterwards.
        left: why it was left as it was; None where it was not.
        error: norm of the weight's change over the norm of the weight; None in a dry run.
    """

    path: str
    shape: tuple[int, int]
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    quantized: bool
    left: str | None = None
    error: float | None = None


@dataclass
class Measured:
    """A draft at work: mean tokens per target forward, and the time of one draft forward."""

    acceptance_length: float
    draft_forward_ms: float


@dataclass
class CheckReport:
    """The draft before and after, on the same prompts with the same target.

    Attributes:
        target: its directory or hub id.
        tokens: how many each of the two generated.
        same_text: whether both gave the same tokens.
        before, after: the figures.
    """

    target: str
    tokens: int
    same_text: bool
    before: Measured
    after: Measured


@dataclass
class Report:
    """A conversion.

    Attributes:
        source, output: directory or hub id, and the new directory.
        settings: what was asked for, in words.
        tensors_before, tensors_after: how many arrays.
        bytes_before, bytes_after: of all arrays.
        weights: numbers that the draft's arrays stand for.
        layers: the linear layers.
        written: whether the output exists; false after a dry run.
        peak_memory: most bytes that MLX held at once; 0 in a dry run.
        check: figures before and after; None unless asked for.
    """

    source: str
    output: str
    settings: str
    tensors_before: int
    tensors_after: int
    bytes_before: int
    bytes_after: int
    weights: int
    layers: list[LayerReport] = field(default_factory=list)
    written: bool = False
    peak_memory: int = 0
    check: CheckReport | None = None

    @property
    def quantized_share(self) -> float:
        """Share of all weights that are quantized afterwards."""
        return self._quantized / self.weights

    @property
    def linear_share(self) -> float:
        """Share of the linear layers' weights that are quantized afterwards."""
        return self._quantized / sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def _quantized(self) -> int:
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers if layer.quantized)

    @property
    def worst_error(self) -> LayerReport | None:
        """The layer that changed most; None in a dry run."""
        measured = [layer for layer in self.layers if layer.error is not None]
        return max(measured, key=lambda layer: layer.error or 0.0, default=None)

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the layers that were converted; None when none was measured."""
        errors = [
            layer.error for layer in self.layers if layer.error is not None and layer.left is None
        ]
        return sum(errors) / len(errors) if errors else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        worst = self.worst_error
        return asdict(self) | {
            "quantized_share": self.quantized_share,
            "linear_share": self.linear_share,
            "mean_error": self.mean_error,
            "worst_error": worst.error if worst else None,
            "worst_layer": worst.path if worst else None,
        }
