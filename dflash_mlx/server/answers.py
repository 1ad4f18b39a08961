"""Whole answers, and log-probabilities as OpenAI's APIs show them."""

from dataclasses import dataclass
from typing import Any

from dflash_mlx.server.calls import Call
from dflash_mlx.server.channels import Piece, Runs, Text, Thinking, joined
from dflash_mlx.server.exchange import Exchange, Idle


@dataclass
class Choice:
    """A complete answer.

    Attributes:
        parts: its pieces in order, neighbours of one kind joined.
    """

    parts: list[Piece]

    @property
    def text(self) -> str:
        """What is meant for the reader."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def thinking(self) -> str:
        """What was thought, one passage a line."""
        return "\n".join(p.text for p in self.parts if isinstance(p, Thinking))

    @property
    def calls(self) -> list[Call]:
        """The calls of tools."""
        return [p for p in self.parts if isinstance(p, Call)]

    @property
    def runs(self) -> Runs:
        """Which token each character of `text` comes from."""
        return [run for p in self.parts if isinstance(p, Text) for run in p.runs]


async def whole(exchange: Exchange) -> Choice:
    """Wait for all of an answer.

    Raises:
        Refusal: the work failed.
    """
    parts: list[Piece] = []
    async for pieces in exchange.pieces():
        if not isinstance(pieces, Idle):
            parts += pieces
    return Choice(joined(parts))


def shown_logprobs(exchange: Exchange, runs: Runs, tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens that a text came from, each once, as OpenAI's chat API has them."""
    return [entry for _, entry in placed_logprobs(exchange, runs, tokenizer)]


def placed_logprobs(
    exchange: Exchange, runs: Runs, tokenizer: Any
) -> list[tuple[int, dict[str, Any]]]:
    """The same, each with the place in the text where its characters begin."""
    places: dict[int, int] = {}
    at = 0
    for length, index in runs:
        places.setdefault(index, at)
        at += length
    shown = []
    for index, place in places.items():
        if not exchange.unseen(index):
            continue
        token = exchange.token(index)
        entry = _entry(tokenizer, token.id, token.logprob or 0.0)
        top = [_entry(tokenizer, id, logprob) for id, logprob in token.top]
        shown.append((place, {**entry, "top_logprobs": top[: exchange.ask.top_logprobs]}))
    return shown


def _entry(tokenizer: Any, id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([id])
    bytes_ = None if "\ufffd" in text else list(text.encode())
    # JSON has no infinity; OpenAI's own stand-in for it is this number.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": bytes_}
