"""dflash-mlx launch: a program that talks to the server, told where it is."""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import typer

from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.screen import err, note
from dflash_mlx.errors import DFlashError

_PROVIDER = "dflash"

Program = Annotated[
    str, typer.Argument(metavar="claude|codex|opencode|pi", help="The program to start.")
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- ARGS]", help="What to give the program.", show_default=False),
]
Url = Annotated[str, typer.Option(help="Where the server is.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="DFLASH_MLX_API_KEY",
        help="The server's key, if it wants one.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only print what would be set and started.")
]


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: its address, without a path.
        key: a key for it; any word where it wants none.
        model: the name of its model.
        positions: tokens that prompt and answer may have together.
    """

    url: str
    key: str
    model: str
    positions: int


@dataclass
class Start:
    """How a program is started.

    Attributes:
        environment: variables that it needs.
        arguments: what its command line begins with.
        file: an option and the text of the file that it names, which is written to a temporary
            place and removed afterwards.
    """

    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    file: tuple[str, str] | None = None


def _claude(server: Server) -> Start:
    models = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{m}_MODEL" for m in _CLAUDES))
    return Start(
        {
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": server.key,
            "ANTHROPIC_API_KEY": "",
            **dict.fromkeys(models, server.model),
            "ANTHROPIC_SMALL_FAST_MODEL": server.model,
            # A local model is slow to begin, and nothing here reports to anybody.
            "API_TIMEOUT_MS": "3000000",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
    )


_CLAUDES = ("OPUS", "SONNET", "HAIKU")


def _codex(server: Server) -> Start:
    provider = f"model_providers.{_PROVIDER}"
    settings = {
        "model": server.model,
        "model_provider": _PROVIDER,
        f"{provider}.name": "dflash-mlx",
        f"{provider}.base_url": f"{server.url}/v1",
        f"{provider}.wire_api": "responses",
        f"{provider}.env_key": "DFLASH_MLX_API_KEY",
        "model_context_window": server.positions,
    }
    # JSON's strings and numbers are TOML's.
    pairs = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    return Start(
        {"DFLASH_MLX_API_KEY": server.key}, [part for pair in pairs for part in ("-c", pair)]
    )


def _opencode(server: Server) -> Start:
    limit = {"context": server.positions, "output": server.positions // 4}
    config = {
        "model": f"{_PROVIDER}/{server.model}",
        "small_model": f"{_PROVIDER}/{server.model}",
        "provider": {
            _PROVIDER: {
                "npm": "@ai-sdk/openai-compatible",
                "name": "dflash-mlx",
                "options": {"baseURL": f"{server.url}/v1", "apiKey": server.key},
                "models": {server.model: {"name": server.model, "limit": limit}},
            }
        },
    }
    return Start({"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


# An extension, since pi reads providers from nowhere else but a file of the user's own.
_PI = """export default (pi) => pi.registerProvider({name}, {provider});
"""


def _pi(server: Server) -> Start:
    model = {
        "id": server.model,
        "name": server.model,
        "reasoning": False,
        "input": ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": server.positions,
        "maxTokens": server.positions // 4,
    }
    provider = {
        "baseUrl": f"{server.url}/v1",
        "apiKey": "DFLASH_MLX_API_KEY",
        "api": "openai-completions",
        "models": [model],
    }
    text = _PI.format(name=json.dumps(_PROVIDER), provider=json.dumps(provider))
    return Start(
        {"DFLASH_MLX_API_KEY": server.key},
        ["--provider", _PROVIDER, "--model", server.model],
        ("--extension", text),
    )


PROGRAMS: dict[str, Callable[[Server], Start]] = {
    "claude": _claude,
    "codex": _codex,
    "opencode": _opencode,
    "pi": _pi,
}


def launch(
    program: Program,
    arguments: Arguments = None,
    url: Url = "http://127.0.0.1:8080",
    api_key: ApiKey = None,
    dry_run: DryRun = False,
) -> None:
    """Start a coding agent on a running `dflash-mlx serve`; none of its files are changed."""
    if program not in PROGRAMS:
        raise UsageError(f"{program!r} is not one of {', '.join(PROGRAMS)}.")
    server = _ask(url.rstrip("/").removesuffix("/v1"), api_key)
    path = shutil.which(program)
    if path is None and not dry_run:
        raise DFlashError(f"{program} is not installed, or not on the PATH.")
    start = PROGRAMS[program](server)
    with tempfile.TemporaryDirectory(prefix="dflash-mlx-") as folder:
        command = [path or program, *start.arguments]
        if start.file is not None:
            option, text = start.file
            file = Path(folder, "provider.mjs")
            file.write_text(text, encoding="utf-8")
            command += [option, str(file)]
        command += arguments or []
        _show(start.environment, [program, *command[1:]], api_key)
        if not dry_run:
            raise typer.Exit(_run(command, start.environment))


def _ask(url: str, key: str | None) -> Server:
    """The server at an address.

    Raises:
        DFlashError: there is none, or it wants another key.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urlopen(Request(f"{url}/v1/models", headers=headers), timeout=10) as answer:
            (model, *_) = json.load(answer)["data"]
            positions = model.get("max_model_len") or 32768
            return Server(url, key or "none", model["id"], positions)
    except HTTPError as error:
        if error.code == 401:
            raise DFlashError(f"The server at {url} wants a key; give it by --api-key.") from error
        raise DFlashError(f"{url} answers with status {error.code}; is it our server?") from error
    except (URLError, OSError) as error:
        raise DFlashError(
            f"No server answers at {url}; start one by `dflash-mlx serve`, or give its --url."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DFlashError(f"What answers at {url} is no such server.") from error


def _show(environment: dict[str, str], command: list[str], secret: str | None) -> None:
    note("Set for this program only:")
    lines = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    for line in (*lines, shlex.join(command)):
        shown = line.replace(secret, "…") if secret else line
        err.print(f"  {shown}", markup=False, soft_wrap=True)


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a program in this terminal, which is its own to interrupt; its exit code."""
    process = subprocess.Popen(command, env={**os.environ, **environment})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
