"""Processes that run cases one after the other, watched: none may crash, hang or eat the memory."""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SECONDS = 20.0
MEMORY = 8 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: its number; kind and seed give it again.
        command: the arguments of `dflash-mlx`.
        code: exit code, or None where the process died or was stopped.
        said: the last line on stderr, or how the process ended.
        problem: what must not be; empty where all is well.
    """

    kind: str
    case: int
    command: Sequence[str]
    code: int | None
    said: str
    problem: str = ""


def run_cases(
    jobs: Sequence[tuple[str, int]], seed: int, processes: int = 1, keep: Path | None = None
) -> Iterator[Outcome]:
    """Run cases, given by kind and number, in processes that are replaced when they die.

    Args:
        jobs: kinds and numbers.
        seed: with a kind and a number, it makes a case.
        processes: how many at once.
        keep: a folder that the inputs of failed cases are moved to.
    """
    with tempfile.TemporaryDirectory(prefix="dflash-mlx-fuzz-") as folder:
        pool = [_Worker(seed, Path(folder) / str(i), keep) for i in range(processes)]
        waiting = list(reversed(jobs))
        try:
            for worker in pool:
                if waiting:
                    worker.give(waiting.pop())
            while busy := [worker for worker in pool if worker.job is not None]:
                wait([worker.connection for worker in busy], timeout=0.5)
                for worker in busy:
                    outcome = worker.outcome()
                    if outcome is None:
                        continue
                    yield outcome
                    if waiting:
                        worker.give(waiting.pop())
        finally:
            for worker in pool:
                worker.stop()


@dataclass
class _Worker:
    """One process, and the case that it is at."""

    seed: int
    folder: Path
    keep: Path | None
    job: tuple[str, int] | None = None
    process: Any = field(default=None, repr=False)
    connection: Any = field(default=None, repr=False)

    def give(self, job: tuple[str, int]) -> None:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(
                target=_serve, args=(theirs, self.seed, self.folder, self.keep), daemon=True
            )
            self.process.start()
            theirs.close()
            # Bases are written and modules imported before the first case's time runs.
            self._receive(120.0)
        self.job, self.command = job, []
        self.connection.send(job)
        self.deadline = time.monotonic() + SECONDS

    def outcome(self) -> Outcome | None:
        """The running case's, if it is there; a hang ends here, too."""
        assert self.job is not None
        found: Any = None
        ending = ""
        try:
            if self.connection.poll():
                found = self._receive(1.0)
                if isinstance(found, list):
                    self.command = found
                    return None
            else:
                if time.monotonic() < self.deadline:
                    return None
                ending = f"no end after {SECONDS:.0f} s"
        except (EOFError, OSError):
            self.process.join(5)
            ending = f"the process ended with {self.process.exitcode}"
        kind, case = self.job
        self.job = None
        if isinstance(found, Outcome):
            return found
        self.stop()
        if self.keep is not None and (self.folder / "case").is_dir():
            shutil.copytree(self.folder / "case", self.keep / f"{kind}-{case}", dirs_exist_ok=True)
        return Outcome(kind, case, self.command, None, ending, ending)

    def _receive(self, seconds: float) -> Any:
        if not self.connection.poll(seconds):
            raise OSError("nothing came")
        return self.connection.recv()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Connection, seed: int, folder: Path, keep: Path | None) -> None:
    from tests.fuzz.cases import Bases, build

    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "HOME"):
        os.environ[name] = str(folder / "home")
    shutil.rmtree(folder, ignore_errors=True)
    bases = Bases(folder / "bases")
    bases.warm_up()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    connection.send("ready")
    while True:
        kind, number = connection.recv()
        os.chdir(folder)
        shutil.rmtree(folder / "case", ignore_errors=True)
        (folder / "case").mkdir()
        # What a command writes beside itself is gone with the case.
        os.chdir(folder / "case")
        command, stdin = build(kind, seed, number, bases, folder / "case")
        connection.send(command)
        outcome = _run(kind, number, command, stdin)
        if outcome.problem and keep is not None:
            shutil.copytree(folder / "case", keep / f"{kind}-{number}", dirs_exist_ok=True)
        connection.send(outcome)


def _run(kind: str, number: int, command: list[str], stdin: bytes) -> Outcome:
    from tests.command_line import run

    result = run(*command, stdin=stdin)
    lines = result.stderr.splitlines()
    sentences = [line for line in lines if line.startswith("dflash-mlx: ")]
    said = sentences[0] if sentences else (lines[-1] if lines else "")
    problem = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        problem = "".join(traceback.format_exception(result.exception))
    elif said.startswith("dflash-mlx: Unexpected ") or "Traceback" in result.stderr:
        problem = said
    elif result.exit_code not in (0, 1, 2):
        problem = f"exit code {result.exit_code}"
    elif result.exit_code and len(sentences) != 1:
        problem = f"{len(sentences)} sentences: {result.stderr[-300:]}"
    return Outcome(kind, number, command, result.exit_code, said, problem)
