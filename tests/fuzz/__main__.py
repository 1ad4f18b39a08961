"""Run broken inputs and show what became of them, the failures grouped by what they say.

python -m tests.fuzz --cases 2000 --seed 1 --kind draft
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import KINDS, spread
from tests.fuzz.worker import Outcome, run_cases


def main() -> int:
    """1 if any case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this; repeatable")
    parser.add_argument("--only", type=int, help="this case of one kind")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of failed cases")
    parser.add_argument("--verbose", action="store_true", help="show what every case said")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    jobs = spread(options.cases, kinds) if options.only is None else [(kinds[0], options.only)]
    codes: Counter[tuple[str, object]] = Counter()
    failed: dict[str, list[Outcome]] = {}
    for outcome in run_cases(jobs, options.seed, options.processes, options.keep):
        codes[outcome.kind, "failed" if outcome.problem else outcome.code] += 1
        if options.verbose:
            print(f"{outcome.kind} {outcome.case}: {outcome.code} {outcome.said[:400]}")
        if outcome.problem:
            last = outcome.problem.strip().splitlines()[-1]
            group = f"{outcome.kind} {re.sub(r'[0-9]+|/[^ ]+', '#', last)[:60]}"
            failed.setdefault(group, []).append(outcome)
    for kind in kinds:
        counts = {code: n for (k, code), n in codes.items() if k == kind}
        shown = [f"{code}: {n}" for code, n in sorted(counts.items(), key=str)]
        print(f"{kind:10}", ", ".join(shown))
    for group in sorted(failed.values(), key=len, reverse=True):
        first = group[0]
        print(f"\n{len(group)}x, as {first.kind} {first.case}: {' '.join(first.command)}")
        print("   ", first.problem if options.only is not None else first.problem[-300:])
        print("    others:", ", ".join(f"{o.kind} {o.case}" for o in group[1:8]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
