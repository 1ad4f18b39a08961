"""A training run's directory: the draft, and under `training/` what a resumed run needs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from dflash_mlx.draft.dtype import parameters
from dflash_mlx.errors import DFlashError
from dflash_mlx.training.state import write_arrays
from dflash_mlx.training.trainer import Trainer


class TrainingDirectory:
    """Where a draft grows. Each file is written beside its place and moved there."""

    def __init__(self, path: Path):
        self.path = path
        self.state = path / "training" / "state.safetensors"
        self.log = path / "training" / "log.jsonl"
        self._options = path / "training" / "options.json"

    def check_new(self) -> bool:
        """False, as nothing is saved there yet.

        Raises:
            DFlashError: something is there already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            hint = "; --resume goes on with the run in it" if self._options.exists() else ""
            raise DFlashError(f"{self.path} exists already{hint}; give another output.")
        return False

    def begin(self, options: Mapping[str, Any]) -> None:
        """Make the directory of a new run; raises DFlashError if it cannot be written."""
        with self.writing():
            self.log.parent.mkdir(parents=True, exist_ok=True)
            _write_json(self._options, options)

    def resume(self, options: Mapping[str, Any]) -> bool:
        """Go on with the run that is there; whether it has been saved yet.

        Raises:
            DFlashError: there is none, or it was given other options.
        """
        try:
            before = json.loads(self._options.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DFlashError(
                f"{self.path} holds no training run to resume; leave out --resume to begin one."
            ) from error
        for name, value in options.items():
            if before.get(name) != value and name == "data":
                raise DFlashError(
                    f"The data has changed since the run in {self.path} was begun; resume it with "
                    "the same data, or give another output."
                )
            if before.get(name) != value:
                raise DFlashError(
                    f"The run in {self.path} has {name} {before.get(name)!r} and not {value!r}; "
                    "resume it with the options that it was begun with, or give another output."
                )
        return self.state.exists()

    def save(self, trainer: Trainer, config: Mapping[str, Any], dtype: mx.Dtype, card: str) -> None:
        """Write the draft as published ones are, and the state to resume from."""
        weights = {name: array.astype(dtype) for name, array in parameters(trainer.draft).items()}
        with self.writing():
            trainer.save(self.state)
            write_arrays(self.path / "model.safetensors", weights)
            _write(self.path / "README.md", card)
            # Last, as it is what makes the directory a draft.
            _write_json(self.path / "config.json", config)

    def append(self, entry: Mapping[str, Any]) -> None:
        """A line of the log."""
        with self.writing(), open(self.log, "a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")

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
            _write(self.log, "".join(kept))

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
    _write(file, json.dumps(dict(content), indent=2) + "\n")


def _write(file: Path, text: str) -> None:
    partial = file.with_name("partial-" + file.name)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
