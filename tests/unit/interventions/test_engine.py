"""The engine's identities, on five architectures: what is edited, where, how strongly."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from saexp.interventions.cached_generation import LogitReader, divergences, generate, read_logits
from saexp.interventions.directions import orthonormal
from saexp.interventions.generation import last_logits
from saexp.interventions.stream_edits import (
    Add,
    Move,
    Op,
    Patch,
    Project,
    Row,
    Sampling,
    Splice,
    Vector,
)
from saexp.models import Hookpoint
from saexp.models.hooks import capture
from saexp.models.loading import LanguageModel
from saexp.saes import SAESettings, SparseAutoencoder
from tests.random_models import D_MODEL, STORED, TEXTS, hooks_left, random_hf, random_lm, tokenizer

AT = Hookpoint(1, "resid_post")
D_SAE = 48


@pytest.fixture(params=STORED)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return random_lm(request.param)


@pytest.fixture(params=["gpt2", "gpt_neox", "gemma2"])
def one_of_three(request: pytest.FixtureRequest) -> LanguageModel:
    """Of batches and caches: learned positions, rotary ones, and a sliding window."""
    return random_lm(request.param)


@pytest.fixture(params=["gpt2", "gemma2"])
def one_of_two(request: pytest.FixtureRequest) -> LanguageModel:
    """Of operations' formulas, which do not depend on the architecture: a block's output is
    replaced in one place."""
    return random_lm(request.param)


@pytest.fixture
def sae() -> SparseAutoencoder:
    return made_sae()


def made_sae(**options: object) -> SparseAutoencoder:
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
        SAESettings(architecture="standard", hookpoint=AT, **options),
    )


def add(sae: SparseAutoencoder, latents: Sequence[int], coefficient: float) -> tuple[Op, ...]:
    return (Add(AT, Vector(sae.directions(list(latents)).sum(0)), coefficient),)


def prompts(model: LanguageModel) -> list[tuple[int, ...]]:
    return [tuple(model.tokenizer(t)["input_ids"][:12]) for t in TEXTS]


def logits_of(model: LanguageModel, rows: Sequence[Row], sae: SparseAutoencoder) -> Tensor:
    return last_logits(model, rows, {AT: sae})[:, -1]


def plain_logits(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return model.hf(input_ids=torch.tensor([ids])).logits[0, -1]


def by_hand(
    model: LanguageModel, ids: Sequence[int], change: Callable[[Tensor], Tensor], places: object
) -> Tensor:
    """The same edit by a plain hook on the block, one unpadded prompt, no cache."""
    chosen = list(places)  # type: ignore[call-overload]

    def hook(_m: object, _a: object, out: Tensor | tuple[Tensor, ...]) -> object:
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        stream[0, chosen] = change(stream[0, chosen])
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    handle = model.blocks[AT.layer].register_forward_hook(hook)
    try:
        return plain_logits(model, ids)
    finally:
        handle.remove()


def check(
    model: LanguageModel,
    sae: SparseAutoencoder,
    op: Op,
    change: Callable[[Tensor], Tensor],
    places: tuple[int, ...] = (-4, -2),
) -> None:
    """An operation equals its formula in a plain hook, on every prompt, and does something.

    `places` count from the end: Gemma-2's last token does not see the first ones.
    """
    rows = [Row(i, (op,), tuple(len(i) + p for p in places)) for i in prompts(model)]
    for row, logits in zip(rows, logits_of(model, rows, sae), strict=True):
        wanted = by_hand(model, row.ids, change, row.positions)
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(wanted, plain_logits(model, row.ids), atol=1e-3)


def test_coefficient_zero_is_bit_equal(model: LanguageModel, sae: SparseAutoencoder) -> None:
    ids = prompts(model)
    vector = Vector(torch.ones(D_MODEL))
    ops: list[Op] = [
        Add(AT, vector, 0.0),
        Move(AT, (1, 2), (1, 2), (3.0, 0.0), 0.0),
        Project(AT, Vector(torch.eye(D_MODEL)[:2]), 0.0),
        Splice(AT, 0.0),
        Patch(AT, Vector(torch.ones(1, D_MODEL)), 0.0),
    ]
    plain = logits_of(model, [Row(i) for i in ids], sae)
    for op in ops:
        steered = [Row(i, (op,), (2,), generated=True) for i in ids]
        assert torch.equal(logits_of(model, steered, sae), plain)


def test_a_row_beside_edited_ones_keeps_every_bit(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)
    plain = logits_of(model, [Row(i) for i in ids], sae)
    rows = [Row(i) for i in ids]
    rows[0] = Row(ids[0], add(sae, (4,), 9.0), (len(ids[0]) - 2,))
    mixed = logits_of(model, rows, sae)
    assert torch.equal(mixed[1:], plain[1:])
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)


def test_steering_equals_a_hand_written_hook(model: LanguageModel, sae: SparseAutoencoder) -> None:
    ids = prompts(model)
    places = [(1,), (0, 3), (2, 4, 5), (1, 2), (3,)]
    rows = [
        Row(i, add(sae, (n, n + 5), 0.5 + n), p)
        for n, (i, p) in enumerate(zip(ids, places, strict=True))
    ]
    all_logits = logits_of(model, rows, sae)
    for n, (row, logits) in enumerate(zip(rows, all_logits, strict=True)):
        added = (0.5 + n) * (sae.W_dec[n] + sae.W_dec[n + 5])
        wanted = by_hand(model, row.ids, lambda x, a=added: x + a, row.positions)
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", ["always", "active", "at_least"])
def test_clamping_moves_latents_to_their_targets(
    one_of_two: LanguageModel, sae: SparseAutoencoder, rule: str
) -> None:
    latents, targets = (2, 7, 11), torch.tensor([0.0, 1.5, 0.2])

    def change(x: Tensor) -> Tensor:
        acts = sae.encode(x)[:, list(latents)]
        gap = targets - acts
        if rule == "active":
            gap = gap * (acts > 0)
        if rule == "at_least":
            gap = gap.clamp(min=0)
        return x + 0.8 * gap @ sae.W_dec[list(latents)]

    op = Move(AT, latents, latents, tuple(targets.tolist()), 0.8, rule)
    check(one_of_two, sae, op, change, (-5, -4, -3, -2, -1))


def test_clamping_holds_for_saes_that_scale_each_row(one_of_two: LanguageModel) -> None:
    sae = made_sae(normalize_activations="layer_norm")

    def change(x: Tensor) -> Tensor:
        acts = sae.encode(x)
        moved = acts.clone()
        moved[:, 5] = 2.0
        return x + sae.decode(moved, x) - sae.decode(acts, x)

    check(one_of_two, sae, Move(AT, (5,), (5,), (2.0,), 1.0), change)


def test_a_control_is_moved_as_far_as_what_it_stands_for(
    one_of_two: LanguageModel, sae: SparseAutoencoder
) -> None:
    def change(x: Tensor) -> Tensor:
        return x + (1.5 - sae.encode(x)[:, [3]]) * sae.W_dec[9]

    check(one_of_two, sae, Move(AT, (3,), (9,), (1.5,), 1.0), change)


def test_removing_directions_leaves_no_component(
    one_of_two: LanguageModel, sae: SparseAutoencoder
) -> None:
    basis = orthonormal(sae.W_dec[:3])
    check(one_of_two, sae, Project(AT, Vector(basis), 1.0), lambda x: x - x @ basis.T @ basis)
    wanted = torch.tensor([1.0, -2.0, 0.5])
    op = Project(AT, Vector(basis), 1.0, tuple(wanted.tolist()))
    check(one_of_two, sae, op, lambda x: x + (wanted - x @ basis.T) @ basis)


def test_the_reconstruction_in_place_of_the_stream(
    one_of_two: LanguageModel, sae: SparseAutoencoder
) -> None:
    places = (-4, -3, -2)
    check(one_of_two, sae, Splice(AT, 1.0), lambda x: sae.decode(sae.encode(x)), places)
    way = torch.nn.functional.normalize(torch.arange(1.0, D_MODEL + 1), dim=0)

    def aside(x: Tensor) -> Tensor:
        miss = (sae.decode(sae.encode(x)) - x).norm(dim=-1, keepdim=True)
        return x + miss * way

    check(one_of_two, sae, Splice(AT, 1.0, instead=Vector(way)), aside, places)


def test_the_reconstruction_with_its_error_changes_nothing(
    one_of_two: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(one_of_two)
    rows = [Row(i, (Splice(AT, 1.0, error=True),), (1, 2, 3)) for i in ids]
    plain = logits_of(one_of_two, [Row(i) for i in ids], sae)
    torch.testing.assert_close(logits_of(one_of_two, rows, sae), plain, atol=1e-5, rtol=1e-5)


def streams(model: LanguageModel, ids: Sequence[int], at: Hookpoint) -> Tensor:
    with torch.inference_mode(), capture(model, [at]) as record:
        model.hf(input_ids=torch.tensor([list(ids)]))
    return record[at][0]


@pytest.mark.parametrize("stream", ["resid_post", "attn_out", "mlp_out", "attn_z"])
def test_patching_a_prompt_from_itself_changes_nothing(
    model: LanguageModel, sae: SparseAutoencoder, stream: str
) -> None:
    ids, at = prompts(model)[0], Hookpoint(1, stream)
    own = streams(model, ids, at)
    row = Row(ids, (Patch(at, Vector(own[1:4]), 1.0),), (1, 2, 3))
    logits = logits_of(model, [row], sae)[0]
    torch.testing.assert_close(logits, plain_logits(model, ids), atol=1e-5, rtol=1e-5)


def test_patching_all_positions_from_a_pair_gives_the_pair_s_logits(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    first, second = prompts(model)[:2]
    n = min(len(first), len(second))
    first, second = first[:n], second[:n]
    rows = [Row(first, (Patch(AT, Vector(streams(model, second, AT)), 1.0),), tuple(range(n)))]
    rows.append(Row(prompts(model)[2]))
    logits = logits_of(model, rows, sae)[0]
    torch.testing.assert_close(logits, plain_logits(model, second), atol=1e-4, rtol=1e-4)


def test_patching_one_head_leaves_the_others(model: LanguageModel, sae: SparseAutoencoder) -> None:
    first, second = prompts(model)[:2]
    at = Hookpoint(1, "attn_z")
    values = streams(model, second, at)[-3:-1]
    width = values.shape[1] // 4
    places = (len(first) - 3, len(first) - 2)
    row = Row(first, (Patch(at, Vector(values), 1.0, (width, 2 * width)),), places)
    logits = logits_of(model, [row], sae)[0]
    mixed = streams(model, first, at)[-3:-1].clone()
    mixed[:, width : 2 * width] = values[:, width : 2 * width]
    whole = Row(first, (Patch(at, Vector(mixed), 1.0),), places)
    torch.testing.assert_close(logits, logits_of(model, [whole], sae)[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, plain_logits(model, first), atol=1e-4)


def test_several_layers_at_once_equal_two_hooks(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)[0]
    vector = sae.W_dec[4]
    ops = tuple(Add(Hookpoint(n, "resid_post"), Vector(vector), 2.0) for n in (0, 1))
    logits = logits_of(model, [Row(ids, ops, (2,))], sae)[0]

    def hook(_m: object, _a: object, out: Tensor | tuple[Tensor, ...]) -> object:
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        stream[0, 2] += 2 * vector
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    handles = [model.blocks[n].register_forward_hook(hook) for n in (0, 1)]
    wanted = plain_logits(model, ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)


def test_a_transcoder_reads_one_stream_and_is_written_to_another() -> None:
    model = random_lm("llama")
    generator = torch.Generator().manual_seed(5)
    source, target = Hookpoint(1, "mlp_in"), Hookpoint(1, "mlp_out")
    sae = SparseAutoencoder(
        {
            "W_enc": torch.randn(D_MODEL, D_SAE, generator=generator),
            "W_dec": torch.randn(D_SAE, D_MODEL, generator=generator),
            "b_enc": torch.zeros(D_SAE),
            "b_dec": torch.zeros(D_MODEL),
        },
        SAESettings(architecture="standard", hookpoint=source, hookpoint_out=target),
    )
    ids = prompts(model)[0]
    read, written = streams(model, ids, source), streams(model, ids, target)
    acts = sae.encode(read[2:3])
    wanted = written[2:3] + (1.0 - acts[:, [6]]) * sae.W_dec[6]
    saes = {source: sae}
    logits = last_logits(model, [Row(ids, (Move(source, (6,), (6,), (1.0,), 1.0),), (2,))], saes)
    by_patch = last_logits(model, [Row(ids, (Patch(target, Vector(wanted), 1.0),), (2,))], saes)
    torch.testing.assert_close(logits, by_patch, atol=1e-4, rtol=1e-4)
    spliced = last_logits(model, [Row(ids, (Splice(source, 1.0),), (2,))], saes)
    patch = Patch(target, Vector(sae.decode(acts, read[2:3])), 1.0)
    torch.testing.assert_close(
        spliced, last_logits(model, [Row(ids, (patch,), (2,))], saes), atol=1e-4, rtol=1e-4
    )


def greedy_by_hand(
    model: LanguageModel, row: Row, change: Callable[[Tensor], Tensor], n: int
) -> list[int]:
    """Greedy decoding that runs the whole text again for every token, without a cache."""
    ids = list(row.ids)
    for _ in range(n):
        places = list(row.positions)
        if row.generated:
            places += range(len(row.ids), len(ids))
        token = int(by_hand(model, ids, change, places).argmax())
        if token in model.eos_ids:
            break
        ids.append(token)
    return ids[len(row.ids) :]


def test_batched_cached_generation_equals_decoding_without_a_cache(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)
    rows_and_changes: list[tuple[Row, Callable[[Tensor], Tensor]]] = [
        (Row(ids[0]), lambda x: x),
        (Row(ids[1], add(sae, (3,), 4.0), (1, 2)), lambda x: x + 4 * sae.W_dec[3]),
        (Row(ids[2], add(sae, (5,), 2.0), (2,), True), lambda x: x + 2 * sae.W_dec[5]),
        (Row(ids[3], add(sae, (6,), 3.0), (), True), lambda x: x + 3 * sae.W_dec[6]),
        (
            Row(ids[3], (Move(AT, (7,), (7,), (2.5,), 1.0),), (4,), True),
            lambda x: x + (2.5 - sae.encode(x)[:, [7]]) * sae.W_dec[7],
        ),
    ]
    rows = [row for row, _ in rows_and_changes]
    generated = generate(model, rows, {AT: sae}, max_new_tokens=6, batch_tokens=10_000)
    assert generated == [greedy_by_hand(model, row, change, 6) for row, change in rows_and_changes]


def test_batch_size_and_order_change_no_token(
    one_of_three: LanguageModel, sae: SparseAutoencoder
) -> None:
    model = one_of_three
    ids = prompts(model)
    rows = [Row(i, add(sae, (n,), 3.0), (1,)) for n, i in enumerate(ids)]
    rows += [Row(i) for i in ids]
    saes = {AT: sae}
    together = generate(model, rows, saes, max_new_tokens=5, batch_tokens=10_000)
    alone = generate(model, rows, saes, max_new_tokens=5, batch_tokens=1)
    backwards = generate(model, rows[::-1], saes, max_new_tokens=5, batch_tokens=40)
    assert together == alone == backwards[::-1]


def test_prompts_that_are_shared_give_what_each_gives_alone(
    one_of_three: LanguageModel, sae: SparseAutoencoder
) -> None:
    model = one_of_three
    long = [tuple(model.tokenizer(t)["input_ids"]) for t in TEXTS[:3]]
    rows = [
        Row(ids, add(sae, (n,), 2.0 + n), (len(ids) - 1 - n % 3,)) for ids in long for n in range(3)
    ]
    rows += [Row(ids, add(sae, (1,), 3.0), (), True) for ids in long]
    all_logits = last_logits(model, rows, {AT: sae})[:, -1]
    for row, logits in zip(rows, all_logits, strict=True):
        alone = logits_of(model, [row], sae)[0]
        torch.testing.assert_close(logits, alone, atol=2e-4, rtol=1e-4)
    together = generate(model, rows, {AT: sae}, max_new_tokens=5, batch_tokens=10_000)
    assert together == generate(model, rows, {AT: sae}, max_new_tokens=5, batch_tokens=1)


def test_generation_equals_transformers_generate(one_of_three: LanguageModel) -> None:
    model = one_of_three
    ids = prompts(model)
    generated = generate(model, [Row(i) for i in ids], max_new_tokens=6, batch_tokens=10_000)
    for prompt, tokens in zip(ids, generated, strict=True):
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


def test_samples_depend_on_the_row_alone_and_follow_the_model_s_probabilities() -> None:
    model = random_lm("llama")
    ids = prompts(model)
    rows = [Row(i, sample=Sampling(1.0, seed)) for i in ids[:2] for seed in range(400)]
    together = generate(model, rows, max_new_tokens=1, batch_tokens=10_000)
    alone = generate(model, rows[:20], max_new_tokens=1, batch_tokens=1)
    assert together[:20] == alone
    for n in range(2):
        probabilities = plain_logits(model, ids[n]).softmax(-1)
        tokens = [t[0] for t in together[n * 400 : n * 400 + 400] if t]
        likely = probabilities.topk(20).indices.tolist()
        drawn = sum(t in likely for t in tokens) / 400
        wanted = float(probabilities[likely].sum())
        assert abs(drawn - wanted) < 4 * (wanted * (1 - wanted) / 400) ** 0.5
    cold = [Row(i, sample=Sampling(1e-4, 7)) for i in ids]
    assert generate(model, cold, max_new_tokens=4, batch_tokens=10_000) == generate(
        model, [Row(i) for i in ids], max_new_tokens=4, batch_tokens=10_000
    )


def test_finished_rows_leave_the_batch_and_change_nothing(sae: SparseAutoencoder) -> None:
    model = LanguageModel.wrap(random_hf("llama"), tokenizer())
    ids = prompts(model)
    rows = [Row(i) for i in ids]
    rows += [Row(i, add(sae, (n,), 2.0), (1,), True) for n, i in enumerate(ids)]
    saes = {AT: sae}
    free = generate(model, rows, saes, max_new_tokens=8, batch_tokens=10_000)
    stop = free[0][2]
    model.__dict__["eos_ids"] = (stop,)
    generated = generate(model, rows, saes, max_new_tokens=8, batch_tokens=10_000)
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert generated == cut
    assert generated[0] == free[0][:2]


def test_logits_are_read_at_the_last_tokens_of_every_row(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)
    rows = [Row(i, about=(2,)) for i in ids] + [Row(ids[0], add(sae, (2,), 3.0), (1,), about=(3,))]
    log_probabilities = read_logits(
        model,
        rows,
        {AT: sae},
        LogitReader(
            lambda _row, logits: logits.log_softmax(-1)[:, 5].numpy(),
            kind="test",
            n_last=lambda row: row.about[0],
        ),
        batch_tokens=30,
    )
    for row, values in zip(rows[:-1], log_probabilities[:-1], strict=True):
        with torch.inference_mode():
            wanted = model.hf(input_ids=torch.tensor([row.ids])).logits[0, -2:].log_softmax(-1)
        torch.testing.assert_close(
            torch.from_numpy(values).float(), wanted[:, 5], atol=1e-4, rtol=1e-4
        )
    assert len(log_probabilities[-1]) == 3


def test_the_cost_is_the_divergence_from_the_unedited_model(
    model: LanguageModel, sae: SparseAutoencoder
) -> None:
    ids = prompts(model)[:2]
    rows = [Row(i, add(sae, (n,), c), (1, 2)) for i in ids for n, c in ((3, 2.0), (4, 0.0))]
    costs = divergences(model, rows, {AT: sae}, batch_tokens=1000)
    for row, value in zip(rows, costs, strict=True):
        with torch.inference_mode():
            before = model.hf(input_ids=torch.tensor([row.ids])).logits[0, 1:].log_softmax(-1)
        seen = last_logits(model, [row], {AT: sae}, n_last=len(row.ids) - 1)[0].log_softmax(-1)
        wanted = torch.nn.functional.kl_div(seen, before, log_target=True, reduction="none").sum(-1)
        assert value == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert costs[1] == 0


def test_no_hook_is_left(model: LanguageModel, sae: SparseAutoencoder) -> None:
    def fail(*_: object) -> None:
        raise OverflowError

    handle = model.blocks[-1].register_forward_hook(fail)
    with pytest.raises(OverflowError):
        logits_of(model, [Row(prompts(model)[0], add(sae, (1,), 1.0), (1,))], sae)
    handle.remove()
    assert hooks_left(model.hf) == []
