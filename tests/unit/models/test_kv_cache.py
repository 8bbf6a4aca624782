"""Keys and values written in place are those that transformers' own cache copies."""

import pytest
import torch

from saexp.models.forward import with_room
from saexp.models.hooks import position_ids
from tests.random_models import STORED, VOCABULARY, random_lm

IDS = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
START = 5


@torch.inference_mode()
def logits_of(architecture, room, chosen):
    """Logits of token after token; after two the rows `chosen` go on, after four in reverse."""
    model = random_lm(architecture)
    ids, mask = IDS, MASK
    out = model.hf(IDS[:, :START], attention_mask=MASK[:, :START], use_cache=True,
                   position_ids=position_ids(MASK)[:, :START])  # fmt: skip
    cache = out.past_key_values if room is None else with_room(out.past_key_values, room)
    found = []
    for place in range(START, IDS.shape[1]):
        if place in (START + 2, START + 4):
            rows = chosen if place == START + 2 else torch.arange(len(chosen)).flip(0)
            cache.batch_select_indices(rows)
            ids, mask = ids[rows], mask[rows]
        out = model.hf(
            ids[:, place : place + 1],
            attention_mask=mask[:, : place + 1],
            position_ids=position_ids(mask)[:, place : place + 1],
            past_key_values=cache,
            use_cache=True,
        )
        found.append(out.logits)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    return found, kept


@pytest.mark.parametrize("architecture", STORED)
@pytest.mark.parametrize("room", [30, 7, 1])
def test_logits_and_cache_are_those_of_transformers(architecture, room):
    chosen = torch.tensor([3, 1, 0])
    expected, cache = logits_of(architecture, None, chosen)
    found, kept = logits_of(architecture, room, chosen)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for one, other in zip(kept, cache, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_nothing_is_copied_while_there_is_room():
    model = random_lm("llama")
    with torch.inference_mode():
        cache = with_room(model.hf(IDS[:, :START], use_cache=True).past_key_values, 3)
        places = set()
        for place in range(START, START + 3):
            model.hf(IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1
    assert cache.get_seq_length() == START + 3


def test_sliding_windows_that_fill_up_are_left_alone():
    model = random_lm("gemma2")
    with torch.inference_mode():
        cache = model.hf(IDS[:, :2], use_cache=True).past_key_values
        before = [type(layer) for layer in cache.layers]
        after = [type(layer) for layer in with_room(cache, 1).layers]
        assert [a is b for a, b in zip(after, before, strict=True)] == [False] * 3
        cache = model.hf(IDS[:, :2], use_cache=True).past_key_values
        after = [type(layer) for layer in with_room(cache, 8).layers]
    sliding = [kind == "sliding_attention" for kind in model.hf.config.layer_types]
    assert [a is b for a, b in zip(after, before, strict=True)] == sliding
    assert True in sliding
