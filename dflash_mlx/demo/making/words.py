"""Names, words and numbers for the demo text, split so that held-out ones are never trained on."""

import random
import zlib


def listed(words: str) -> tuple[str, ...]:
    """Words written after one another, as a tuple."""
    return tuple(words.split())


ONSETS = listed("b d f g k l m n p r s t v z br dr gr kr pl sl st tr sh")
VOWELS = listed("a e i o u")
CODAS = ["", "", "", "n", "r", "l", "s", "m", "k", "nd", "sk"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Real names and words for the "novel" split: none is made of the syllables above alone, and
# `training_may_use` keeps them out of the training text.
NOVEL_NAMES = listed(
    "Elizabeth Wolfgang Chioma Yaroslav Beatrix Hyacinth Thaddeus Joaquin Geoffrey Xiulan "
    "Matthew Johanna Quincy Ingrid Oswald Phoebe Wyatt Eoghan Huxley Cecily Zachary Ottoline "
    "Heathcliff Jacqueline Bjorn Ayotunde Winifred Hugh Charlotte Ludwig Mathilde Vaughn "
    "Kathleen Jeremy Cuthbert Hannah Joyce Walther Michael Yvette"
)
NOVEL_TOWNS = listed(
    "Oxford Quebec Reykjavik Washington Edinburgh Zhengzhou Heidelberg Johannesburg Plymouth "
    "Thessaly Wellington Chicago Guayaquil Utrecht Bayeux Youghal Whitby Jaipur Nuuk Cairo"
)
NOVEL_WORDS = listed(
    "weight height hours payload queue checksum yield budget width quota invoice voyage "
    "thickness lengthy charge joined wealth hyphen auction rhythm"
)
_NOVEL = {word.lower() for word in NOVEL_NAMES + NOVEL_TOWNS + NOVEL_WORDS}

SPLITS = ("train", "held-out", "novel")


def training_may_use(value: str) -> bool:
    """True for values of the training split; one in eight is kept for the held-out split."""
    value = value.lower()
    return value not in _NOVEL and zlib.crc32(value.encode()) % 8 != 0


class Words:
    """Draws the open slots of one example and remembers them in `slots`.

    Attributes:
        split: "train", "held-out" (same syllables, values that training never uses) or
            "novel" (real names and words, held-out numbers).
    """

    def __init__(self, rng: random.Random, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}: use one of {', '.join(SPLITS)}.")
        self.rng = rng
        self.split = split
        self.slots: list[str] = []

    def name(self) -> str:
        """A person's name."""
        return self._word(NOVEL_NAMES).capitalize()

    def town(self) -> str:
        """A town's name."""
        return self._word(NOVEL_TOWNS).capitalize()

    def word(self) -> str:
        """A lower-case word, for functions, arguments and goods."""
        return self._word(NOVEL_WORDS)

    def number(self, low: int, high: int) -> int:
        """A number in low..high, both included."""
        while True:
            value = self.rng.randint(low, high)
            if self._take(str(value)):
                return value

    def _word(self, novel: tuple[str, ...]) -> str:
        while True:
            if self.split == "novel":
                word = self.rng.choice(novel).lower()
            elif self.split == "train" and self.rng.random() < 0.2:
                word = self._spelled()
            else:
                word = self._syllables()
            if self._take(word):
                return word

    def _take(self, value: str) -> bool:
        fits = training_may_use(value) == (self.split == "train")
        if not fits or value in self.slots:
            return False
        self.slots.append(value)
        return True

    def _syllables(self) -> str:
        count = self.rng.choice((2, 2, 2, 3))
        return "".join(
            self.rng.choice(ONSETS) + self.rng.choice(VOWELS) + self.rng.choice(CODAS)
            for _ in range(count)
        )

    def _spelled(self) -> str:
        """Letters in any order, so that a target also learns to copy letter by letter."""
        return "".join(self.rng.choice(LETTERS) for _ in range(self.rng.randint(3, 8)))
