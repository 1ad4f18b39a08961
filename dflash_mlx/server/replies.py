"""Answers that take their time: sent from the first byte on, given up when the client leaves."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dflash_mlx.server.refusal import Refusal

# Seconds that a client may take to accept a piece.
PATIENCE = 60.0


def event(data: Any, name: str = "") -> bytes:
    """A server-sent event; `data` is JSON unless it is a string."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


class _Lasting(Response):
    """Sends while watching for the client to leave; `closed` is called however it ends."""

    def __init__(self, closed: Callable[[], None]):
        super().__init__()
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient(message: Any) -> None:
            await asyncio.wait_for(send(message), PATIENCE)

        sending = asyncio.ensure_future(self._send(patient))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, TimeoutError, OSError):
                await sending
            self._closed()

    def _send(self, send: Send) -> Coroutine[Any, Any, None]:
        raise NotImplementedError


class EventStream(_Lasting):
    """Server-sent events, from the first one on."""

    def __init__(self, events: AsyncIterator[bytes], closed: Callable[[], None]):
        super().__init__(closed)
        self._events = events

    async def _send(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Whole(_Lasting):
    """A JSON answer in one piece.

    Where it takes long, the headers are sent and then a space every now and then, which JSON
    allows before its beginning; an error that comes later than that arrives with status 200.
    """

    def __init__(
        self,
        answer: Awaitable[dict[str, Any]],
        refuse: Callable[[Refusal], dict[str, Any]],
        closed: Callable[[], None],
        idle: float,
    ):
        super().__init__(closed)
        self._answer, self._refuse, self._idle = answer, refuse, idle

    async def _send(self, send: Send) -> None:
        work = asyncio.ensure_future(self._answer)
        begun = False
        try:
            while not (await asyncio.wait({work}, timeout=self._idle))[0]:
                if not begun:
                    await send(_start(200))
                begun = True
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
            status = 200
            try:
                content = work.result()
            except Refusal as refusal:
                status, content = refusal.status, self._refuse(refusal)
            body = json.dumps(content, ensure_ascii=False).encode()
            if not begun:
                await send(_start(status, len(body)))
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refusal):
                await work


def _start(status: int, length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def refused(refusal: Refusal, anthropic: bool) -> JSONResponse:
    """An error object, in the shape of the API that was called."""
    content = refusal.anthropic() if anthropic else refusal.openai()
    return JSONResponse(content, refusal.status, refusal.headers)
