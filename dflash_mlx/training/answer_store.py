"""A target's answers, kept in the user's cache directory so that none is ever asked for twice."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dflash_mlx.machine import cache_directory
from dflash_mlx.repository import entries
from dflash_mlx.training.batches import Sample


class AnswerStore:
    """One file a target: a line for each sequence that it answered, in the order they came.

    A line is found by the sequence that was asked and the most tokens allowed, so that other
    runs, with more rows or others, use it too.
    """

    def __init__(self, file: Path, length: int):
        """Reads what is there; a line that was being written when it was cut off is removed."""
        self.file, self.length = file, length
        self._known: dict[str, Sample] = {}
        if not file.exists():
            return
        whole = 0
        with open(file, "rb") as lines:
            for line in lines:
                try:
                    key, tokens, learn = json.loads(line)
                    sample = Sample(
                        np.array(tokens, dtype=np.int32), np.array([c == "1" for c in learn])
                    )
                except (ValueError, TypeError, RecursionError):
                    break
                if not line.endswith(b"\n") or len(tokens) != len(learn):
                    break
                self._known[str(key)] = sample
                whole += len(line)
        os.truncate(file, whole)

    @classmethod
    def of(cls, directories: Sequence[Path], length: int) -> "AnswerStore":
        """The store of a target.

        Args:
            directories: the target's, and its adapter's if it has one; the names, sizes and times
                of what is in them tell it apart from others and from what it was before.
            length: the most tokens of a sequence.
        """
        about = hashlib.sha256()
        for directory in directories:
            for file in [*entries(directory, "*.safetensors"), *entries(directory, "*.json")]:
                stat = file.stat()
                about.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return cls(cache_directory() / "answers" / f"{about.hexdigest()[:24]}.jsonl", length)

    def get(self, asked: Sample) -> Sample | None:
        """What became of a sequence, if it was answered before."""
        return self._known.get(self._key(asked))

    def add(self, asked: Sample, answered: Sample) -> None:
        """Keep an answer; it is in the file when this returns."""
        key = self._key(asked)
        learn = "".join(map(str, answered.learn.astype(int)))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps([key, answered.tokens.tolist(), learn]) + "\n")
        self._known[key] = answered

    def _key(self, asked: Sample) -> str:
        about = hashlib.sha256(f"{self.length} ".encode())
        about.update(asked.tokens.astype(np.int32).tobytes() + asked.learn.tobytes())
        return about.hexdigest()[:32]
