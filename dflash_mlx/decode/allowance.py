"""What drafting may lose against plain decoding: an account in plain steps."""


class Allowance:
    """Credit that grows with all time spent, and that every drafted cycle is charged to.

    A cycle that gains pays back what was lost before, and earns nothing beyond `most`. So however
    wrong every expectation is, over many tokens no more than `share` of the time is lost, and
    `most` steps besides.
    """

    share = 0.02
    most = 14.0

    def __init__(self) -> None:
        self.credit = self.most / 2

    def charge(self, steps: float, tokens: int) -> None:
        """A cycle took as long as `steps` plain ones and gave so many tokens."""
        self.credit = min(self.credit + self.share * steps + tokens - steps, self.most)

    def wait(self, loss: float) -> int:
        """Plain steps until such a loss may be risked."""
        return max(int((min(loss, self.most) - self.credit) / self.share + 1), 0)
