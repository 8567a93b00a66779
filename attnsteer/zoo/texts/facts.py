"""Facts that a passage overrules, after CounterFact: does the model answer from the passage, or from what it knows?

    Previously, the capital of Norway has been Oslo, but currently the capital of Norway is Lima. [continuation]

The guards ask what a method must not break: the same passage asked for the earlier fact, invented countries (where the model
knows nothing), and the question without a passage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .draw import shuffled, split_of

CAPITALS = {
    "Norway": "Oslo", "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Germany": "Berlin",
    "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Ireland": "Dublin", "Belgium": "Brussels", "Russia": "Moscow", "Ukraine": "Kyiv",
    "Turkey": "Ankara",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Ethiopia": "Addis Ababa", "Morocco": "Rabat", "Algeria": "Algiers",
    "Ghana": "Accra", "Senegal": "Dakar", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Cambodia": "Phnom Penh", "Indonesia": "Jakarta", "Malaysia": "Kuala Lumpur", "Mongolia": "Ulaanbaatar",
    "Nepal": "Kathmandu", "Pakistan": "Islamabad", "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Lebanon": "Beirut",
    "Jordan": "Amman", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Argentina": "Buenos Aires", "Uruguay": "Montevideo", "Colombia": "Bogota", "Venezuela": "Caracas", "Ecuador": "Quito",
    "Australia": "Canberra", "Serbia": "Belgrade", "Croatia": "Zagreb", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Iceland": "Reykjavik",
}  # fmt: skip
INVENTED_COUNTRIES = (
    "Zembla", "Ostravia", "Kelmar", "Lurania", "Tarvonia", "Belgoria", "Quendia", "Morvania", "Sylthia", "Pandorra",
    "Varnholm", "Dreskia",
)  # fmt: skip
INVENTED_CITIES = (
    "Arkhal", "Belmora", "Castrin", "Dunvale", "Elthorn", "Farrow", "Gildern", "Harwick", "Istria", "Jorvik",
    "Keldon", "Lomar", "Mirth",
    "Norwell", "Ostin", "Pellan",
)  # fmt: skip
ENDINGS = {
    "now": (
        "The capital of {country} is",
        "Today, the capital of {country} is",
        "The government of {country} sits in its capital,",
        "Whoever flies to the capital of {country} now lands in",
        "On a new map, the capital of {country} is called",
    ),
    "earlier": (
        "Before that, the capital of {country} was",
        "In former times, the capital of {country} was",
        "On an old map, the capital of {country} is called",
    ),
}
# Kind -> (what is asked, whether the country exists, whether there is a passage).
KINDS = {
    "now": ("now", True, True),
    "earlier": ("earlier", True, True),
    "invented-now": ("now", False, True),
    "invented-earlier": ("earlier", False, True),
    "plain": ("now", True, False),
}
# A recipe's mixture: half of the samples are the task, the others its guards.
MIXTURE = ("now", "earlier", "now", "plain", "now", "invented-now", "now", "invented-earlier")


@dataclass(frozen=True)
class Fact:
    """A passage and a sentence to go on with.

    Attributes:
        prompt: ends where the answer is due. choices: the two cities; answer: index of the right one. fact: the clause that holds
            the new fact, or None without a passage. other: the clause about the earlier one. kind: of `KINDS`.
    """

    prompt: str
    choices: tuple[str, str]
    answer: int
    fact: str | None
    other: str | None
    kind: str


def facts(split: str, kind: str = "now", seed: int = 0) -> Iterator[Fact]:
    """All facts of a split, no two alike, in the order of the seed. The choices are whole names: two may begin alike.

    Args:
        split: "train", "calibration" or "test". kind: of `KINDS`, or "mixture": those of `MIXTURE` in turn.
    """
    if kind == "mixture":
        streams = {k: facts(split, k, seed) for k in MIXTURE}
        for k in itertools.cycle(MIXTURE):
            if (found := next(streams[k], None)) is None:
                return
            yield found
    asked, real, told = KINDS[kind]
    known = tuple(CAPITALS.values())
    pairs = ((c, old, new) for c, old in CAPITALS.items() for new in known if new != old)
    invented = (
        (c, old, new) for c in INVENTED_COUNTRIES for old in INVENTED_CITIES for new in INVENTED_CITIES if old != new
    )
    # an edited fact belongs to one split with all that can be asked about it
    own = [case for case in (pairs if real else invented) if split_of(" ".join(case)) == split]
    endings = ENDINGS[asked] if told else ENDINGS["now"][:1]
    every = [(*case, ending) for case in own for ending in endings]
    for i in shuffled(len(every), split, 1 + tuple(KINDS).index(kind), seed):
        country, old, new, ending = every[i]
        first = f"the capital of {country} has been {old}"
        second = f"currently the capital of {country} is {new}"
        end = ending.format(country=country)
        prompt = f"Previously, {first}, but {second}. {end}" if told else end
        right = 0 if asked == "now" and told else 1
        yield Fact(prompt, (new, old), right, second if told else None, first if told else None, kind)
