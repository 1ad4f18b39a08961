"""Messages to token ids, through the tokenizer's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.distributed import Ranks
from dflash_mlx.errors import DFlashError, said
from dflash_mlx.texts import check_text
from dflash_mlx.tokens import encode_text

Message = dict[str, Any]


@dataclass
class Template:
    """How a conversation becomes a prompt.

    Attributes:
        tokenizer: the target's.
        system: a system message to begin with.
        think: whether the model should think first; None leaves it to the template.
        config: further variables for the template.
        raw: use no template; the messages' contents follow each other as they are.
        ranks: the processes that render the same; a template may ask for the time, so that rank
            0's prompt is everyone's. None: this one alone.
    """

    tokenizer: TokenizerWrapper
    system: str | None = None
    think: bool | None = None
    config: dict[str, Any] = field(default_factory=dict)
    raw: bool = False
    ranks: Ranks | None = None

    def render(self, messages: Sequence[Message], prefill: str | None = None) -> list[int]:
        """The prompt that asks for the next assistant message, as token ids.

        Args:
            messages: user and assistant messages; the system message is put before them.
            prefill: a beginning that the answer continues.

        Raises:
            DFlashError: the template refuses the conversation, or nothing is left to run.
        """
        text = self.text(messages, prefill)
        ids = encode_text(self.tokenizer, text, add_special_tokens=self.plain)
        if not ids:
            raise DFlashError("The prompt is empty; give at least one token.")
        return ids if self.ranks is None else self.ranks.told_list(ids)

    @property
    def plain(self) -> bool:
        """Whether no chat template is used, by choice or because there is none."""
        return self.raw or not self.tokenizer.has_chat_template

    @property
    def knows_thinking(self) -> bool:
        """Whether `think` can change anything, as far as can be told."""
        source = self.tokenizer.chat_template
        return not self.plain and (not isinstance(source, str) or "thinking" in source)

    def text(
        self, messages: Sequence[Message], prefill: str | None = None, *, ask: bool = True
    ) -> str:
        """What `render` encodes; without `ask`, the conversation as it stands."""
        if self.plain:
            parts = [self.system or "", *(m["content"] for m in messages), prefill or ""]
            return check_text("".join(parts))
        system: list[Message] = []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        answer: list[Message] = []
        if prefill is not None:
            answer = [{"role": "assistant", "content": prefill}]
        try:
            text = self._renderer().apply_chat_template(
                [*system, *messages, *answer],
                tokenize=False,
                add_generation_prompt=ask and prefill is None,
                continue_final_message=prefill is not None,
                **self._variables(),
            )
        except Exception as error:
            # A template is a program, and raises whatever its code runs into.
            raise DFlashError(
                f"The model's chat template refuses this conversation: {said(error)}."
            ) from error
        return check_text(cast(str, text))

    def _renderer(self) -> Any:
        """Whose `apply_chat_template` is asked.

        mlx_lm's always sets `enable_thinking`, and a template may have a default of its own, or ask
        whether the variable is defined at all. transformers' leaves it undefined.
        """
        tokenizer: Any = self.tokenizer
        own = self.think is None and tokenizer._chat_template is None
        return tokenizer._tokenizer if own else tokenizer

    def _variables(self) -> dict[str, Any]:
        return self.config if self.think is None else {"enable_thinking": self.think, **self.config}
