"""Random keys in the order in which plain decoding uses them.

MLX keeps one key. A draw without a key of its own splits it, `state, key = mx.random.split(state)`,
and uses the second half, so what any token to come will be drawn with is known beforehand. Here it
is worked out ahead: each row of a verify gets the keys of its own token, and so does the draft's
proposal for it; what a rejected row leaves unused is the next cycle's.
"""

from typing import Protocol, cast

import mlx.core as mx

# Not the generation's stream: the host would wait for what was queued there before.
_stream = mx.new_thread_local_stream(mx.cpu)


class RandomState(Protocol):
    """Where a generation takes its randomness from.

    Attributes:
        bits: the 64 bits of an MLX key.
    """

    bits: int


class ThreadState:
    """MLX's own state in the running thread, which `mx.random.seed` sets."""

    @property
    def bits(self) -> int:
        return to_bits(mx.random.state[0])  # type: ignore[index]

    @bits.setter
    def bits(self, bits: int) -> None:
        mx.random.seed(bits)


class OwnState:
    """A state apart, as `mx.random.seed(seed)` would leave MLX's.

    For one of several generations in a thread. Only samplers from our `make_sampler` draw from it;
    any other one draws from wherever it does.
    """

    def __init__(self, seed: int):
        self.bits = seed


def to_bits(state: mx.array) -> int:
    """A key [2] as `mx.random.seed` takes it."""
    high, low = cast(list[int], state.tolist())
    return high << 32 | low


class Draws:
    """The draws of the tokens to come; token 0 is the next one, until `move`.

    Whatever else moves the state in between (a new seed, a logits processor that draws, another
    generation) is noticed, and the draws go on from there.
    """

    piece = 32  # tokens that are worked out at once
    kept = 64  # tokens that `move` can go back; a block is shorter

    def __init__(self, state: RandomState, per_token: int = 1):
        """Read the state, which only `move` changes.

        Args:
            state: where the randomness comes from.
            per_token: draws that plain decoding makes for each token.
        """
        self._state, self._per_token = state, per_token
        self._begin(state.bits)

    def _begin(self, bits: int) -> None:
        # The state before each token known, and behind the last one; keys and numbers of each.
        self._states = [bits]
        self._keys = mx.zeros((0, self._per_token, 2), mx.uint32)
        self._uniform = mx.zeros((0, self._per_token))
        self._at = 0

    def keys(self, count: int) -> mx.array:
        """The keys of the next tokens, draw by draw: [count, per_token, 2]."""
        self._reach(count)
        return self._keys[self._at : self._at + count]

    def uniform(self, count: int) -> mx.array:
        """What `mx.random.uniform(0, 1)` gives with each of these keys: [count, per_token]."""
        self._reach(count)
        return self._uniform[self._at : self._at + count]

    def move(self, count: int) -> None:
        """So many tokens were drawn, or taken back where it is negative.

        Nothing is taken back when somebody else has moved the state.
        """
        if count >= 0:
            self._reach(count)
        elif self._state.bits != self._states[self._at]:
            return
        self._at += count
        self._state.bits = self._states[self._at]

    def _reach(self, count: int) -> None:
        now = self._state.bits
        if now != self._states[self._at]:
            self._begin(now)
        while len(self._states) - 1 < self._at + count:
            self._extend()

    def _extend(self) -> None:
        gone = max(self._at - self.kept, 0)
        with mx.stream(_stream):
            last = self._states[-1]
            state = mx.array([last >> 32, last & 0xFFFFFFFF], mx.uint32)
            states, keys = [], []
            for _ in range(self.piece * self._per_token):
                state, key = mx.random.split(state)
                states.append(state)
                keys.append(key)
            found = mx.stack(keys)
            uniform = mx.vmap(lambda key: mx.random.uniform(0, 1, key=key))(found)
            shape = (self.piece, self._per_token)
            self._keys = mx.concatenate([self._keys[gone:], found.reshape(*shape, 2)])
            self._uniform = mx.concatenate([self._uniform[gone:], uniform.reshape(shape)])
            behind = states[self._per_token - 1 :: self._per_token]
            mx.eval(self._keys, self._uniform, behind)
        self._states = [*self._states[gone:], *map(to_bits, behind)]
        self._at -= gone
