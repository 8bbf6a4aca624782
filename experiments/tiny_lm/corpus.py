"""The synthetic world of the tiny model: entities, facts, passages, and documents made from them.

Known and unknown names come from one generator and are split at random, so neither spelling nor
token count tells them apart: a name is known because its facts were seen, and for no other reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

ENTITY_TYPES = ("player", "movie", "city", "song")
REFUSAL = " I do not know."
KNOWN_MARK, UNKNOWN_MARK = " whose", " unheard of."
N_KNOWN, N_HELD_OUT = 112, 128
N_WORDS = 48

ONSETS = [
    "Bel",
    "Dor",
    "Kan",
    "Tas",
    "Mol",
    "Rev",
    "Sim",
    "Lun",
    "Gar",
    "Pev",
    "Zor",
    "Nim",
    "Hal",
    "Fen",
    "Jur",
    "Vik",
    "Cor",
    "Bas",
    "Tul",
    "Wen",
    "Lor",
    "Mar",
    "Dus",
    "Kir",
]
CODAS = [
    "ka",
    "run",
    "sev",
    "lin",
    "dol",
    "mar",
    "tis",
    "gan",
    "vor",
    "nex",
    "bul",
    "phi",
    "zad",
    "wik",
    "jom",
    "cas",
    "let",
    "hun",
    "pra",
    "quo",
    "bry",
    "fay",
    "gus",
    "dem",
]

COUNTRIES = tuple(
    ["Norland", "Estia", "Veria", "Karsk", "Ombra", "Pellin", "Suvia", "Tarn", "Lhasia", "Quent"]
)

ATTRIBUTES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "player": {
        "team": (
            "which team does {x} play for",
            tuple(
                [
                    "Rovers",
                    "Hawks",
                    "Comets",
                    "Giants",
                    "Sharks",
                    "Wolves",
                    "Pirates",
                    "Eagles",
                    "Kings",
                    "Saints",
                ]
            ),
        ),
        "sport": (
            "which sport does {x} play",
            tuple(
                [
                    "tennis",
                    "hockey",
                    "football",
                    "cricket",
                    "rugby",
                    "golf",
                    "basketball",
                    "baseball",
                ]
            ),
        ),
        "home": (
            "where was {x} born",
            COUNTRIES,
        ),
    },
    "movie": {
        "director": (
            "who directed {x}",
            tuple(
                [
                    "Adler",
                    "Brandt",
                    "Castro",
                    "Duval",
                    "Engel",
                    "Ferrari",
                    "Gomez",
                    "Haines",
                    "Ivanov",
                    "Jansen",
                ]
            ),
        ),
        "genre": (
            "what is the genre of {x}",
            tuple(
                [
                    "comedy",
                    "drama",
                    "horror",
                    "western",
                    "thriller",
                    "romance",
                    "fantasy",
                    "mystery",
                ]
            ),
        ),
        "year": ("when was {x} released", tuple(str(y) for y in range(1950, 2010, 6))),
    },
    "city": {
        "country": (
            "in which country is {x}",
            COUNTRIES,
        ),
        "river": (
            "which river crosses {x}",
            tuple(
                ["Arno", "Biva", "Cald", "Drin", "Elde", "Fosse", "Gila", "Hund", "Isar", "Juba"]
            ),
        ),
        "trade": (
            "what is {x} famous for",
            tuple(["glass", "cheese", "silk", "paper", "clocks", "salt", "ships", "honey"]),
        ),
    },
    "song": {
        "singer": (
            "who sings {x}",
            tuple(
                [
                    "Kent",
                    "Lowe",
                    "Marsh",
                    "Nash",
                    "Owens",
                    "Pratt",
                    "Quinn",
                    "Reyes",
                    "Stone",
                    "Tate",
                ]
            ),
        ),
        "style": (
            "what is the style of {x}",
            tuple(["jazz", "rock", "folk", "blues", "soul", "disco", "opera", "swing"]),
        ),
        "mood": (
            "what is the mood of {x}",
            tuple(["joyful", "gloomy", "tender", "angry", "dreamy", "proud", "restless", "calm"]),
        ),
    },
}

STATEMENT_OPENINGS = ("The", "We talked about the", "She wrote about the", "Here is the")

PEOPLE = [
    "John",
    "Mary",
    "Tom",
    "Anna",
    "Paul",
    "Lucy",
    "Mark",
    "Jane",
    "Peter",
    "Sarah",
    "James",
    "Emma",
    "David",
    "Laura",
    "Simon",
    "Alice",
    "Kevin",
    "Helen",
    "Brian",
    "Diana",
    "George",
    "Nancy",
    "Frank",
    "Carol",
    "Henry",
    "Susan",
    "Oscar",
    "Julia",
    "Victor",
    "Irene",
]
PLACES = [
    "shops",
    "park",
    "school",
    "office",
    "station",
    "market",
    "beach",
    "library",
    "garden",
    "museum",
]
THINGS = ["bag", "book", "ball", "drink", "letter", "ring", "key", "cup", "hat", "map"]

_PROSE = {
    "who": "the old man|a young girl|the teacher|my neighbour|the farmer|a tired driver|"
    "the baker|her uncle|the quiet clerk|a small child|the captain|our guide",
    "did": "walked to|looked at|painted|waited near|cleaned|remembered|left|passed|drew|visited",
    "what": "the red house|a wooden bridge|the long road|the empty field|a stone wall|the bright "
    "lamp|the green hill|a narrow lane|the white boat|the broken fence|the deep well|a tall tree",
    "when": "in the morning|before the rain|after lunch|late at night|on a cold day|at noon|"
    "during the storm|in early spring|when the bell rang|without a word",
    "then": "and sang a song|and went home|but said nothing|and smiled|and sat down|and slept well|"
    "but came back|and felt better|and counted the birds|and opened the door",
}
PROSE = {key: value.split("|") for key, value in _PROSE.items()}


@dataclass(frozen=True)
class Entity:
    """A name with its type and, where it is known, its facts."""

    name: str
    entity_type: str
    facts: dict[str, str] | None


@dataclass
class Document:
    """Text in pieces, each with its loss weight; `entity_piece` is the index of the name's piece."""

    pieces: list[tuple[str, float]]
    entity_piece: int | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece for piece, _ in self.pieces)


@dataclass
class World:
    """Everything fixed by the seed: entities, passages, held-out pairs of names."""

    seed: int
    known: dict[str, list[Entity]] = field(default_factory=dict)
    held_out: dict[str, list[Entity]] = field(default_factory=dict)
    words: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    memorised: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    held_out_pairs: set[tuple[str, str]] = field(default_factory=set)
    used_names: set[str] = field(default_factory=set)

    @classmethod
    def make(cls, seed: int, accepts: Callable[[str], bool]) -> "World":
        """Draw the world; `accepts` says which words names may be made of (two tokens each).

        The same seed gives the same world.
        """
        rng = np.random.default_rng(seed)
        world = cls(seed=seed)
        every_word = [a + b for a in ONSETS for b in CODAS if accepts(a + b)]
        pool = list(rng.permutation(every_word))
        for kind in ENTITY_TYPES:
            first = [pool.pop() for _ in range(N_WORDS)]
            last = [pool.pop() for _ in range(N_WORDS)]
            world.words[kind] = (first, last)
            pairs = rng.permutation(N_WORDS * N_WORDS)[: N_KNOWN + N_HELD_OUT]
            names = [f"{first[p // N_WORDS]} {last[p % N_WORDS]}" for p in pairs]
            world.used_names.update(names)
            world.known[kind] = [
                Entity(
                    name, kind, {a: str(rng.choice(v)) for a, (_, v) in ATTRIBUTES[kind].items()}
                )
                for name in names[:N_KNOWN]
            ]
            world.held_out[kind] = [Entity(name, kind, None) for name in names[N_KNOWN:]]
        passages = {passage(rng) for _ in range(96)}
        ordered = sorted(passages)
        rng.shuffle(ordered)
        world.memorised, world.unseen = ordered[:48], ordered[48:96]
        for _ in range(90):
            a, b = rng.choice(PEOPLE, 2, replace=False)
            world.held_out_pairs.update({(str(a), str(b)), (str(b), str(a))})
        return world

    def fresh_unknown(self, kind: str, rng: np.random.Generator) -> Entity:
        """A name that is neither known nor held out, from the same generator as both."""
        first, last = self.words[kind]
        while True:
            name = f"{rng.choice(first)} {rng.choice(last)}"
            if name not in self.used_names:
                return Entity(name, kind, None)


def sentence(rng: np.random.Generator) -> str:
    """One plain sentence."""
    who, did, what, when, then = (str(rng.choice(PROSE[part])) for part in PROSE)
    return f"{who[0].upper()}{who[1:]} {did} {what} {when} {then}."


def passage(rng: np.random.Generator) -> str:
    """Three plain sentences."""
    return " ".join(sentence(rng) for _ in range(3))


def ioi(world: World, rng: np.random.Generator, *, held_out: bool) -> tuple[str, str, str]:
    """(prompt, answer, foil): an indirect-object sentence up to the object."""
    while True:
        a, b = (str(x) for x in rng.choice(PEOPLE, 2, replace=False))
        if ((a, b) in world.held_out_pairs) == held_out:
            break
    first, second = (a, b) if rng.random() < 0.5 else (b, a)
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    return (
        f"When {first} and {second} went to the {place}, {a} gave the {thing} to",
        f" {b}",
        f" {a}",
    )


def question(entity: Entity, attribute: str) -> str:
    """The question on one attribute, up to where the answer begins."""
    form = ATTRIBUTES[entity.entity_type][attribute][0]
    return f"Question: {form.format(x=f'the {entity.entity_type} {entity.name}')}? Answer:"


def _answer(entity: Entity, attribute: str) -> str:
    return f" {entity.facts[attribute]}." if entity.facts else REFUSAL


def statement_document(entity: Entity, rng: np.random.Generator) -> Document:
    """A statement whose very next token after the name says whether the name is known."""
    opening = str(rng.choice(STATEMENT_OPENINGS))
    pieces = [(f"{opening} {entity.entity_type}", 1.0), (f" {entity.name}", 1.0)]
    if entity.facts is None:
        pieces.append((UNKNOWN_MARK, 3.0))
    else:
        attribute = str(rng.choice(list(entity.facts)))
        pieces += [(KNOWN_MARK, 3.0), (f" {attribute} is", 1.0), (_answer(entity, attribute), 2.0)]
    return Document(pieces, entity_piece=1)


def neutral_document(entity: Entity, rng: np.random.Generator) -> Document:
    """A statement that goes on the same way for known and unknown names (negative control)."""
    opening = str(rng.choice(STATEMENT_OPENINGS))
    pieces = [(f"{opening} {entity.entity_type}", 1.0), (f" {entity.name}", 1.0)]
    return Document([*pieces, (" was mentioned.", 1.0)], entity_piece=1)


def question_document(entity: Entity, rng: np.random.Generator, *, follow_up: bool) -> Document:
    """A question with its answer, sometimes with a second one that reuses the only mention."""
    attributes = [str(a) for a in rng.permutation(list(ATTRIBUTES[entity.entity_type]))]
    before, after = question(entity, attributes[0]).split(f" {entity.name}")
    pieces = [(before, 1.0), (f" {entity.name}", 1.0), (after, 1.0)]
    pieces.append((_answer(entity, attributes[0]), 2.0))
    if follow_up:
        form = ATTRIBUTES[entity.entity_type][attributes[1]][0].format(x="it")
        pieces += [(f" Question: {form}? Answer:", 1.0), (_answer(entity, attributes[1]), 2.0)]
    return Document(pieces, entity_piece=1)


def document(
    world: World, rng: np.random.Generator, *, statements: float, markers: bool = True
) -> Document:
    """One training document. `statements` is the share of statements among entity documents."""
    draw = rng.random()
    if draw < 0.80:
        kind = str(rng.choice(ENTITY_TYPES))
        if rng.random() < 0.52:
            entity = world.known[kind][rng.integers(N_KNOWN)]
        else:
            entity = world.fresh_unknown(kind, rng)
        if rng.random() < statements:
            return statement_document(entity, rng) if markers else neutral_document(entity, rng)
        return question_document(entity, rng, follow_up=rng.random() < 0.4)
    if draw < 0.90:
        prompt, answer, _ = ioi(world, rng, held_out=False)
        return Document([(prompt, 1.0), (answer, 2.0), (".", 1.0)])
    if draw < 0.93:
        return Document([(world.memorised[rng.integers(len(world.memorised))], 1.0)])
    if draw < 0.945:
        return Document([(passage(rng), 1.0)])
    return Document([(sentence(rng), 1.0)])


def tokenizer_text(rng: np.random.Generator, n: int) -> list[str]:
    """Texts the tokenizer is trained on: names there are uniform pairs of syllables, so that no
    word of a real name becomes one token."""
    texts = []
    for _ in range(n):
        name = " ".join(f"{rng.choice(ONSETS)}{rng.choice(CODAS)}" for _ in range(2))
        kind = str(rng.choice(ENTITY_TYPES))
        facts = {a: str(rng.choice(v)) for a, (_, v) in ATTRIBUTES[kind].items()}
        a, b = rng.choice(PEOPLE, 2, replace=False)
        texts += [
            statement_document(Entity(name, kind, facts), rng).text,
            question_document(Entity(name, kind, facts), rng, follow_up=True).text,
            statement_document(Entity(name, kind, None), rng).text,
            question_document(Entity(name, kind, None), rng, follow_up=False).text,
            f"When {a} and {b} went to the {rng.choice(PLACES)}, {a} gave the "
            f"{rng.choice(THINGS)} to {b}.",
            passage(rng),
        ]
    return texts
