"""A server over loopback, in this process, for tests that talk to it as clients do."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from dflash_mlx.conversation import Template
from dflash_mlx.server.app import create_app
from dflash_mlx.server.http import HttpServer, address, listen
from dflash_mlx.server.prompts import Prompts
from dflash_mlx.server.protection import Protection
from dflash_mlx.server.service import Service
from tests.scripted_engine import ScriptedEngine
from tests.tiny_pair import vocabulary, write_tokenizer

TOOLS_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% for t in tools or [] %}<|start|>tool {{ t.function.name }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    "{# tool_call.name #}"
)


@contextmanager
def serving(service: Service, protection: Protection | None = None) -> Iterator[str]:
    """Serve until the block ends; gives the address."""
    listening = listen("127.0.0.1", 0)
    server = HttpServer(create_app(service, protection or Protection()), service)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield address(listening)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def tool_tokenizer(folder: Path, says: str = "One two three") -> TokenizerWrapper:
    """A tokenizer whose template knows tools, thinking and calls as JSON."""
    write_tokenizer(folder, vocabulary(says))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TOOLS_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.has_tool_calling and tokenizer.has_thinking
    return tokenizer


@contextmanager
def saying(
    tokenizer: TokenizerWrapper, text: str, protection: Protection | None = None, **options: Any
) -> Iterator[tuple[str, ScriptedEngine]]:
    """A server whose model says this; gives its address and the engine."""
    engine = ScriptedEngine(tokenizer.encode(text), tokenizer.eos_token_id, **options)
    prompts = Prompts(Template(tokenizer))
    service = Service(engine, prompts, model="tiny", draft="tiny draft", idle=0.15)
    with serving(service, protection) as address:
        yield address, engine


def post(address: str, path: str, body: Any, **options: Any) -> httpx.Response:
    """A request with a JSON body."""
    return httpx.post(f"{address}{path}", json=body, **{"timeout": 10, **options})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
