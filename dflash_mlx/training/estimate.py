"""How long a run will take, from what a few of each of its parts took here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run's parts, each counted from some that were timed.

    Attributes:
        answering: of all rows that the target has still to answer; fewer when it writes more of
            them at once.
        training: of all steps that are left.
        measuring: of the evaluations, at most.
    """

    answering: float
    training: float
    measuring: float

    def __str__(self) -> str:
        parts = [("steps", self.training), ("measuring, at most", self.measuring)]
        if self.answering:
            parts.insert(0, ("answers, at most", self.answering))
        spelled = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts)
        return f"Estimated from a few of each: {spelled}."


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3 h 20 min, 5 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(hours / 24)} days"
