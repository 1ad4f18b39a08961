"""The routes, and what surrounds them: keys, CORS, bodies, errors."""

import asyncio
import json
import logging
import re
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dflash_mlx.server import chat_completions, completions, messages, responses
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.models import described
from dflash_mlx.server.page import page
from dflash_mlx.server.protection import Guard, Protection, too_large
from dflash_mlx.server.refusal import Refusal, failed
from dflash_mlx.server.replies import EventStream, Whole, refused
from dflash_mlx.server.response_events import Answer
from dflash_mlx.server.service import Service

log = logging.getLogger("dflash_mlx.server")

# Seconds in which a request's body must have come.
BODY_SECONDS = 60.0
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def create_app(service: Service, protection: Protection) -> Starlette:
    """The server as an ASGI application."""
    routes = Routes(service, protection)
    middleware = [Middleware(Guard, protection=protection)]
    if protection.origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(protection.origins),
                allow_methods=["*"],
                allow_headers=["*"],
            ),
        )

    return Starlette(
        routes=[
            Route("/", page),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.complete, methods=["POST"]),
            Route("/v1/messages", routes.message, methods=["POST"]),
            Route("/v1/messages/count_tokens", routes.count, methods=["POST"]),
            Route("/v1/responses", routes.respond, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
        ],
        middleware=middleware,
        exception_handlers={
            Refusal: routes.refuse,
            HTTPException: routes.unknown,
            ClientDisconnect: routes.gone,
            Exception: routes.broken,
        },
    )


class Routes:
    """What each path does."""

    def __init__(self, service: Service, protection: Protection):
        self._service, self._protection = service, protection

    async def chat(self, request: Request) -> Response:
        return await self._openai(request, chat_completions, "chat/completions")

    async def complete(self, request: Request) -> Response:
        return await self._openai(request, completions, "completions")

    async def _openai(self, request: Request, api: Any, name: str) -> Response:
        fields = await self._fields(request)
        service = self._service
        ask = api.parse(fields, service.defaults)
        options = fields.inner("stream_options")
        with_usage = options is not None and bool(options.flag("include_usage"))
        exchange = await service.begin(ask, name)
        model, tokenizer = service.model, service.prompts.tokenizer
        if ask.stream:
            events = api.stream(exchange, model, tokenizer, with_usage)
            return EventStream(events, exchange.leave)
        answer = api.answer(exchange, model, tokenizer)
        return Whole(answer, Refusal.openai, exchange.leave, service.idle)

    async def message(self, request: Request) -> Response:
        fields, service = await self._fields(request), self._service
        ask = messages.parse(fields, service.defaults)
        exchange = await service.begin(ask, "messages")
        if ask.stream:
            return EventStream(messages.stream(exchange, service.model), exchange.leave)
        answer = messages.answer(exchange, service.model)
        return Whole(answer, Refusal.anthropic, exchange.leave, service.idle)

    async def count(self, request: Request) -> Response:
        fields, service = await self._fields(request), self._service
        prompt = await service.prompt(messages.parse(fields, service.defaults, counting=True))
        return JSONResponse({"input_tokens": len(prompt.tokens)})

    async def respond(self, request: Request) -> Response:
        fields, service = await self._fields(request), self._service
        box = responses.toolbox(fields)
        if box.left_out:
            log.info(
                "responses: left out tools that are not to be had: %s", ", ".join(box.left_out)
            )
        ask = responses.parse(fields, box, service.defaults)
        exchange = await service.begin(ask, "responses")
        answer = Answer(exchange, service.model, service.prompts.tokenizer, fields, box)
        if ask.stream:
            return EventStream(answer.stream(), exchange.leave)
        return Whole(answer.complete(), Refusal.openai, exchange.leave, service.idle)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(self._service)]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(described(self._service))

    async def health(self, request: Request) -> Response:
        alive = self._service.engine.alive
        status = {"status": "ok" if alive else "dead", "model": self._service.model}
        return JSONResponse(status, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            self._service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def _fields(self, request: Request) -> Fields:
        return Fields(await _json(request, self._protection.most_bytes))

    async def refuse(self, request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        self._service.counts.refused(refusal.status)
        log.info("%s: %d, %s", request.url.path[:80], refusal.status, refusal.message)
        return refused(refusal, _anthropic(request))

    async def unknown(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: "There is no such path here.", 405: "This path has no such method."}
        message = words.get(error.status_code, "The request cannot be met.")
        return await self.refuse(request, Refusal(message, status=error.status_code))

    async def gone(self, request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    async def broken(self, request: Request, error: Exception) -> Response:
        log.error("%s failed.", request.url.path[:80], exc_info=error)
        self._service.counts.refused(500)
        return refused(failed(), _anthropic(request))


def _anthropic(request: Request) -> bool:
    return request.url.path.startswith("/v1/messages")


async def _json(request: Request, most: int) -> Any:
    """A request's body, read up to a bound.

    Raises:
        Refusal: it is too large, too slow, or no JSON.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large(most)
    except TimeoutError:
        raise Refusal("The request's body did not come in time.", status=408) from None
    try:
        content = json.loads(body, parse_constant=_no_number)
        return _whole_characters(content) if b"\\ud" in body.lower() else content
    except (ValueError, RecursionError):
        raise Refusal("The body is not JSON.") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON.")


def _whole_characters(content: Any) -> Any:
    """JSON can spell halves of characters, which nothing behind here can encode."""
    if isinstance(content, str):
        return _SURROGATE.sub("\ufffd", content)
    if isinstance(content, list):
        return [_whole_characters(one) for one in content]
    if isinstance(content, dict):
        return {_whole_characters(k): _whole_characters(v) for k, v in content.items()}
    return content
