"""Names in an answer: compared as whole names, at word boundaries."""

import re
from collections.abc import Sequence

from rapidfuzz.fuzz import ratio as likeness

from saexp.data.answer_text import (
    ARTICLES,
    AnswerText,
    Window,
    content,
    normalised,
    tokens_of,
    words,
)

EVERYDAY = frozenset(
    ("who", "what", "where", "when", "it", "them", "us", "her", "him", "she", "he", "you", "me")
    + ("we", "they", "yes", "no", "this", "that", "one")
)
_OTHER_NAMES = {
    "united states": ("US", "USA", "United States of America", "America"),
    "united kingdom": ("UK", "Great Britain", "Britain"),
    "united arab emirates": ("Emirates",),
    "czech republic": ("Czechia",),
    "czechia": ("Czech Republic",),
    "netherlands": ("Holland",),
    "russia": ("Russian Federation",),
    "south korea": ("Republic of Korea",),
    "ivory coast": ("Côte d'Ivoire",),
    "turkey": ("Türkiye",),
    "myanmar": ("Burma",),
}
_WORD_RATIO = 75
"""Likeness that every word of a name must exceed beside that of the whole name."""
_SMALL_WORDS = frozenset(("of", "and", "the", "de", "del", "la"))


def name_windows(
    answer: AnswerText,
    truth: str,
    *,
    ratio: int | float,
    person: bool = False,
    nickname: bool = False,
    ignored: frozenset[str] = frozenset(),
    cased: bool = True,
) -> list[Window]:
    """Where the true name is in the answer, whole: not as a part of a longer name.

    Articles, accents, case, punctuation and the `ignored` words make no difference; the likeness
    of the names must exceed `ratio`, that of each of their words 75. A `person` may be given by the
    surname, by initials, surname first and without middle names; a `nickname` is the last word
    alone where it is a plural. A capital letter is needed where `cased`.
    """
    found: list[Window] = []
    for name in (truth, *_OTHER_NAMES.get(" ".join(content(words(truth))), ())):
        wanted = _wanted(name, ignored)
        if not wanted:
            continue
        has_sentences = re.search(r"[.!?\u2026]", name.rstrip(".!?")) is not None
        kept = [n for n, w in enumerate(answer.words) if w not in ARTICLES and w not in ignored]
        if not kept:
            kept = list(range(len(answer.words)))
        for size in range(1, len(wanted) + (3 if person else 1)):
            for a in range(len(kept) - size + 1):
                some = kept[a : a + size]
                window = some[0], some[-1] + 1
                if not (answer.is_one_sentence(*window) or has_sentences):
                    continue
                first_name = _is_name(answer, some, wanted, ratio, person, nickname)
                if first_name is None or (cased and not _is_cased(answer, some, name)):
                    continue
                if not answer.is_part_of_longer_name(
                    *window,
                    ignored=_beside(wanted, ignored, person),
                    of_person=person,
                    first_name=first_name,
                ):
                    found.append(window)
    return found


def _wanted(name: str, ignored: frozenset[str]) -> list[str]:
    found = [t.word for t in tokens_of(normalised(name))]
    return [w for w in found if w not in ARTICLES and w not in ignored] or found


def _beside(wanted: Sequence[str], ignored: frozenset[str], person: bool) -> frozenset[str]:
    """Words beside a name that do not make it a longer one."""
    if person:
        return ignored | {"jr"}
    # "LA Lakers": initials of the words that a nickname leaves out.
    return ignored | {_initials(wanted[:-1])}


def _initials(some: Sequence[str]) -> str:
    return "".join(w[0] for w in some if w not in _SMALL_WORDS)


def _is_cased(answer: AnswerText, some: Sequence[int], name: str) -> bool:
    """Whether it is written as a name, if the true name is and the answer has capital letters."""
    if not answer.has_case or not any(c.isupper() for c in name):
        return True
    if name.isupper():
        return all(answer.tokens[n].text.isupper() for n in some)
    return answer.tokens[some[0]].capital or answer.tokens[some[-1]].capital


def _is_name(
    answer: AnswerText,
    some: Sequence[int],
    wanted: Sequence[str],
    ratio: int | float,
    person: bool,
    nickname: bool,
) -> bool | None:
    """Whether the name begins with its first word, so that none can be lacking in front.

    None where the tokens are not that name.
    """
    last = answer.tokens[some[-1]]
    front = [answer.words[n] for n in some[:-1]]
    for run in dict.fromkeys(((*front, last.word), (*front, last.stem))):
        if _same(run, wanted, ratio):
            return person and len(run) > 1
        if person and _is_person(answer, some, run, wanted, ratio):
            return len(run) > 1 and run[0] not in wanted[1:]
        if nickname and len(wanted) > 1 and run == (wanted[-1],) and run[0].endswith("s"):
            return False
        if not person and len(run) == 1 and len(wanted) > 2 and run[0] == _initials(wanted):
            return False if last.text.replace(".", "").isupper() else None
    return None


def _same(run: Sequence[str], wanted: Sequence[str], ratio: int | float) -> bool:
    if list(run) == list(wanted):
        return True
    if len(run) != len(wanted) or likeness(" ".join(run), " ".join(wanted)) <= ratio:
        return False
    return all(likeness(a, b) > _WORD_RATIO for a, b in zip(run, wanted, strict=True))


def _is_person(
    answer: AnswerText,
    some: Sequence[int],
    run: Sequence[str],
    wanted: Sequence[str],
    ratio: int | float,
) -> bool:
    """Whether it is a person's name in another form than the true one."""
    wanted = [w for w in wanted if w not in ("jr", "sr")] or list(wanted)
    if len(wanted) < 2:
        return False
    if len(run) < len(wanted) and list(run) == wanted[-len(run) :]:
        return len(run[0]) > 1
    if _same(run, [wanted[-1], *wanted[:-1]], ratio) and "," in answer.gap(some[0]):
        return True
    if len(run) < 2 or not _same(run[-1:], wanted[-1:], ratio):
        return False
    gaps = [answer.gap(n) for n in range(some[0], some[-1])]
    if any(c in gap for gap in gaps for c in ",;:()\n") or "and" in set(run) - set(wanted):
        return False
    return _same_given_names(run[:-1], wanted[:-1])


def _same_given_names(given: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether first names agree, as initials too; middle names may be left out of either."""
    if given == (_initials(wanted),) or list(wanted) == [_initials(given)]:
        return True
    short, long = sorted((given[0], wanted[0]), key=len)
    if not (short == long or (long.startswith(short) and len(short) in (1, *range(3, 9)))):
        return False
    middles = given[1:], wanted[1:]
    if not middles[0] or not middles[1]:
        return True
    return len(middles[0]) == len(middles[1]) and all(
        a[0] == b[0] and (len(a) == 1 or len(b) == 1 or a == b)
        for a, b in zip(*middles, strict=True)
    )
