"""Words of an answer, and whether a mention of a true answer counts as answering the question."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rapidfuzz.fuzz import ratio

from saexp.data import UNSPACED


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


Window = tuple[int, int]
"""[start, end) in tokens."""


ARTICLES = frozenset(("the", "a", "an"))
_FOLDED = str.maketrans("łŁøØđĐðÐıæÆœŒþÞ", "lLoOdDdDiaAoOtT")

_LETTER = rf"(?:(?!{UNSPACED.pattern})[^\W_])"
_TOKEN = re.compile(
    rf"{UNSPACED.pattern}|(?:[^\W\d_]\.){{2,}}(?:[^\W\d_](?!\w))?|{_LETTER}+(?:'{_LETTER}+)*|&"
)
_SENTENCE_END = re.compile(r"(?<!\.)[.!?]+(?<!\.\.)[\"')\]]*\s|[\u3002\uff01\uff1f]|\n")
_ABBREVIATED = word_set("mr mrs ms dr st jr sr vs sgt gen col lt prof rev inc ltd vol ft mt")
JOINED = re.compile(r"\s+|-|\u2010|\u2011")
"""Text between two words of a name."""
_CLAUSE_END = re.compile(r"[,;:()\u2013\u2014\u2026\n]|\s-\s|\.\.")

_NEGATIONS = frozenset(
    ("not", "never", "no", "neither", "nor", "cannot", "without", "unlike", "except", "aint")
    + tuple(f"{verb}nt" for verb in ("is", "was", "are", "were", "do", "does", "did", "has"))
    + tuple(f"{verb}nt" for verb in ("have", "had", "ca", "could", "wo", "would", "should"))
)
_NEGATION_REACH = 8
"""A negation denies a name that follows within this many tokens."""
_INSTEAD = (("rather", "than"), ("instead", "of"), ("other", "than"))
_NOT_NEGATED = (("none", "other", "than"), ("no", "other", "than"), ("one", "other", "than"))
_CONTRASTS = frozenset(("but", "however", "although", "though"))
_AUXILIARIES = word_set("is was are were did does do has had would could")
_ASKING = word_set("who what which where when why how can have") | _AUXILIARIES

_CORRECTION = re.compile(
    r"\b(?:no,? wait|wait,? no|scratch that|correction:|i meant?\b|let me correct|i stand corrected"
    r"|my mistake|i made a mistake|i apologi[sz]e|on second thou?ghts?|the correct answer is"
    r"|(?:sorry|actually),? (?:it|that|the|he|she|they|i))\b",
    re.IGNORECASE,
)

FUNCTION_WORDS = word_set(
    "the a an in on at by for from of off to with and or but as it its he she they we i you his her"
    " their this that these those is was are were be been has have had did does do yes no not so if"
    " when where who what which while after before since during one some also then there here my"
    " our your name named called answer well sure okay according based"
)
_TYPE_NOUNS = {
    "movie": ("movie", "film"),
    "song": ("song", "track", "single", "tune"),
    "player": ("player", "footballer", "athlete"),
    "city": ("city", "town"),
    "book": ("book", "novel"),
}
_CUES = {
    "album": ("album", "record", "lp"),
    "performer": ("performer", "band", "group", "singer", "artist", "duo", "rapper"),
    "teams": ("team", "teams", "club", "side"),
    "director": ("director", "filmmaker"),
    "screenwriter": ("screenwriter", "writer"),
    "cast": ("actor", "actress", "star"),
    "birthplace": ("birthplace", "city", "town"),
    "release_year": ("year",),
    "birth_year": ("year",),
}
_FILLERS = ARTICLES | word_set(
    "it its is was that answer i think believe probably maybe perhaps in on by from of called"
    " titled named entitled"
)
_NAMING = frozenset(("called", "titled", "named", "entitled"))
_POSSESSIVES = frozenset(("her", "his", "their", "its", "our", "my"))
_PREPOSITIONS = frozenset(("in", "on", "from", "off", "by", "for", "at"))
_VERBS = _AUXILIARIES | word_set(
    "appears appeared comes came features featured includes included released found located"
    " situated lies belongs recorded taken performed sung written directed plays played born"
    " made"
)
_SAME_NAME = re.compile(r"\b(?:self-titled|eponymous|same (?:name|title))\b", re.IGNORECASE)


@dataclass(frozen=True)
class Token:
    """A word of a text."""

    word: str
    """Lower case, without accents, apostrophes and full stops."""
    start: int
    end: int
    text: str

    @property
    def stem(self) -> str:
        """The word without a possessive 's."""
        return self.word[:-1] if self.possessive else self.word

    @property
    def possessive(self) -> bool:
        """Whether it ends with 's."""
        return self.text.lower().endswith("'s")

    @property
    def capital(self) -> bool:
        """Whether it begins with an upper-case letter."""
        return self.text[:1].isupper()


def normalised(text: str) -> str:
    """The text in NFC, with straight apostrophes and quotation marks."""
    plain = unicodedata.normalize("NFC", text)
    return plain.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))


def tokens_of(text: str) -> list[Token]:
    """Tokens of a normalised text; initials such as "J. J." are one token, "&" is "and"."""
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text):
        word = _folded(match[0])
        if not word:
            continue
        token = Token(word, match.start(), match.end(), match[0])
        last = tokens[-1] if tokens else None
        if (
            last
            and is_initial(last)
            and is_initial(token)
            and re.fullmatch(r"\.\s?", text[last.end : token.start])
        ):
            merged = text[last.start : token.end]
            tokens[-1] = Token(last.word + word, last.start, token.end, merged)
            continue
        tokens.append(token)
    return tokens


def words(text: str) -> list[str]:
    """Lower-case words without accents and punctuation; "&" becomes "and"."""
    return [token.word for token in tokens_of(normalised(text))]


def content(all_words: Sequence[str]) -> list[str]:
    """The words without articles; all words where they are articles only."""
    return [w for w in all_words if w not in ARTICLES] or list(all_words)


def is_initial(token: Token) -> bool:
    """Whether the token is one or two capital letters, as the initials of first names are."""
    return len(token.text.replace(".", "").replace(" ", "")) <= 2 and token.text.isupper()


def _folded(text: str) -> str:
    if text == "&":
        return "and"
    plain = unicodedata.normalize("NFKD", text.translate(_FOLDED))
    plain = "".join(c for c in plain if not unicodedata.combining(c)).casefold()
    return re.sub(r"[^\w]", "", plain)


def runs_of(text_words: Sequence[str], phrase: Sequence[str]) -> list[Window]:
    """All windows of `text_words` that equal `phrase`; none for an empty phrase."""
    n, target = len(phrase), list(phrase)
    starts = range(len(text_words) - n + 1) if n else ()
    return [(i, i + n) for i in starts if list(text_words[i : i + n]) == target]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The question of an answer."""

    text: str = ""
    """The prompt, followed by the answer's prefix where the model continues one."""
    entity: str | None = None
    entity_type: str | None = None
    attribute: str | None = None

    @cached_property
    def words(self) -> list[str]:
        """The words of the prompt."""
        return content(words(self.text))

    @cached_property
    def entity_words(self) -> list[str]:
        """The words of the entity's name."""
        return content(words(self.entity or ""))

    @cached_property
    def words_without_entity(self) -> list[list[str]]:
        """The words of the prompt before, between and after the mentions of the entity."""
        parts, start = [], 0
        for i, j in runs_of(self.words, self.entity_words):
            parts.append(self.words[start:i])
            start = j
        return [*parts, self.words[start:]]

    @property
    def is_begun(self) -> bool:
        """Whether the answer continues the prompt's last sentence."""
        text = self.text.rstrip()
        return bool(text) and text[-1] not in "?.!\u3002\uff1f\uff01\"'"

    @property
    def type_nouns(self) -> tuple[str, ...]:
        """Nouns for the entity's type."""
        name = str(self.entity_type or "").lower()
        return _TYPE_NOUNS.get(name, (name,) if name else ())

    @property
    def cues(self) -> tuple[str, ...]:
        """Words that announce a value of the attribute."""
        name = str(self.attribute or "").lower()
        return _CUES.get(name, tuple(name.split("_")) if name else ())


class AnswerText:
    """A normalised answer; where the answer corrects itself, the text after its last correction."""

    def __init__(self, text: str, asked: Asked, *, numeric: bool = False) -> None:
        self.asked = asked
        self.text = _corrected(normalised(text), asked, numeric)
        self.tokens = tokens_of(self.text)
        self.words = [token.word for token in self.tokens]
        self.has_case = not self.text.isupper() and any(t.capital for t in self.tokens)
        self.sentences = self._sentence_numbers()
        self.echoes = self._echoes()

    def _sentence_numbers(self) -> list[int]:
        numbers, number = [], 0
        for i in range(len(self.tokens)):
            number += i > 0 and self._is_sentence_end(i - 1)
            numbers.append(number)
        return numbers

    def _is_sentence_end(self, i: int) -> bool:
        after = self.tokens[i + 1].start if i + 1 < len(self.tokens) else len(self.text)
        token = self.tokens[i]
        gap = self.text[token.end : after]
        if not _SENTENCE_END.search(gap):
            return False
        title_continues = gap.strip() in ("?", "!") and self.text[after : after + 1].islower()
        if self.has_case and title_continues:
            return False
        is_initial_like = token.capital and (len(token.word) == 1 or "." in token.text)
        abbreviated = token.word in _ABBREVIATED or is_initial_like
        return not (abbreviated and gap.strip() == ".")

    def _echoes(self) -> list[Window]:
        """Mentions of the entity, capitalised as its name is: in lower case it may be a word."""
        name = self.asked.entity_words
        if not name:
            return []
        indices = [i for i, w in enumerate(self.words) if w not in ARTICLES or w in name]
        plain = [self.words[i] for i in indices]
        stems = [self.tokens[i].stem for i in indices]
        cased = any(c.isupper() for c in self.asked.entity or "") and self.has_case
        spans = dict.fromkeys([*runs_of(plain, name), *runs_of(stems, name)])
        windows = [(indices[i], indices[j - 1] + 1) for i, j in spans]
        return [(i, j) for i, j in windows if not cased or any(t.capital for t in self.tokens[i:j])]

    def is_one_sentence(self, i: int, j: int) -> bool:
        """Whether the tokens i to j (exclusive) belong to one sentence."""
        return self.sentences[i] == self.sentences[j - 1]

    def gap(self, i: int) -> str:
        """The text between token i and the next."""
        if not 0 <= i < len(self.tokens) - 1:
            return ""
        return self.text[self.tokens[i].end : self.tokens[i + 1].start]

    def without_echoes(self) -> str:
        """The text with the mentions of the entity blanked out."""
        text = self.text
        for i, j in self.echoes:
            start, end = self.tokens[i].start, self.tokens[j - 1].end
            text = text[:start] + "_" * (end - start) + text[end:]
        return text

    def window(self, start: int, end: int) -> Window:
        """The tokens that overlap the characters [start, end)."""
        inside = [n for n, t in enumerate(self.tokens) if t.start < end and t.end > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def widened(self, window: Window, ignored: frozenset[str]) -> Window:
        """The window extended by the `ignored` words next to it."""
        i, j = window
        while i > 0 and self.words[i - 1] in ignored and JOINED.fullmatch(self.gap(i - 1)):
            i -= 1
        while JOINED.fullmatch(self.gap(j - 1)) and self.words[j] in ignored:
            j += 1
        return i, j

    def counts(self, window: Window, mentions: Sequence[Window]) -> bool:
        """Whether a mention of a true answer counts as an answer; `mentions` are all of them."""
        i, j = window
        return not (
            self.is_repetition(window)
            or self.is_negated(i, j)
            or self._is_alternative(i, j, mentions)
            or self.is_asked(i, j)
            or self._is_about_another(i)
        )

    # --- repetitions of the question

    def is_repetition(self, window: Window) -> bool:
        """Whether a mention only repeats words of the question."""
        i, j = window
        inside = [e for e in self.echoes if e[0] <= i and j <= e[1]]
        if any(e[1] - e[0] > j - i for e in inside):
            return True
        mention = content([*self.words[i : j - 1], self.tokens[j - 1].stem])
        asked = self.asked
        if not inside and not runs_of(asked.words, mention):
            return False
        elsewhere = any(runs_of(part, mention) for part in asked.words_without_entity)
        if not elsewhere and not inside and len(mention) < len(asked.entity_words):
            return self._introduction(i)[1] == "type"
        return not self._is_stated(i, j)

    def _introduction(self, i: int) -> tuple[int, str]:
        """(index, kind) of the word that introduces token i; (-1, "") where the sentence has none.

        The kind is type or cue for a noun of the type or a cue, copula, preposition, or "".
        """
        k = i - 1
        skipped = ARTICLES | _POSSESSIVES
        while k >= 0 and (self.words[k] in skipped or self.words[k].isdigit()):
            k -= 1
        if k < 0 or self.sentences[k] != self.sentences[i]:
            return -1, ""
        if self.words[k] in (*_NAMING, "of") and k > 0:
            introduced = self.words[k - 1]
            if introduced in self.asked.cues:
                return k - 1, "cue"
            if introduced in self.asked.type_nouns:
                return k - 1, "type"
        word = self.words[k]
        if word in self.asked.cues:
            return k, "cue"
        if word in self.asked.type_nouns:
            return k, "type"
        token = self.tokens[k]
        if word in ("is", "was", "be") or word in _NAMING or token.possessive:
            return k, "copula"
        return k, "preposition" if word in _PREPOSITIONS else ""

    def _is_stated(self, i: int, j: int) -> bool:
        """Whether a mention that repeats the question has the position of an answer."""
        sentence = [n for n, s in enumerate(self.sentences) if s == self.sentences[i]]
        others = [n for n in sentence if not i <= n < j]
        fillers = _FILLERS | set(self.asked.cues)
        if all(self.words[n] in fillers or self.words[n].isdigit() for n in others):
            return True
        k, kind = self._introduction(i)
        if kind in ("type", "cue"):
            return kind == "cue"
        if self.asked.is_begun and self._continues_prompt(i):
            return True
        if j < len(self.words) and self.words[j] in _AUXILIARIES and self.gap(j - 1).strip() != ".":
            return False
        before = self.words[sentence[0] : max(k, 0)]
        if kind == "preposition":
            return any(w in _VERBS for w in before)
        if kind == "copula":
            about_type = any(w in self.asked.type_nouns for w in before)
            return not about_type or any(w in self.asked.cues for w in before)
        return False

    def _continues_prompt(self, i: int) -> bool:
        """Whether token i is the first name of the answer, in its first clause."""
        before = self.text[: self.tokens[i].start]
        has_name = any(t.capital and t.word not in ARTICLES for t in self.tokens[:i])
        return not has_name and self.sentences[i] == 0 and not _CLAUSE_END.search(before.strip())

    def says_same_name(self) -> bool:
        """Whether the text says that the answer has the entity's name ("the self-titled album")."""
        for match in _SAME_NAME.finditer(self.text):
            i, j = self.window(*match.span())
            near = self.words[max(i - 6, 0) : j + 3]
            if any(cue in near for cue in self.asked.cues) and not self.is_negated(i, j):
                return True
        return False

    # --- negations, alternatives, questions

    def is_negated(self, i: int, j: int) -> bool:
        """Whether the tokens are denied ("not in Poland", "Poland is not")."""
        k = i
        while k > 0 and i - k < _NEGATION_REACH:
            gap = self.gap(k - 1)
            if k == i and ")" in self.text[self.tokens[i].end : self.tokens[j - 1].end]:
                gap = gap.replace("(", "")
            if _CLAUSE_END.search(gap) or self.sentences[k - 1] != self.sentences[i]:
                break
            k -= 1
            word = self.words[k]
            if any(a <= k < b for a, b in self.echoes):
                continue
            if word in _CONTRASTS:
                break
            if tuple(self.words[max(k - 2, 0) : k + 1]) in _NOT_NEGATED:
                break
            if tuple(self.words[k : k + 2]) in _INSTEAD:
                previous = tuple(self.words[max(k - 1, 0) : k + 2])
                return previous not in _NOT_NEGATED
            if word in _NEGATIONS and self.words[k + 1 : k + 2] not in (["only"], ["doubt"]):
                return True
        if j < len(self.words) and self.sentences[j] == self.sentences[j - 1]:
            after = self.words[j : j + 2]
            if after[0] in _NEGATIONS - {"no", "without", "except", "unlike", "nor", "neither"}:
                return not _CLAUSE_END.search(self.gap(j - 1))
            return after[0] in _AUXILIARIES and after[-1] in ("not", "never")
        return False

    def _is_alternative(self, i: int, j: int, mentions: Sequence[Window]) -> bool:
        """Whether the tokens are one of several alternatives, another of which is wrong."""
        skipped = ARTICLES | _PREPOSITIONS | {"either", "maybe", "perhaps", "possibly"}

        def is_other(n: int) -> bool:
            if not 0 <= n < len(self.words) or self.sentences[n] != self.sentences[i]:
                return False
            may_be_name = self.tokens[n].capital or not self.tokens[i].capital
            return may_be_name and not any(a <= n < b for a, b in mentions)

        n = j
        if n < len(self.words) and self.words[n] == "or":
            n += 1
            while n < len(self.words) and self.words[n] in skipped:
                n += 1
            if is_other(n):
                return True
        n = i - 1
        while n >= 0 and self.words[n] in skipped:
            n -= 1
        return n > 0 and self.words[n] == "or" and is_other(n - 1)

    def is_asked(self, i: int, j: int) -> bool:
        """Whether the tokens are part of a question, after its first word."""
        first, last = self.sentences[i], self.sentences[j - 1]
        sentences = [n for n, s in enumerate(self.sentences) if first <= s <= last]
        start, end = sentences[0], sentences[-1]
        after = self.tokens[end + 1].start if end + 1 < len(self.tokens) else len(self.text)
        asks = "?" in self.text[self.tokens[end].end : after]
        return asks and start < i and self.words[start] in _ASKING

    def _is_about_another(self, i: int) -> bool:
        """Whether the sentence is about another title of the same type ('The movie "Alien" …')."""
        indices = [n for n, s in enumerate(self.sentences) if s == self.sentences[i]]
        first, last = indices[0], indices[-1]
        if not self.asked.entity_words or any(first <= a <= last for a, _ in self.echoes):
            return False
        sentence = self.text[self.tokens[first].start : self.tokens[last].end + 1]
        nouns = "|".join(map(re.escape, self.asked.type_nouns))
        match = nouns and re.match(rf'(?:the |a )?(?:{nouns}),? "([^"]+)"', sentence, re.IGNORECASE)
        if not match:
            return False
        title = " ".join(content(words(match[1])))
        return ratio(title, " ".join(self.asked.entity_words)) < 80


def _corrected(text: str, asked: Asked, numeric: bool) -> str:
    """The text after its last correction that is followed by an answer; the text without any."""
    for correction in reversed(list(_CORRECTION.finditer(text))):
        rest = text[correction.end() :]
        if numeric:
            if re.search(r"\d", rest):
                return rest
            continue
        excluded = {*asked.entity_words, *FUNCTION_WORDS}
        if any(t.capital and t.word not in excluded for t in tokens_of(rest)):
            return rest
    return text
