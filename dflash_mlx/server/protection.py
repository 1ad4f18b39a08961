"""Who may talk to the server: keys, hosts, browsers' pages, and how much they may send."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.replies import refused

_LOCAL = {"localhost", "127.0.0.1", "::1"}
_OPEN = {"/", "/health", "/favicon.ico"}


@dataclass(frozen=True)
class Protection:
    """What a request must fulfil.

    Attributes:
        keys: one of them must come with it; empty: none is needed.
        local: the server listens on this machine only, so that a Host header with another name
            comes from a page that had its own name point here.
        origins: of the web pages that may call the server; "*" for all.
        most_bytes: the largest body.
    """

    keys: Sequence[str] = ()
    local: bool = True
    origins: Sequence[str] = ()
    most_bytes: int = 32 * 1024 * 1024

    def check(self, path: str, method: str, headers: Headers) -> None:
        """Let a request pass.

        Raises:
            Refusal: it may not.
        """
        host = _name(f"//{headers.get('host', '')}")
        if self.local and not self.keys and host not in (*_LOCAL, None):
            raise Refusal("This server answers only to the name localhost.", status=403)
        origin = headers.get("origin")
        if origin and not self._welcome(origin, headers.get("host", "")):
            raise Refusal(
                "Pages of other sites may not use this server; start it with --cors-origin to "
                "let one in.",
                status=403,
            )
        if path not in _OPEN and method != "OPTIONS":
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most_bytes:
            raise too_large(self.most_bytes)

    def _welcome(self, origin: str, host: str) -> bool:
        if "*" in self.origins or origin in self.origins:
            return True
        return origin.partition("://")[2] == host

    def _check_key(self, headers: Headers) -> None:
        if not self.keys:
            return
        # Some clients send both, with a word of no meaning in one of them.
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), token if scheme.lower() == "bearer" else scheme]
        # All are compared, so that the time says nothing of which one was close.
        matches = [
            hmac.compare_digest(one.strip().encode(), key.encode())
            for one in given
            for key in self.keys
        ]
        if not any(matches):
            raise Refusal(
                "The API key is missing or wrong; send it as a Bearer token or in x-api-key.",
                status=401,
                code="invalid_api_key",
            )


def _name(url: str) -> str | None:
    """The host that a URL names; None without one.

    Raises:
        Refusal: it is no URL.
    """
    try:
        return urlsplit(url).hostname
    except ValueError:
        raise Refusal("The Host header makes no sense.") from None


def too_large(most: int) -> Refusal:
    """The error for a body over the bound."""
    return Refusal(f"The request is larger than {most // 2**20} MB.", status=413)


class Guard:
    """ASGI middleware that lets only those through who fulfil a `Protection`."""

    def __init__(self, app: ASGIApp, protection: Protection):
        self.app, self.protection = app, protection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            try:
                self.protection.check(path, scope["method"], Headers(scope=scope))
            except Refusal as refusal:
                await refused(refusal, path.startswith("/v1/messages"))(scope, receive, send)
                return
        await self.app(scope, receive, send)
