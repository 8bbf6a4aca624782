"""One tokenisation with offsets: against the tokenizer's own, and with one that has none."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saexp.data.tokenization import span_to_tokens, tokenize
from saexp.errors import DataError
from tests.random_models import TEXTS, tokenizer

BOTH_OFFSETS = pytest.mark.parametrize("trim", [True, False], ids=["trimmed", "with space"])
ODD = [
    "Paris",
    " leading and trailing ",
    "a  b",
    "🙂",
    "naïve café",
    "日本",
    "tab\tand\nline",
    "e\u0301",
]
WORDS = st.lists(
    st.sampled_from(["Paris", "Café", "New", "🙂🙃", "日本", "it's", "42", ",", "\n", "\t", "é"]),
    min_size=1,
    max_size=8,
)
ANY_TEXT = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), min_size=1, max_size=30),
    WORDS.map(" ".join),
)


class WithoutOffsets:
    """A real tokenizer as slow ones are: ids from text, text from ids, no offsets."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast
        self.bos_token, self.all_special_ids = fast.bos_token, fast.all_special_ids

    def __call__(self, text, **options):
        assert not options.keys() & {"return_offsets_mapping", "return_special_tokens_mask"}
        return {"input_ids": self.fast(text, **options)["input_ids"]}

    def decode(self, ids, **options):
        return self.fast.decode(ids, **options)


SLOW = WithoutOffsets(tokenizer(trim_offsets=False))


def one(text, max_length=64, of=None):
    return tokenize([text], of or tokenizer(), max_length)[0]


def strings(tokens, indices):
    return [tokens.text[a:b] for a, b in (tokens.offsets[i] for i in indices)]


def span_of(text, part):
    start = text.rindex(part)
    return start, start + len(part)


@BOTH_OFFSETS
def test_ids_and_offsets_are_the_tokenizers_own(trim):
    fast = tokenizer(trim_offsets=trim)
    for text, tokens in zip(TEXTS + ODD, tokenize(TEXTS + ODD, fast, 64), strict=True):
        expected = fast(text, return_offsets_mapping=True)
        assert tokens.text == text
        assert list(tokens.ids) == expected["input_ids"]
        assert list(tokens.offsets) == expected["offset_mapping"]
        assert tokens.special == (True, *[False] * (len(tokens) - 1))
        assert not tokens.truncated


def test_order_is_kept_where_only_some_texts_bring_their_own_bos():
    texts = ["one", "<bos>two", "three", "<bos>four"]
    assert [t.text for t in tokenize(texts, tokenizer(), 64)] == texts


@pytest.mark.parametrize("of", [tokenizer(), SLOW], ids=["fast", "slow"])
def test_a_text_that_begins_with_bos_gets_no_second_one(of):
    plain, chat = tokenize(["user: Who?", "<bos>user: Who?"], of, 64)
    assert chat.ids == plain.ids
    assert chat.ids.count(1) == 1
    assert chat.special == plain.special
    assert chat.offsets[0] == (0, 5)
    assert strings(chat, span_to_tokens(chat, (5, 9))) == strings(
        plain, span_to_tokens(plain, (0, 4))
    )


@pytest.mark.parametrize("of", [tokenizer(), SLOW], ids=["fast", "slow"])
def test_special_tokens_inside_a_text_are_marked(of):
    tokens = one("before<eos>after", of=of)
    inside = tokens.ids.index(2)
    assert tokens.special[inside]
    assert tokens.offsets[inside] == (6, 11)
    assert inside not in span_to_tokens(tokens, (0, 16))
    assert strings(tokens, span_to_tokens(tokens, (11, 16)))[0].startswith("a")


@pytest.mark.parametrize("of", [tokenizer(), SLOW], ids=["fast", "slow"])
def test_truncation_keeps_the_beginning(of):
    text = TEXTS[0]
    whole, cut, same = one(text, of=of), one(text, 6, of), one(text, len(one(text)), of)
    assert cut.ids == whole.ids[:6]
    assert cut.offsets == whole.offsets[:6]
    assert (cut.truncated, same.truncated, whole.truncated) == (True, False, False)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("templated", [False, True])
def test_a_text_is_cut_as_its_whole_tokens_are_whoever_gave_it_a_bos(bos, templated):
    of = tokenizer()
    for text in (TEXTS[0], f"<bos>{TEXTS[0]}"):
        (whole,) = tokenize([text], of, 10_000, bos, templated=templated)
        for n in range(2, len(whole) + 2):
            (cut,) = tokenize([text], of, n, bos, templated=templated)
            assert cut.ids == whole.ids[:n]
            assert cut.truncated is (n < len(whole))


@BOTH_OFFSETS
def test_a_word_after_a_space_is_its_tokens_whoever_holds_the_space(trim):
    fast = tokenizer(trim_offsets=trim)
    tokens = one(TEXTS[0], of=fast)
    indices = span_to_tokens(tokens, span_of(TEXTS[0], "Fenlet Baszad"))
    assert fast.decode([tokens.ids[i] for i in indices]) == " Fenlet Baszad"
    assert indices == list(range(indices[0], indices[-1] + 1))


@BOTH_OFFSETS
@pytest.mark.parametrize("part", ["Café", "é", "Münster"])
def test_a_token_with_a_part_of_a_character_belongs_to_it(trim, part):
    fast = tokenizer(trim_offsets=trim)
    tokens = one(TEXTS[2], of=fast)
    assert part in fast.decode(
        [tokens.ids[i] for i in span_to_tokens(tokens, span_of(TEXTS[2], part))]
    )


@BOTH_OFFSETS
@pytest.mark.parametrize("part", ["🙂", "🙃", "🙂🙃", "日本語", "の"])
def test_emoji_and_cjk_are_all_their_bytes(trim, part):
    fast = tokenizer(trim_offsets=trim)
    tokens = one(TEXTS[4], of=fast)
    indices = span_to_tokens(tokens, span_of(TEXTS[4], part))
    assert part in fast.decode([tokens.ids[i] for i in indices])
    for left_out in (indices[1:], indices[:-1]):
        assert part not in fast.decode([tokens.ids[i] for i in left_out])


def test_white_space_around_a_span_does_not_count():
    tokens = one("of  Paris  now")
    assert span_to_tokens(tokens, (2, 11)) == span_to_tokens(tokens, (4, 9))
    assert span_to_tokens(tokens, (2, 4)) == []


def test_a_span_cut_by_truncation_has_no_token():
    text, part = TEXTS[0], "Fenlet Baszad"
    span = span_of(text, part)
    last = span_to_tokens(one(text), span)[-1]
    assert span_to_tokens(one(text, last + 1), span) == span_to_tokens(one(text), span)
    for length in range(2, last + 1):
        assert span_to_tokens(one(text, length), span) == []


def test_a_tokenizer_that_cuts_at_the_left_loses_the_spans_at_the_left():
    left = type(tokenizer())(
        tokenizer_object=tokenizer()._tokenizer, bos_token="<bos>", truncation_side="left"
    )
    text = TEXTS[0]
    tokens = one(text, 12, left)
    assert tokens.truncated
    assert span_to_tokens(tokens, span_of(text, "The player")) == []
    # Cut in its middle, it is left out rather than measured in part.
    first = min(a for (a, _), s in zip(tokens.offsets, tokens.special, strict=True) if not s)
    assert span_to_tokens(tokens, (first - 2, first + 3)) == []
    assert "game" in left.decode(
        [tokens.ids[i] for i in span_to_tokens(tokens, span_of(text, "game"))]
    )


@BOTH_OFFSETS
@settings(max_examples=75)
@given(text=ANY_TEXT, data=st.data())
def test_the_tokens_of_a_span_cover_it_and_are_ordinary(trim, text, data):
    tokens = one(text, 256, tokenizer(trim_offsets=trim))
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    indices = span_to_tokens(tokens, (start, end))
    covered = {n for i in indices for n in range(*tokens.offsets[i])}
    inside = text[start:end]
    first = start + len(inside) - len(inside.lstrip())
    last = end - len(inside) + len(inside.rstrip())
    assert covered >= {n for n in range(first, last) if not text[n].isspace()}
    assert not any(tokens.special[i] for i in indices)
    # None of them could be left out: each holds a character of the span.
    assert all(set(range(*tokens.offsets[i])) & set(range(first, last)) for i in indices)
    assert bool(indices) == bool(inside.strip())


@settings(max_examples=75)
@given(text=ANY_TEXT.filter(lambda t: "<" not in t))
def test_without_offsets_the_same_ones_are_found_by_decoding(text):
    fast, slow = one(text, 256, tokenizer(trim_offsets=False)), one(text, 256, SLOW)
    assert (slow.ids, slow.special, slow.truncated) == (fast.ids, fast.special, fast.truncated)
    assert slow.offsets == fast.offsets


def test_without_offsets_and_cut_in_a_character():
    ids = one(TEXTS[4], of=SLOW).ids
    for length in range(2, len(ids) + 1):
        fast = one(TEXTS[4], length, tokenizer(trim_offsets=False))
        assert one(TEXTS[4], length, SLOW).offsets == fast.offsets


def test_a_tokenizer_that_changes_the_text_and_has_no_offsets_is_an_error():
    class Lower(WithoutOffsets):
        def __call__(self, text, **options):
            return super().__call__(text.lower(), **options)

    message = (
        "the tokenizer returns no offsets and its tokens do not decode to the text 'Paris', so "
        "spans cannot be located; use a fast tokenizer"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        one("Paris", of=Lower(tokenizer()))
