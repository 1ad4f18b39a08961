"""GET /v1/models: what is loaded."""

import time
from typing import Any

from dflash_mlx.server.service import Service

_STARTED = int(time.time())


def described(service: Service) -> dict[str, Any]:
    """The one model, in the shape that both OpenAI's and Anthropic's lists have."""
    return {
        "id": service.model,
        "object": "model",
        "type": "model",
        "display_name": service.model,
        "created": _STARTED,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_STARTED)),
        "owned_by": "dflash-mlx",
        "max_model_len": service.engine.positions,
        "x_dflash": {"draft": service.draft},
    }
