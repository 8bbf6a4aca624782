"""The engine's identities, on five architectures: what is edited, where, how strongly."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from saexp.interventions.engine import Edit, Row, generate, last_logits
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.saes.base import SparseAutoencoder
from tests.random_models import D_MODEL, STORED, TEXTS, random_hf, random_lm, tokenizer

AT = Hookpoint(1, "resid_post")
D_SAE = 48


@pytest.fixture(params=STORED)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return random_lm(request.param)


@pytest.fixture
def sae() -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(3)
    decoder = torch.nn.functional.normalize(
        torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1
    )
    return SparseAutoencoder(
        {
            "W_enc": decoder.T.contiguous(),
            "W_dec": decoder,
            "b_enc": torch.zeros(D_SAE),
            "b_dec": torch.zeros(D_MODEL),
        },
        architecture="standard",
        hookpoint=AT,
    )


def prompts(model: LanguageModel) -> list[tuple[int, ...]]:
    return [tuple(model.tokenizer(t)["input_ids"][:12]) for t in TEXTS]


def plain_logits(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return model.hf(input_ids=torch.tensor([ids])).logits[0, -1]


def by_hand(
    model: LanguageModel, ids: Sequence[int], added: Tensor, places: Sequence[int]
) -> Tensor:
    """The same edit by a plain hook on the block, one unpadded prompt, no cache."""

    def hook(_m: object, _a: object, out: Tensor | tuple[Tensor, ...]) -> object:
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        stream[0, list(places)] += added
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    handle = model.blocks[AT.layer].register_forward_hook(hook)
    try:
        return plain_logits(model, ids)
    finally:
        handle.remove()


def test_coefficient_zero_is_bit_equal(model: LanguageModel, sae: SparseAutoencoder) -> None:
    ids = prompts(model)
    edit = Edit((1, 2), 0.0, scales=(1.0, 1.0))
    steered = [Row(i, edit, (2,), generated=True) for i in ids]
    plain = [Row(i) for i in ids]
    assert torch.equal(last_logits(model, steered, sae, AT), last_logits(model, plain, sae, AT))


def test_a_row_beside_edited_ones_keeps_every_bit(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)
    plain = last_logits(model, [Row(i) for i in ids], sae, AT)
    rows = [Row(i) for i in ids]
    rows[0] = Row(ids[0], Edit((4,), 9.0, scales=(1.0,)), (len(ids[0]) - 2,))
    mixed = last_logits(model, rows, sae, AT)
    assert torch.equal(mixed[1:], plain[1:])
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)


def test_steering_equals_a_hand_written_hook(model: LanguageModel, sae: SparseAutoencoder) -> None:
    ids = prompts(model)
    edits = [Edit((i, i + 5), 0.5 + i, scales=(1.0, 0.3)) for i in range(len(ids))]
    places = [(1,), (0, 3), (2, 4, 5), (1, 2), (3,)]
    rows = [Row(i, e, p) for i, e, p in zip(ids, edits, places, strict=True)]
    found = last_logits(model, rows, sae, AT)
    for row, logits in zip(rows, found, strict=True):
        assert row.edit is not None
        a, b = row.edit.write
        added = row.edit.coefficient * (sae.W_dec[a] + 0.3 * sae.W_dec[b])
        wanted = by_hand(model, row.ids, added, row.positions)
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)


def test_clamping_puts_each_latent_at_its_target(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)[0]
    place = 3
    seen: list[Tensor] = []
    handle = model.blocks[AT.layer].register_forward_hook(
        lambda _m, _a, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    plain_logits(model, ids)
    handle.remove()
    stream = seen[0][0, place]
    acts = sae.encode(stream)
    latents, targets = (2, 7), (0.0, 1.5)
    rows = [Row(ids, Edit(latents, 1.0, read=latents, targets=targets), (place,))]
    found = last_logits(model, rows, sae, AT)[0]
    added = sum(
        ((t - acts[f]) * sae.W_dec[f] for f, t in zip(latents, targets, strict=True)),
        torch.zeros(D_MODEL),
    )
    torch.testing.assert_close(found, by_hand(model, ids, added, [place]), atol=2e-4, rtol=1e-4)


def greedy_by_hand(model: LanguageModel, row: Row, sae: SparseAutoencoder, n: int) -> list[int]:
    """Greedy decoding that runs the whole text again for every token, without a cache."""
    ids = list(row.ids)
    for _ in range(n):
        places = list(row.positions)
        if row.generated:
            places += range(len(row.ids), len(ids))
        added = torch.zeros(D_MODEL)
        if row.edit is not None:
            for f, s in zip(row.edit.write, row.edit.scales, strict=True):
                added = added + row.edit.coefficient * s * sae.W_dec[f]
        token = int(by_hand(model, ids, added, places).argmax())
        if token in model.eos_ids:
            break
        ids.append(token)
    return ids[len(row.ids) :]


def test_batched_cached_generation_equals_decoding_without_a_cache(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)
    rows = [Row(ids[0]), Row(ids[1], Edit((3,), 4.0, scales=(1.0,)), (1, 2))]
    rows += [Row(ids[2], Edit((5,), 2.0, scales=(1.0,)), (2,), generated=True)]
    rows += [Row(ids[3], Edit((5, 6), 1.0, scales=(2.0, 1.0)), (), generated=True)]
    found = generate(model, rows, sae, AT, max_new_tokens=6, batch_tokens=10_000)
    assert found == [greedy_by_hand(model, row, sae, 6) for row in rows]


def test_batch_size_and_order_change_no_token(model: LanguageModel, sae: SparseAutoencoder) -> None:
    ids = prompts(model)
    rows = [Row(i, Edit((n,), 3.0, scales=(1.0,)), (1,)) for n, i in enumerate(ids)]
    rows += [Row(i) for i in ids]
    together = generate(model, rows, sae, AT, max_new_tokens=5, batch_tokens=10_000)
    alone = generate(model, rows, sae, AT, max_new_tokens=5, batch_tokens=1)
    backwards = generate(model, rows[::-1], sae, AT, max_new_tokens=5, batch_tokens=40)
    assert together == alone == backwards[::-1]


def test_generation_equals_transformers_generate(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)
    found = generate(model, [Row(i) for i in ids], sae, AT, max_new_tokens=6, batch_tokens=10_000)
    for prompt, tokens in zip(ids, found, strict=True):
        with torch.inference_mode():
            out = model.hf.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=6,
                eos_token_id=list(model.eos_ids),
                pad_token_id=model.pad_id,
            )
        wanted = [t for t in out[0, len(prompt) :].tolist() if t not in model.eos_ids]
        assert tokens == wanted


def test_finished_rows_leave_the_batch_and_change_nothing(sae: SparseAutoencoder) -> None:
    model = LanguageModel.wrap(random_hf("llama"), tokenizer())
    ids = prompts(model)
    rows = [Row(i) for i in ids]
    free = generate(model, rows, sae, AT, max_new_tokens=8, batch_tokens=10_000)
    stop = free[0][2]
    model.__dict__["eos_ids"] = (stop,)
    found = generate(model, rows, sae, AT, max_new_tokens=8, batch_tokens=10_000)
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert found == cut
    assert found[0] == free[0][:2]


def test_no_hook_is_left(model: LanguageModel, sae: SparseAutoencoder) -> None:
    class Broken(Exception):
        pass

    def fail(*_: object) -> None:
        raise Broken

    handle = model.blocks[-1].register_forward_hook(fail)
    row = Row(prompts(model)[0], Edit((1,), 1.0, scales=(1.0,)), (1,))
    with pytest.raises(Broken):
        last_logits(model, [row], sae, AT)
    handle.remove()
    for module in model.hf.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
