"""uvicorn, set up for this server: quiet, on a socket of ours, ending streams when it goes down."""

import errno
import os
import socket

import uvicorn
from starlette.types import ASGIApp

from dflash_mlx.errors import DFlashError
from dflash_mlx.server.service import Service

# Seconds that answers may take to end once the server goes down.
_GRACE = 2


class HttpServer(uvicorn.Server):
    """Serves an application until it is told to end; answers are ended with a word then."""

    def __init__(self, app: ASGIApp, service: Service):
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE,
        )
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers first: uvicorn would wait for them."""
        self._service.close()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        DFlashError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port, family)
        return socket.create_server((host, port), family=family, backlog=128)
    except socket.gaierror as error:
        raise DFlashError(
            f"There is no host {host}; give an address of this machine to --host."
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "something else listens there; give another --port"
        else:
            reason = f"{os.strerror(error.errno or 0)}; give another --host or --port"
        raise DFlashError(f"{host}:{port} cannot be used: {reason}.") from error


def address(listening: socket.socket) -> str:
    """The URL of a socket that listens."""
    host, port = listening.getsockname()[:2]
    shown = "localhost" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
