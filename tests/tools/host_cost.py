"""What routing a verify through kernels costs the host, with kernels that do nothing.

`python -m tests.tools.host_cost` prints it for the layers of a common target.
"""

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3

from dflash_mlx.metal import rows_class, selection
from dflash_mlx.target.fast_verify import FastVerify
from dflash_mlx.target.watch import Watch

LAYERS, ROWS = 36, 8


class DoesNothing(selection.Selection):
    """A selection whose kernel for products gives back their input."""

    def kernel_for(self, shape):
        return (lambda x, *rest, **kind: x) if shape is not None else None


def microseconds(run: Callable[[], object], times: int = 300) -> float:
    """The median of so many runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


def main() -> None:
    """Prints one line for each cost."""
    rows_class.MIN_OUTPUTS = rows_class.MIN_INNER = 1  # the layers are many, and may be small
    config = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": LAYERS}
    config |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": 128, "rope_theta": 1e4}
    config |= {"max_position_embeddings": 2048, "tie_word_embeddings": False}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    nn.quantize(model, group_size=32, bits=4)
    fast, x, linear = FastVerify(model), mx.zeros((1, ROWS, 64)), model.layers[0].mlp.up_proj

    def watch() -> None:
        with Watch(fast.handlers(ROWS)):
            pass

    with selection.Selection("off").used():
        print(f"{microseconds(lambda: fast.handlers(ROWS)):8.1f} us a verify without kernels")
        plain = microseconds(lambda: linear(x))
    with DoesNothing("auto", ready=lambda: True).used():
        count = len(fast.handlers(ROWS))
        print(f"{microseconds(watch):8.1f} us a verify to watch {count} modules")
        with Watch(fast.handlers(ROWS)):
            print(f"{microseconds(lambda: linear(x)) - plain:8.1f} us a call more than stock")


if __name__ == "__main__":
    main()
