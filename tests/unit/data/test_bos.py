"""BOS in front of texts: put there, left out, never twice; all other tokens as they are."""

import copy

import pytest
from tokenizers import processors

from saexp.data.tokenization import adds_bos, tokenize
from saexp.errors import DataError
from tests.random_models import TEXTS, tokenizer
from tests.unit.data.test_tokens import WithoutOffsets

BOS = tokenizer().bos_token_id


def adding_none():
    """The same tokenizer as GPT-2's is: it has a BOS token and puts none in front."""
    bare = copy.deepcopy(tokenizer())
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return bare


class Slow(WithoutOffsets):
    """With the id of its BOS token, as transformers' own have it."""

    def __init__(self, fast):
        super().__init__(fast)
        self.bos_token_id = fast.bos_token_id


def test_which_tokenizers_add_it():
    assert adds_bos(tokenizer())
    assert not adds_bos(adding_none())
    none = adding_none()
    none.bos_token = None
    assert not adds_bos(none)


@pytest.mark.parametrize("kind", [lambda t: t, Slow], ids=["fast", "slow"])
@pytest.mark.parametrize("own", [True, False], ids=["adds it", "adds none"])
def test_texts_read_alike_whichever_way_the_tokenizer_has_it(kind, own):
    of = kind(tokenizer(trim_offsets=False) if own else adding_none())
    with_it, without = (tokenize(TEXTS, of, 12, prepend_bos=b) for b in (True, False))
    assert tokenize(TEXTS, of, 12) == (with_it if own else without)
    for a, b in zip(with_it, without, strict=True):
        assert a.ids[0] == BOS
        assert a.special[0]
        assert a.offsets[0] == (0, 0)
        assert BOS not in a.ids[1:] + b.ids
        n = min(len(a) - 1, len(b))
        assert a.ids[1 : n + 1] == b.ids[:n]
        assert a.offsets[1 : n + 1] == b.offsets[:n]
        assert len(a) <= 12
        assert len(b) <= 12
        # The longest that fits, BOS included.
        assert a.truncated == (len(tokenizer()(a.text)["input_ids"]) > 12)
        assert b.truncated == (len(tokenizer()(a.text)["input_ids"]) - 1 > 12)


@pytest.mark.parametrize("own", [True, False], ids=["adds it", "adds none"])
@pytest.mark.parametrize("asked", [True, False, None])
def test_a_text_that_holds_its_own_keeps_that_one(own, asked):
    of = tokenizer() if own else adding_none()
    [tokens] = tokenize(["<bos>user: Who?"], of, 64, asked)
    assert [i for i, t in enumerate(tokens.ids) if t == BOS] == [0]


def test_without_a_bos_token_it_cannot_be_asked_for():
    of = adding_none()
    of.bos_token = None
    with pytest.raises(DataError, match="^prepend_bos=true, but the tokenizer has no BOS token$"):
        tokenize(["a"], of, 8, True)
    assert tokenize(["a"], of, 8, False) == tokenize(["a"], of, 8)
