"""Names in an answer, compared as whole names at word boundaries."""

import re
from collections.abc import Iterator, Sequence

from rapidfuzz.fuzz import ratio as likeness

from saexp.labeling.answer_text import (
    ARTICLES,
    FUNCTION_WORDS,
    JOINED,
    AnswerText,
    Window,
    content,
    is_initial,
    normalised,
    tokens_of,
    word_set,
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
_TITLES = word_set(
    "mr mrs ms miss dr sir dame lord lady king director filmmaker actor actress singer rapper band"
    " group artist screenwriter writer author legend star president professor jr sr"
)
_BEFORE_OF = word_set(
    "city town village country state republic kingdom club team band commonwealth federation"
    " municipality capital part region area coast heart centre center middle border north south"
    " east west northeast northwest southeast southwest"
)

_WORD_RATIO = 75
"""Likeness that every word of a name must exceed beside that of the whole name."""
_SHORT = 4
"""Tokens of an answer that may be a name alone."""
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
    kept = [n for n, w in enumerate(answer.words) if w not in ARTICLES and w not in ignored]
    kept = kept or list(range(len(answer.words)))
    for name in (truth, *_OTHER_NAMES.get(" ".join(content(words(truth))), ())):
        wanted = _wanted(name, ignored)
        beside = _beside(wanted, ignored, person)
        spans_sentences = re.search(r"[.!?\u2026]", name.rstrip(".!?")) is not None
        for some in _runs(kept, len(wanted) + (2 if person else 0)):
            window = some[0], some[-1] + 1
            if not (answer.is_one_sentence(*window) or spans_sentences):
                continue
            begins = _is_name(answer, some, wanted, ratio, person, nickname)
            if begins is None or (cased and not _is_cased(answer, some, name)):
                continue
            in_front = not begins and _goes_on_left(answer, window, beside, person)
            if not in_front and not _goes_on_right(answer, window, beside):
                found.append(answer.widened(window, ignored))
    return found


def _runs(kept: Sequence[int], longest: int) -> Iterator[Sequence[int]]:
    for size in range(1, longest + 1):
        for a in range(len(kept) - size + 1):
            yield kept[a : a + size]


def _goes_on_left(answer: AnswerText, window: Window, beside: frozenset[str], person: bool) -> bool:
    """Whether the name begins in front of the window: "Milan" in "Inter Milan"."""
    left = window[0] - 1
    while left >= 0 and answer.words[left] in beside and JOINED.fullmatch(answer.gap(left)):
        left -= 1
    of_name = left > 0 and answer.words[left] == "of" and not person
    if of_name and answer.words[left - 1] not in _BEFORE_OF:
        left -= 1
    if not _is_name_word(answer, left, window[0], beside):
        return False
    token = answer.tokens[left]
    is_initial_point = is_initial(token) and answer.gap(left) == ". "
    joined = is_initial_point or JOINED.fullmatch(answer.gap(left)) is not None
    return joined and not token.possessive and token.word not in _TITLES


def _goes_on_right(answer: AnswerText, window: Window, beside: frozenset[str]) -> bool:
    """Whether the name ends behind the window: "Barcelona" in "Barcelona City"."""
    right = window[1]
    if answer.tokens[right - 1].possessive:
        return False
    while JOINED.fullmatch(answer.gap(right - 1)):
        if answer.words[right] not in beside:
            return _is_name_word(answer, right, right - 1, beside)
        right += 1
    return False


def _is_name_word(answer: AnswerText, n: int, near: int, beside: frozenset[str]) -> bool:
    """Whether token n, in the sentence of the token `near`, may be a part of a name.

    A capital letter shows it; in a short answer without any, every word but everyday ones may.
    """
    if n < 0 or answer.sentences[n] != answer.sentences[near]:
        return False
    word = answer.words[n]
    if word in FUNCTION_WORDS | beside or word.isdigit():
        return False
    if any(a <= n < b for a, b in answer.echoes):
        return False
    if answer.has_case:
        return answer.tokens[n].capital
    return answer.sentences.count(answer.sentences[near]) <= _SHORT


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
