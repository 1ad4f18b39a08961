"""A function whose arguments are written down once, as the fields of a dataclass."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Arguments = TypeVar("Arguments")
Result = TypeVar("Result")


def called_with(
    arguments: Callable[P, Arguments],
) -> Callable[[Callable[[Arguments], Result]], Callable[P, Result]]:
    """Let a function of one dataclass be called with the dataclass's fields.

    Signature, help and mistakes in a call are those of a function that lists them itself.
    """

    def decorate(function: Callable[[Arguments], Result]) -> Callable[P, Result]:
        returns = signature(function).return_annotation
        taken = signature(arguments).replace(return_annotation=returns)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                taken.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(arguments(*args, **kwargs))

        call.__signature__ = taken  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in taken.parameters.values()} | {
            "return": returns
        }
        return call

    return decorate
