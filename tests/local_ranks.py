"""Several ranks over loopback, as mlx.launch starts them: MLX's ring backend on this machine."""

import json
import os
import socket
import subprocess
from pathlib import Path

from tests.command_line import PROGRAM


def start(
    folder: Path, size: int, command: list[str], stdin: int = subprocess.DEVNULL
) -> list[subprocess.Popen]:
    """One process for each rank; `stdin` is rank 0's."""
    sockets = [socket.socket() for _ in range(size)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts), encoding="utf-8")
    return [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if rank else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "MLX_HOSTFILE": str(file),
                "MLX_RANK": str(rank),
                "HF_HUB_OFFLINE": "1",
            },
        )
        for rank in range(size)
    ]


def finish(ranks: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        return [(*rank.communicate(timeout=seconds), rank.returncode)[::-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("dflash-mlx: ")]


def listen(rank: subprocess.Popen, last: str) -> str:
    """What a rank says on stderr, up to these words."""
    assert rank.stderr is not None
    seen = ""
    while not seen.endswith(last):
        character = rank.stderr.read(1)
        assert character, seen
        seen += character
    return seen


def generate(*more: str) -> list[str]:
    prompt = ["--prompt", "Hello, I am Zokkim from Tunremisk."]
    return [*PROGRAM, "generate", *prompt, "--verify-length", "15", *more]


def serve(*more: str) -> list[str]:
    return [*PROGRAM, "serve", "--port", "0", "--verify-length", "15", *more]


def chat(*more: str) -> list[str]:
    return [*PROGRAM, "chat", "--verify-length", "15", *more]


def bench(*more: str) -> list[str]:
    return [*PROGRAM, "bench", "--repeats", "1", "--verify-length", "15", *more]


def endless() -> list[str]:
    """A text that does not end by itself soon: every end token is unlikely once it has begun."""
    return [
        *PROGRAM,
        "generate",
        "--prompt",
        "zzz qqq",
        "--verify-length",
        "2",
        "--temp",
        "50",
        "--max-tokens",
        "100000",
    ]
