"""A training run's directory: the draft, and under `training/` what a resumed run needs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from dflash_mlx.errors import DFlashError
from dflash_mlx.files import replace_file
from dflash_mlx.repository import entries
from dflash_mlx.training.evaluation import Evaluation
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.state import State, write_arrays


class TrainingDirectory:
    """Where a draft grows. Each file is written as a whole."""

    def __init__(self, path: Path):
        self.path = path
        self.state = path / "training" / "state.safetensors"
        self.log = path / "training" / "log.jsonl"
        self.features = path / "training" / "features"
        self._options = path / "training" / "options.json"

    def check_new(self) -> None:
        """Raise DFlashError if something is there already."""
        if self.path.exists() and (not self.path.is_dir() or entries(self.path)):
            hint = "; --resume goes on with the run in it" if self._options.exists() else ""
            raise DFlashError(f"{self.path} exists already{hint}; give another output.")

    def begin(self, plan: Plan) -> None:
        """Make the directory of a new run; raises DFlashError if it cannot be written."""
        with self.writing():
            self.log.parent.mkdir(parents=True, exist_ok=True)
            _write_json(self._options, plan.options())

    def resume(self, plan: Plan) -> tuple[Plan, bool]:
        """Go on with the run that is there.

        Returns:
            The plan, with the steps of the run unless it asks for others, and whether the run has
            been saved yet.

        Raises:
            DFlashError: there is none, or it was given other options.
        """
        try:
            before = json.loads(self._options.read_text(encoding="utf-8"))
            steps = int(before["steps"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DFlashError(
                f"{self.path} holds no training run to resume; leave out --resume to begin one."
            ) from error
        plan = replace(plan, steps=plan.steps or steps, minutes=None)
        for name, value in plan.options().items():
            if name in ("steps", "minutes") or before.get(name) == value:
                continue
            if name == "data":
                raise DFlashError(
                    f"The data has changed since the run in {self.path} was begun; resume it with "
                    "the same data, or give another output."
                )
            raise DFlashError(
                f"The run in {self.path} has {name} {before.get(name)!r} and not {value!r}; "
                "resume it with the options that it was begun with, or give another output."
            )
        if plan.total_steps != steps:
            with self.writing():
                _write_json(self._options, plan.options())
        return plan, self.state.exists()

    def save(self, state: State, config: Mapping[str, Any], dtype: mx.Dtype, card: str) -> None:
        """Write the draft as published ones are, and the state to resume from."""
        weights = {name: array.astype(dtype) for name, array in state.weights.items()}
        with self.writing():
            state.save(self.state)
            write_arrays(self.path / "model.safetensors", weights)
            replace_file(self.path / "README.md", card)
            # Last, as it is what makes the directory a draft.
            _write_json(self.path / "config.json", config)

    def write_card(self, card: str) -> None:
        """Write the draft's README.md again."""
        with self.writing():
            replace_file(self.path / "README.md", card)

    def append(self, entry: Mapping[str, Any]) -> None:
        """A line of the log."""
        with self.writing(), open(self.log, "a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")

    def evaluations(self) -> list[Evaluation]:
        """The evaluations logged so far, in order."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        found = (entry for entry in map(json.loads, lines) if "acceptance_length" in entry)
        return [Evaluation(**entry) for entry in found]

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after a step that a resumed run goes on from."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break  # cut off as it was being written
            kept.append(line + "\n")
        with self.writing():
            replace_file(self.log, "".join(kept))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Says in one sentence why the directory cannot be written, if it cannot."""
        try:
            yield
        except OSError as error:
            raise DFlashError(
                f"{self.path} could not be written ({error.strerror or error}); what was saved "
                "before is whole. Free some room, or see to the permissions, and --resume."
            ) from error


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    replace_file(file, json.dumps(dict(content), indent=2) + "\n")
