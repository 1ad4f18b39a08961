"""The kinds of request in the demo text. Each writer draws one conversation's turns.

A writer gives user and assistant turns by turns, the assistant's last. Every answer follows from
its request alone: what it needs is computed or copied, never known by heart.
"""

from dflash_mlx.demo.making.words import Words, listed

GOODS = listed(
    "apples bricks candles carpets chairs cups hats lamps mirrors nails onions pears ropes"
)
COLOURS = listed("black blue brown golden green grey orange purple red silver white yellow")
JOBS = listed(
    "baker carpenter doctor farmer gardener guard miller painter potter sailor tailor weaver"
)


def arithmetic(words: Words) -> list[str]:
    """Addition or subtraction of three-digit numbers, digit by digit."""
    rng = words.rng
    adding = rng.random() < 0.5
    a, b = words.number(100, 899), words.number(100, 899)
    if adding:
        while a + b > 999:
            a, b = words.number(100, 899), words.number(100, 899)
    a, b = (a, b) if adding or a > b else (b, a)
    style = rng.randrange(3)
    if style == 0:
        ask = f"What is {a} {'+' if adding else '-'} {b}?"
    elif style == 1:
        ask = f"Add {b} to {a}." if adding else f"Subtract {b} from {a}."
    else:
        name, goods = words.name(), rng.choice(GOODS)
        verb = "buys {} more" if adding else "sells {} of them"
        ask = f"{name} has {a} {goods} and {verb.format(b)}. How many {goods} does {name} have now?"
    lines = [f"We {'add' if adding else 'subtract'}: {a} {'+' if adding else '-'} {b}."]
    lines += _sum_lines(a, b) if adding else _difference_lines(a, b)
    result = a + b if adding else a - b
    lines.append(f"So {a} {'+' if adding else '-'} {b} = {result}.")
    if style == 2:
        lines.append(f"{name} has {result} {goods} now.")
    return [ask, "\n".join(lines)]


def _sum_lines(a: int, b: int) -> list[str]:
    lines, carry = [], 0
    for place, x, y in zip(("Ones", "Tens", "Hundreds"), str(a)[::-1], str(b)[::-1], strict=True):
        total = int(x) + int(y) + carry
        carried = f" + {carry}" if place != "Ones" else ""
        carry = total // 10
        step = f"{place}: {x} + {y}{carried} = {total}, write {total % 10}"
        lines.append(step + (f", carry {carry}." if place != "Hundreds" else "."))
    return lines


def _difference_lines(a: int, b: int) -> list[str]:
    lines, borrow = [], 0
    for place, x, y in zip(("Ones", "Tens", "Hundreds"), str(a)[::-1], str(b)[::-1], strict=True):
        borrowed = f" - {borrow}" if place != "Ones" else ""
        rest = int(x) - int(y) - borrow
        borrow = int(rest < 0)
        lent = f"{10 * borrow} + " if place != "Hundreds" else ""
        step = f"{place}: {lent}{x} - {y}{borrowed} = {rest + 10 * borrow}, write {rest % 10}"
        lines.append(step + (f", borrow {borrow}." if place != "Hundreds" else "."))
    return lines


# Each operation: what the request says, the docstring, the body's lines. {x} is the argument,
# {n} a number.
FUNCTIONS = (
    ("adds {n} to {x}", "Add {n} to {x}.", "result = {x} + {n}"),
    ("subtracts {n} from {x}", "Subtract {n} from {x}.", "result = {x} - {n}"),
    ("multiplies {x} by {n}", "Multiply {x} by {n}.", "result = {x} * {n}"),
    ("divides {x} by {n}", "Divide {x} by {n}.", "result = {x} / {n}"),
    (
        "tells whether {x} is larger than {n}",
        "Tell whether {x} is larger than {n}.",
        "result = {x} > {n}",
    ),
    (
        "tells whether {x} is smaller than {n}",
        "Tell whether {x} is smaller than {n}.",
        "result = {x} < {n}",
    ),
    ("sums the list {x} and adds {n}", "Sum the list {x} and add {n}.", "result = sum({x}) + {n}"),
    ("takes the first {n} items of {x}", "Take the first {n} items of {x}.", "result = {x}[:{n}]"),
    ("repeats the text {x} {n} times", "Repeat the text {x} {n} times.", "result = str({x}) * {n}"),
    (
        "counts the items of {x} above {n}",
        "Count the items of {x} above {n}.",
        "result = 0\n    for item in {x}:\n        if item > {n}:\n            result = result + 1",
    ),
    (
        "keeps the items of {x} below {n}",
        "Keep the items of {x} below {n}.",
        "result = []\n    for item in {x}:\n"
        "        if item < {n}:\n            result.append(item)",
    ),
    (
        "prints {x} and returns {n}",
        "Print {x} and return {n}.",
        "print({x})\n    result = {n}",
    ),
)


def function(words: Words) -> list[str]:
    """A small Python function from a request that gives its signature."""
    return _function(
        words,
        "Write a Python function {name}({x}) that {says}.",
        "I need a function {name}({x}) in Python. It {says}.",
        "Please define {name}({x}) in Python: it {says}.",
    )


def function_in_words(words: Words) -> list[str]:
    """Practice for `function`: the argument is named in the sentence alone.

    That is harder, because a word behind a space and one behind a bracket are different tokens.
    """
    return _function(
        words,
        "Write a Python function {name} that {says}.",
        "I need a function called {name} in Python. It {says}.",
        "Please define {name} in Python: it {says}.",
    )


def _function(words: Words, *asks: str) -> list[str]:
    rng = words.rng
    says, doc, body = rng.choice(FUNCTIONS)
    name, x, n = words.word(), words.word(), words.number(10, 999)
    if rng.random() < 0.3:
        other = words.word()
        name = f"{name}_{other}"
    ask = rng.choice(asks).format(name=name, x=x, says=says.format(x=x, n=n))
    answer = (
        f"This function {says.format(x=x, n=n)}.\n```python\ndef {name}({x}):\n"
        f'    """{doc.format(x=x, n=n)}"""\n    {body.format(x=x, n=n)}\n    return result\n```\n'
        f"Call it as {name}({x})."
    )
    return [ask, answer]


def record(words: Words) -> list[str]:
    """A JSON record from a sentence."""
    rng = words.rng
    name, town = words.name(), words.town()
    if rng.random() < 0.5:
        fields = {
            "name": f"{name} {words.name()}",
            "age": words.number(10, 99),
            "town": town,
            "job": rng.choice(JOBS),
        }
        told = rng.choice(
            (
                "{name} is {age} years old, lives in {town} and works as a {job}.",
                "The {job} {name} from {town} is {age} years old.",
                "In {town} lives a {job} called {name}, aged {age}.",
            )
        )
    else:
        fields = {
            "customer": name,
            "town": town,
            "goods": f"{rng.choice(COLOURS)} {rng.choice(GOODS)}",
            "count": words.number(10, 999),
            "price": words.number(10, 999),
        }
        told = rng.choice(
            (
                "{customer} in {town} orders {count} {goods} for {price} coins.",
                "An order of {count} {goods} from {customer} in {town}, price {price} coins.",
                "For {price} coins we send {count} {goods} to {town}, to {customer}.",
            )
        )
    ask = rng.choice(("Write this as JSON: ", "Make a JSON record. ")) + told.format(**fields)
    lines = [
        f'  "{key}": {value}' if isinstance(value, int) else f'  "{key}": "{value}"'
        for key, value in fields.items()
    ]
    return [ask, "Here is the record:\n```json\n{\n" + ",\n".join(lines) + "\n}\n```"]


ROLES = listed("mayor judge teacher captain priest smith")
PLACES = listed("river bridge tower market lake forest")


def question(words: Words) -> list[str]:
    """A question about facts that the request states about a made-up town."""
    rng = words.rng
    town = words.town()
    roles, places = rng.sample(ROLES, 2), rng.sample(PLACES, 2)
    facts = [(role, "person", words.name()) for role in roles]
    facts += [(place, "place", words.town()) for place in places]
    rng.shuffle(facts)
    facts = facts[: rng.choice((3, 4))]
    told = " ".join(f"The {what} of {town} is called {called}." for what, _, called in facts)
    what, sort, called = rng.choice(facts)
    asked = (
        f"Who is the {what} of {town}?"
        if sort == "person"
        else f"What is the {what} of {town} called?"
    )
    reason = rng.random() < 0.5
    answer = (
        f"You ask about the {what} of {town}.\n"
        f"The text says: the {what} of {town} is called {called}.\n"
    )
    if reason:
        asked += " Explain."
        others = [f"the {w} is called {c}" for w, _, c in facts if w != what]
        answer += "It also says: " + " and ".join(others) + f". That is not about the {what}.\n"
    return [f"{told} {asked}", answer + f"So the answer is {called}."]


def dialogue(words: Words) -> list[str]:
    """A shop's conversation of two to four turns, each reply using what was said before."""
    rng = words.rng
    name, town, count = words.name(), words.town(), words.number(10, 99)
    goods = f"{rng.choice(COLOURS)} {rng.choice(GOODS)}"
    hello = rng.choice(("Hello, I am {} from {}.", "Good day! My name is {} and I live in {}."))
    order = rng.choice(("I would like {} {}.", "Please give me {} {}."))
    turns = [
        hello.format(name, town),
        f"Hello {name}, welcome to the shop. It is good to see someone from {town} here. "
        f"What can I do for you, {name}?",
        order.format(count, goods),
        f"Very well, {name}. That makes {count} {goods}. "
        f"Shall I send the {count} {goods} to you in {town}?",
    ]
    if rng.random() < 0.5:
        other = words.town()
        turns += [
            f"No, send them to {other}.",
            f"No problem, {name}. I shall send the {count} {goods} to {other} and not to {town}. "
            f"Do you want to see the order, {name}?",
        ]
        town = other
    else:
        turns += [
            "Yes, please.",
            f"Good, {name}. I shall send the {count} {goods} to {town} today. "
            f"Do you want to see the order, {name}?",
        ]
    turns += [
        rng.choice(("Yes, show me the order.", "Yes, what is in the order?")),
        f"Here is your order.\n- Name: {name}\n- Town: {town}\n- Goods: {goods}\n- Count: {count}\n"
        f"Thank you, {name}, and goodbye.",
    ]
    return turns[: 2 * rng.choice((2, 3, 4, 4))]


def sums(words: Words) -> list[str]:
    """Practice for `arithmetic`: its steps alone, many at once."""
    rng = words.rng
    steps: list[str] = []
    for _ in range(10):
        a, b, carry = rng.randrange(10), rng.randrange(10), rng.randrange(2)
        with_carry = rng.random() < 0.7
        if rng.random() < 0.5:
            step = f"{a} + {b}" + f" + {carry}" * with_carry
            value = a + b + carry * with_carry
        else:
            value = a - b - carry * with_carry
            step = f"{10 * (value < 0)} + {a} - {b}" + f" - {carry}" * with_carry
            value += 10 * (value < 0)
        steps.append(f"{step} = {value}, write {value % 10}.")
    asked = ", ".join(step.split(" =")[0] for step in steps)
    return [f"Work out: {asked}.", "\n".join(steps)]


def follow_ups(words: Words) -> list[str]:
    """Practice for `question`: several questions about the same facts."""
    rng = words.rng
    town = words.town()
    things = rng.sample(ROLES, 3) + rng.sample(PLACES, 2)
    rng.shuffle(things)
    facts = {thing: words.name() for thing in things[: rng.choice((3, 4, 5))]}
    turns: list[str] = []
    for thing in rng.sample(list(facts), 3):
        ask = f"Who is the {thing} of {town}?"
        if thing in PLACES:
            ask = f"What is the {thing} of {town} called?"
        turns += [
            ask,
            f"You ask about the {thing} of {town}.\n"
            f"The text says: the {thing} of {town} is called {facts[thing]}.\n"
            f"So the answer is {facts[thing]}.",
        ]
    told = " ".join(f"The {thing} of {town} is called {name}." for thing, name in facts.items())
    return [f"{told} {turns[0]}", *turns[1:]]
