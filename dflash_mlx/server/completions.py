"""POST /v1/completions, OpenAI's API for plain prompts."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from dflash_mlx.server.answers import placed_logprobs, whole
from dflash_mlx.server.asks import Ask
from dflash_mlx.server.channels import Runs, Text
from dflash_mlx.server.chat_completions import one_choice, usage
from dflash_mlx.server.exchange import Exchange, Idle
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.replies import event
from dflash_mlx.server.sampling_fields import grammar, sampling
from dflash_mlx.server.service import Defaults


def parse(fields: Fields, defaults: Defaults) -> Ask:
    """What a request's body asks for.

    Raises:
        Refusal: a field is wrong, or cannot be met.
    """
    one_choice(fields)
    if fields.get("suffix"):
        raise fields.refuse("suffix", "is not served; this server fills no gaps.")
    if fields.flag("echo"):
        raise fields.refuse("echo", "is not served; the prompt is not repeated.")
    logprobs = fields.integer("logprobs", 0, 5)
    return Ask(
        model=fields.text("model"),
        prompt=_prompt(fields),
        max_tokens=fields.integer("max_tokens", 1),
        sampling=sampling(fields, defaults.sampling),
        stop=fields.strings("stop", 16),
        grammar=grammar(fields),
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
        stream=bool(fields.flag("stream")),
    )


def _prompt(fields: Fields) -> str | list[int]:
    given = fields.get("prompt")
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
        given = given[0]
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        return given
    raise fields.refuse("prompt", "must be one string, or a list of token ids.")


def _body(id: str, model: str, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
    return {
        "id": id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
    }


def _finish(exchange: Exchange) -> str:
    return "length" if exchange.finish == "length" else "stop"


async def answer(exchange: Exchange, model: str, tokenizer: Any) -> dict[str, Any]:
    """The whole continuation."""
    choice = await whole(exchange)
    logprobs = _logprobs(exchange, choice.runs, tokenizer, 0)
    return {
        **_body(_id(), model, choice.text, _finish(exchange), logprobs),
        "usage": usage(exchange),
        "x_dflash": exchange.shown(),
    }


async def stream(
    exchange: Exchange, model: str, tokenizer: Any, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The continuation as it comes; the figures stand in the last chunk."""
    id, written = _id(), 0
    yield event(_body(id, model, "", None, None))
    try:
        async for pieces in exchange.pieces():
            if isinstance(pieces, Idle):
                yield event(_body(id, model, "", None, None))
                continue
            for piece in pieces:
                if isinstance(piece, Text):
                    logprobs = _logprobs(exchange, piece.runs, tokenizer, written)
                    written += len(piece.text)
                    yield event(_body(id, model, piece.text, None, logprobs))
    except Refusal as refusal:
        yield event(refusal.openai())
        return
    shown = {"x_dflash": exchange.shown()}
    yield event({**_body(id, model, "", _finish(exchange), None), **shown})
    if include_usage:
        end = {**_body(id, model, "", None, None), "choices": []}
        yield event({**end, "usage": usage(exchange), **shown})
    yield event("[DONE]")


def _id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"


def _logprobs(exchange: Exchange, runs: Runs, tokenizer: Any, offset: int) -> Any:
    """Log-probabilities as this older API has them: a list for each property."""
    if not exchange.ask.logprobs:
        return None
    placed = placed_logprobs(exchange, runs, tokenizer)
    entries = [entry for _, entry in placed]
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
        ],
        # Of the text, which a tokenizer may begin without the first token's space.
        "text_offset": [offset + place for place, _ in placed],
    }
