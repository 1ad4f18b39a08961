"""dflash-mlx serve: the model over HTTP."""

import logging
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper

import dflash_mlx
from dflash_mlx.cli import options, ranks
from dflash_mlx.cli.groups import (
    CacheOptions,
    PairOptions,
    PromptOptions,
    ProposingOptions,
    SamplingOptions,
    grouped,
)
from dflash_mlx.cli.loading import Loaded, load_pair
from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.screen import err, note
from dflash_mlx.decode import Options
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.machine import memory_bytes
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.server.app import create_app
from dflash_mlx.server.engine import Engine
from dflash_mlx.server.following import follow
from dflash_mlx.server.http import HttpServer, address, listen
from dflash_mlx.server.job import Sampling
from dflash_mlx.server.prompts import Prompts
from dflash_mlx.server.protection import Protection
from dflash_mlx.server.service import Defaults, Service

_SERVER = "Server"
_HERE = ("127.0.0.1", "::1", "localhost")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

Host = Annotated[
    str,
    typer.Option(
        help="The address to listen on; any but this machine's own needs a key, or --no-auth.",
        rich_help_panel=_SERVER,
    ),
]
Port = Annotated[
    int,
    typer.Option(min=0, max=65535, help="The port; 0 is any.", rich_help_panel=_SERVER),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="DFLASH_MLX_API_KEY",
        help="A key that clients must send.",
        show_default=False,
        rich_help_panel=_SERVER,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file of keys, one a line; other users of the machine can see --api-key.",
        show_default=False,
        rich_help_panel=_SERVER,
    ),
]
NoAuth = Annotated[
    bool,
    typer.Option("--no-auth", help="Let anybody in who gets through.", rich_help_panel=_SERVER),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN",
        help="A web page's origin that may use the server, * for all; may be repeated.",
        show_default=False,
        rich_help_panel=_SERVER,
    ),
]
CacheBytes = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=options.byte_count,
        help="What the caches of all conversations may hold, as 8000000000 or 8GB. Without it, a "
        "quarter of the machine's memory.",
        show_default=False,
        rich_help_panel=_SERVER,
    ),
]
MaxActive = Annotated[
    int,
    typer.Option(min=1, help="Answers that are written at once.", rich_help_panel=_SERVER),
]


@grouped
def serve(
    *,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    no_auth: NoAuth = False,
    cors_origin: CorsOrigin = None,
    cache_bytes: CacheBytes = None,
    max_active: MaxActive = 4,
    pair: PairOptions,
    sampling: SamplingOptions,
    prompting: PromptOptions,
    max_tokens: options.MaxTokens = -1,
    proposing: ProposingOptions,
    caching: CacheOptions,
) -> None:
    """Serve a model to editors, agents and chat windows, by OpenAI's and Anthropic's APIs.

    The options of sampling, of the prompt and --max-tokens hold where a request does not say.
    """
    local, keyed = host in _HERE, api_key is not None or api_key_file is not None
    if not (local or keyed or no_auth):
        raise UsageError(
            f"On {host} others can reach the server; give --api-key or --api-key-file, or let "
            "everybody in with --no-auth."
        )
    keys, sockets = list[str](), list[socket.socket]()

    def prepare() -> None:
        keys.extend(_keys(api_key, api_key_file))
        sockets.append(listen(host, port))

    ranks.decided(prepare)  # rank 0 alone has the network
    settings = Options(**vars(caching), copies=proposing.copies == "auto")
    if ranks.follows():
        shard = load_pair(pair)
        follow(shard.model, shard.tokenizer, settings)
        return
    loaded: list[Loaded] = []

    def load() -> tuple[SpeculativeModel, TokenizerWrapper]:
        loaded.append(load_pair(pair))
        return loaded[0].model, loaded[0].tokenizer

    engine = Engine(
        load,
        cache_bytes=cache_bytes or memory_bytes() // 4,
        max_active=max_active,
        options=settings,
        lost=ranks.end_process if ranks.together() else None,
    )
    engine.start()
    try:
        # Prompts are rendered in threads of their own, and told with the request.
        template = replace(loaded[0].template(prompting), ranks=None)
        service = Service(
            engine,
            Prompts(template),
            model=_name(loaded[0].target),
            draft=_name(loaded[0].draft),
            defaults=Defaults(
                Sampling(
                    temperature=sampling.temp,
                    top_p=sampling.top_p,
                    min_p=sampling.min_p,
                    top_k=sampling.top_k,
                ),
                max_tokens,
                proposing.verify_length,
                proposing.tree,
            ),
        )
        _log_to_the_terminal()
        _welcome(address(sockets[0]), service, bool(keys))
        protection = Protection(keys, local, tuple(cors_origin or ()))
        HttpServer(create_app(service, protection), service).run(sockets)
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
    note("Stopped.")


def _keys(key: str | None, file: Path | None) -> list[str]:
    keys = [] if key is None else [key]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise DFlashError(f"There is no key file {file}.") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise DFlashError(f"The key file {file} cannot be read: {reason}.") from error
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise DFlashError(f"The key file {file} has no key; write one on a line.")
    if not all(key.strip() and key.isascii() and key.isprintable() for key in keys):
        raise DFlashError("A key cannot be empty and must be of ASCII letters, digits and signs.")
    return keys


def _name(place: str) -> str:
    """What clients see: a hub id as it is, of a directory only its own name."""
    path = Path(place).expanduser()
    return path.resolve().name if path.is_dir() else place


def _welcome(url: str, service: Service, keyed: bool) -> None:
    key = "YOUR-KEY" if keyed else "none"
    header = f" -H 'Authorization: Bearer {key}'" if keyed else ""
    err.print(
        f"dflash-mlx {dflash_mlx.__version__}: {service.model} with {service.draft}",
        markup=False,
        soft_wrap=True,
    )
    err.print(
        f"{url} has a page to chat; the APIs are below {url}/v1.", markup=False, soft_wrap=True
    )
    for line in (
        f"curl {url}/v1/chat/completions{header} -d "
        """'{"messages": [{"role": "user", "content": "Hello"}]}'""",
        f'openai.OpenAI(base_url="{url}/v1", api_key="{key}")',
        f"ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key} claude",
    ):
        err.print(f"  {line}", markup=False, soft_wrap=True)
    note("Ctrl-C ends it. One line for every answer:")


class _Lines(logging.Handler):
    """Log records as notes, with the time of day."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # What clients sent may stand in it, and a terminal obeys some characters.
            text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], self.format(record))
            err.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def _log_to_the_terminal() -> None:
    log = logging.getLogger("dflash_mlx.server")
    log.handlers[:] = [_Lines()]
    log.setLevel(logging.INFO)
    log.propagate = False
