"""Ten requests to edit a text, with the answers that a model would give, cut into tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

PIECES = re.compile(r" ?[A-Za-z]{1,6}| ?\d{1,3}|\n+ *| ?[^\w\s]+|\s|.")

FUNCTION = '''def load(path, limit):
    """Read rows from a file, at most so many."""
    rows = []
    with open(path) as handle:
        for line in handle:
            if len(rows) == limit:
                break
            name, value = line.split(",")
            rows.append((name.strip(), float(value)))
    return rows


def summarize(path, limit=100):
    """The mean of each name's values."""
    sums, counts = {}, {}
    for name, value in load(path, limit):
        sums[name] = sums.get(name, 0.0) + value
        counts[name] = counts.get(name, 0) + 1
    return {name: sums[name] / counts[name] for name in sums}
'''
HARBOUR = """\
The harbour lies behind a long wall of grey stones, which the fishermen built when their boats \
were still of wood. In the morning the gulls sit upon it in rows and wait until the nets come \
in. Nobody feeds them, but there is always a fish that falls from a crate, and they know it. In \
the afternoon the wind turns, the water grows rough, and the smallest boats are pulled onto the \
beach. Whoever walks along the wall at that hour has salt on his coat and hears no word of what \
is said to him.
"""
TICKETS = """[
  {"id": 101, "title": "Login page is blank", "state": "open", "owner": "mara", "votes": 12},
  {"id": 102, "title": "Export loses the last row", "state": "open", "owner": "jon", "votes": 7},
  {"id": 103, "title": "Dark theme for editing", "state": "closed", "owner": "mara", "votes": 31},
  {"id": 104, "title": "Crash on an empty search", "state": "open", "owner": "ines", "votes": 19},
  {"id": 105, "title": "Wrong time zone in mails", "state": "closed", "owner": "jon", "votes": 4}
]
"""
SERVICE = """service:
  name: thumbnails
  image: registry.internal/thumbnails:1.4.2
  replicas: 2
  ports:
    - 8080
  env:
    CACHE_DIR: /var/cache/thumbnails
    CACHE_SIZE: 2GB
    LOG_LEVEL: info
    TIMEOUT_SECONDS: 20
  resources:
    memory: 512Mi
    cpu: 500m
"""
QUERY = """SELECT c.name, c.country, SUM(o.amount) AS total, COUNT(o.id) AS orders
FROM customers AS c
JOIN orders AS o ON o.customer_id = c.id
WHERE o.placed_at >= '2024-01-01' AND o.state <> 'cancelled'
GROUP BY c.name, c.country
HAVING SUM(o.amount) > 1000
ORDER BY total DESC
LIMIT 50;
"""
TABLE = """| city | river | bridges |
|---|---|---|
| Basel | Rhine | 6 |
| Prague | Vltava | 18 |
| Porto | Douro | 6 |
| Seville | Guadalquivir | 10 |
| Lyon | Rhone | 14 |
"""
LETTER = """Dear Mr Okafor,

thank you for your letter of the third of May. We have looked at the boiler in your flat, and \
the pump has to be replaced. The work takes about two hours and costs you nothing. Our \
technician could come on Tuesday the fourteenth between eight and ten in the morning. Please \
tell us by telephone whether that suits you. Until then the heating can be used as before, but \
please keep the valve in the kitchen closed.

Yours sincerely,
Ruth Adeyemi
"""
CLASS = """class Queue {
  constructor(limit) {
    this.limit = limit;
    this.items = [];
  }

  push(item) {
    if (this.items.length >= this.limit) {
      throw new Error("queue is full");
    }
    this.items.push(item);
  }

  pop() {
    if (this.items.length === 0) {
      throw new Error("queue is empty");
    }
    return this.items.shift();
  }

  get length() {
    return this.items.length;
  }
}
"""
STEPS = """1. Close the main valve under the sink.
2. Open the tap and let the water run out.
3. Loosen the nut below the tap with a wrench.
4. Take the old tap out and clean the rim.
5. Put the new seal in, and the new tap on it.
6. Tighten the nut by hand, then with the wrench by half a turn.
7. Open the main valve and look for drops.
"""


@dataclass(frozen=True)
class Edit:
    """A request about a text.

    Attributes:
        changes: what is replaced by what in the answer, everywhere.
        before, behind: what the answer says around the text.
    """

    name: str
    request: str
    text: str
    changes: tuple[tuple[str, str], ...]
    before: str = ""
    behind: str = ""

    @property
    def prompt(self) -> str:
        return f"<user>{self.request}\n\n{self.text}<assistant>"

    @property
    def answer(self) -> str:
        text = self.text
        for old, new in self.changes:
            if old not in text:
                raise ValueError(f"{self.name}: nothing to change at {old!r}.")
            text = text.replace(old, new)
        return f"{self.before}{text}{self.behind}<end>"


EDITS = [
    Edit(
        "rename in Python",
        "Call `rows` `records` and `handle` `file` everywhere.",
        FUNCTION,
        (("rows", "records"), ("handle", "file")),
        "```python\n",
        "```\nI renamed both variables, and the docstring's word, too.\n",
    ),
    Edit(
        "type hints",
        "Add type hints to these functions.",
        FUNCTION,
        (
            ("load(path, limit):", "load(path: str, limit: int) -> list[tuple[str, float]]:"),
            (
                "summarize(path, limit=100):",
                "summarize(path: str, limit: int = 100) -> dict[str, float]:",
            ),
            (
                "    sums, counts = {}, {}\n",
                "    sums: dict[str, float] = {}\n    counts: dict[str, int] = {}\n",
            ),
        ),
    ),
    Edit(
        "tense of prose",
        "Put the second and the third sentence into the past tense; leave the others as they are.",
        HARBOUR,
        (
            (
                "gulls sit upon it in rows and wait until the nets come in",
                "gulls sat upon it in rows and waited until the nets came in",
            ),
            (
                "Nobody feeds them, but there is always a fish",
                "Nobody fed them, but there was always a fish",
            ),
            (
                "falls from a crate, and they know",
                "fell from a crate, and they knew",
            ),
        ),
    ),
    Edit(
        "JSON values",
        "Give all of jon's tickets to ines and close 104. Answer with the JSON alone.",
        TICKETS,
        (
            ('"jon"', '"ines"'),
            ('search", "state": "open"', 'search", "state": "closed"'),
        ),
    ),
    Edit(
        "JSON keys",
        "Rename the key owner to assignee and leave out the votes.",
        TICKETS,
        (
            ('"owner"', '"assignee"'),
            (', "votes": 12', ""),
            (', "votes": 7', ""),
            (', "votes": 31', ""),
            (', "votes": 19', ""),
            (', "votes": 4', ""),
        ),
    ),
    Edit(
        "configuration",
        "Three replicas, version 1.5.0, debug logging, twice the memory.",
        SERVICE,
        (
            ("1.4.2", "1.5.0"),
            ("replicas: 2", "replicas: 3"),
            ("info", "debug"),
            ("512Mi", "1024Mi"),
        ),
        "Here is the changed file:\n\n```yaml\n",
        "```\n",
    ),
    Edit(
        "SQL",
        "Only customers from Norway, by number of orders, and without the country column.",
        QUERY,
        (
            ("c.name, c.country, SUM", "c.name, SUM"),
            ("'cancelled'\n", "'cancelled' AND c.country = 'Norway'\n"),
            ("GROUP BY c.name, c.country", "GROUP BY c.name"),
            ("ORDER BY total", "ORDER BY orders"),
        ),
    ),
    Edit(
        "table",
        "Add a column with the country.",
        TABLE,
        (
            ("bridges |", "bridges | country |"),
            ("|---|---|---|", "|---|---|---|---|"),
            ("Rhine | 6 |", "Rhine | 6 | Switzerland |"),
            ("18 |", "18 | Czech Republic |"),
            ("Douro | 6 |", "Douro | 6 | Portugal |"),
            ("10 |", "10 | Spain |"),
            ("14 |", "14 | France |"),
        ),
    ),
    Edit(
        "letter",
        "Move the appointment to Thursday the sixteenth, in the afternoon from two to four.",
        LETTER,
        (
            (
                "on Tuesday the fourteenth between eight and ten in the morning",
                "on Thursday the sixteenth between two and four in the afternoon",
            ),
        ),
    ),
    Edit(
        "JavaScript",
        "Let pop return null when the queue is empty, and call length size.",
        CLASS,
        (
            ('throw new Error("queue is empty");', "return null;"),
            ("get length()", "get size()"),
        ),
        "```js\n",
        "```\n",
    ),
]
PROSE = [HARBOUR, LETTER, STEPS, *(f"{e.request}\n" for e in EDITS)]


class Vocabulary:
    """Tokens of some letters each, as a model's would be cut, numbered as they come from 1 on."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._next: Iterator[int] = count(1)

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in PIECES.findall(text)]

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = next(self._next)
        return self._ids[piece]
