"""SmolLM2-135M's SAE, evaluated and trained, in each tool (see `real_model_ways.py`)."""

import copy
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from evaluate import _Tokens
from real_model_ways import RealModel, Work, relative
from torch import Tensor
from torch.nn import functional

import saexp
from saexp.activations.stream import ActivationStream, ContextActivations, Progress
from saexp.config import RunConfig
from saexp.context import ObjectCache
from saexp.data.tokenization import TokenizedText
from saexp.pipeline.training_stream import StreamedData
from saexp.saes.training import Training, TrainingSource

WIDTH, K, BATCH, CONTEXT, PER_PASS = 4096, 32, 1024, 128, 16
"""A pass of the model gives two batches, and the buffer holds four."""
BUFFER = 4 * BATCH
OPTIONS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": K},
    "topk": {"k": K},
    "standard": {"l1_coefficient": 1.0},
}


# Evaluation


METRICS = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae": "ce_loss_with_sae",
    "ce_zero": "ce_loss_with_ablation",
    "kl_sae": "kl_div_with_sae",
    "explained_variance": "explained_variance",
    "l0": "l0",
}
"""saexp's name -> sae-lens' name."""


def evaluation(real_model: RealModel) -> Work:
    """Loss of the model alone, with the reconstruction and with zeros; KL, variance and L0."""
    from saexp.analysis.evaluation import EvaluationSettings, evaluate_saes, numbers

    ids = real_model.contexts(64)[:4]
    n = ids.shape[1]
    texts = [
        TokenizedText("", tuple(row), ((0, 0),) * n, (False,) * n, False) for row in ids.tolist()
    ]
    settings = EvaluationSettings(ablations=("zero",))

    def own() -> dict[str, float]:
        (one,) = evaluate_saes(real_model.model, [real_model.sae], texts, settings)
        every = numbers(one, 100, 0)
        values = {name.rpartition("/")[2]: value for name, value in every.items()}
        return {m: float(values[m] or math.nan) for m in METRICS}

    return Work(
        "evaluation",
        "tokens",
        ids.numel(),
        own,
        {
            "sae-lens run_evals, transformers model": _run_evals(real_model, ids),
            "sae-lens run_evals, HookedTransformer": _run_evals(real_model, ids, real_model.lens),
            "transformers, a loop with hooks": _evaluation_loop(real_model, ids),
        },
        lambda a, b: max(abs(a[m] - b[m]) / max(abs(b[m]), 1e-3) for m in b),
        1e-3 if real_model.is_exact else 0.1,
    )


def _run_evals(
    real_model: RealModel, ids: Tensor, lens: Any = None
) -> Callable[[], dict[str, float]]:
    """sae-lens' `run_evals`, with all its metrics but those of sparsity per latent."""
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler

    sae, name = copy.deepcopy(real_model.lens_sae), real_model.at.transformer_lens
    if lens is None:
        name = f"model.layers.{real_model.layer}"
        lens = HookedProxyLM(real_model.model.hf, real_model.model.tokenizer, hook_names=[name])
    sae.cfg.metadata.hook_name = name
    config = get_eval_everything_config(len(ids), 1, 1)

    def run() -> dict[str, float]:
        store: Any = _Tokens(ids, len(ids))
        metrics, _ = run_evals(sae, store, lens, ActivationScaler(), config)
        numbers = {key: value for of in metrics.values() for key, value in of.items()}
        return {ours: float(numbers[theirs]) for ours, theirs in METRICS.items()}

    return run


def _evaluation_loop(real_model: RealModel, ids: Tensor) -> Callable[[], dict[str, float]]:
    """Three passes of the whole model, as one writes them by hand."""
    sae, streams = real_model.lens_sae, []

    def keep(_m: Any, _a: Any, out: Any) -> None:
        streams.append(out if isinstance(out, Tensor) else out[0])

    def replaced(value: Tensor) -> Callable[..., Any]:
        return lambda _m, _a, out: value if isinstance(out, Tensor) else (value, *out[1:])

    def losses(hook: Callable[..., Any]) -> tuple[Tensor, float]:
        with real_model.hooked(hook):
            logits = real_model.model.hf(ids, use_cache=False).logits.float()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return logits.log_softmax(-1), float(loss)

    @torch.inference_mode()
    def run() -> dict[str, float]:
        streams.clear()
        clean, ce_clean = losses(keep)
        x = streams[0]
        acts = sae.encode(x)
        out = sae.decode(acts)
        spliced, ce_sae = losses(replaced(out))
        _, ce_zero = losses(replaced(torch.zeros_like(x)))
        kl = (clean.exp() * (clean - spliced)).sum(-1)
        rows, error = x.float().flatten(0, 1), (out - x).float().square().sum(-1).mean()
        variance = (rows - rows.mean(0)).square().sum(-1).mean()
        return {
            "ce_clean": ce_clean,
            "ce_sae": ce_sae,
            "ce_zero": ce_zero,
            "kl_sae": float(kl.mean()),
            "explained_variance": float(1 - error / variance),
            "l0": float((acts > 0).sum(-1).float().mean()),
        }

    return run


# Training


def configured(real_model: RealModel, architecture: str) -> RunConfig:
    """The config of `task=train` on the lines of the neutral text."""
    file = real_model.folder / "lines.jsonl"
    texts = real_model.model.tokenizer.batch_decode([list(ids) for ids in real_model.ids])
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return saexp.compose(
        [
            "model=smollm2",
            "task=train",
            "dataset=corpus",
            f"dataset.path={file}",
            f"dataset.context_size={CONTEXT}",
            f"layer={real_model.layer}",
            f"width={WIDTH}",
            f"dtype={str(real_model.dtype).removeprefix('torch.')}",
            f"cache_dir={real_model.folder}/cache",
            f"store.batch_tokens={CONTEXT * PER_PASS}",
            "positions.max_norm_ratio=null",
            f"sae_trainer={architecture}",
            *(f"sae_trainer.options.{name}={v}" for name, v in OPTIONS[architecture].items()),
            f"sae_trainer.batch_size={BATCH}",
            f"sae_trainer.buffer_rows={BUFFER}",
            f"sae_trainer.n_samples={1000 * BATCH}",
            "sae_trainer.lr=1e-3",
            "tracker=none",
        ]
    )


def both(real_model: RealModel, architecture: str) -> tuple[Training, Any]:
    """saexp's training and SAELens' trainer, of the same weights."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    cfg = configured(real_model, architecture).sae_trainer
    source = TrainingSource("smollm2", real_model.at, real_model.model.d_model, CONTEXT)
    own = Training(cfg, WIDTH, source, real_model.folder / architecture, torch.device("cpu"))
    sae_class, config_class = get_sae_training_class(architecture)
    make_config: Any = config_class
    warm_up: dict[str, Any] = {"l1_warm_up_steps": int(cfg.sparsity_warm_up * own.n_steps)}
    sae = sae_class(
        make_config(
            d_in=real_model.model.d_model,
            d_sae=WIDTH,
            device="cpu",
            normalize_activations=cfg.normalize_activations,
            **OPTIONS[architecture],
            **(warm_up if architecture == "standard" else {}),
        )
    )
    sae.load_state_dict(own.sae.state_dict())
    trainer_config = SAETrainerConfig(
        total_training_samples=own.n_steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=cfg.lr,
        lr_end=0.0,
        lr_warm_up_steps=int(cfg.lr_warm_up * own.n_steps),
        lr_decay_steps=int(cfg.lr_decay * own.n_steps),
        device="cpu",
        autocast=bool(cfg.autocast),
        dead_feature_window=cfg.dead_feature_window,
        feature_sampling_window=own.n_steps,
    )
    other: Any = SAETrainer(trainer_config, sae, iter(()))
    return own, other


def _lens_step(trainer: Any, batch: Tensor) -> float:
    """What SAELens' `fit` does with a batch."""
    output = trainer.step(batch)
    trainer.n_training_steps += 1
    return float(output.loss.detach())


def sae_steps(real_model: RealModel, architecture: str) -> Work:
    """Steps of the SAE alone, on the same stored batches, from the same weights.

    Both go on where they were, so that the losses of each run are compared too.
    """
    source, _ = _sources(real_model, configured(real_model, architecture))
    acts, _ = source.forward(source.contexts[: 2 * PER_PASS])
    rows = acts[real_model.at].float()
    batches = list(rows.split(BATCH))
    own, other = both(real_model, architecture)
    factor = real_model.model.d_model**0.5 / float(rows.norm(dim=-1).mean())
    for trainer in (own.trainer, other):
        trainer.activation_scaler.scaling_factor = factor

    def saexp_way() -> list[float]:
        return [float(own.make_step(batch).loss.detach()) for batch in batches]

    def lens_way() -> list[float]:
        return [_lens_step(other, batch) for batch in batches]

    return Work(
        f"training step, {architecture}",
        "vectors",
        len(rows),
        saexp_way,
        {"sae-lens SAETrainer": lens_way},
        lambda a, b: max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)),
        1e-3,
    )


def _sources(real_model: RealModel, cfg: RunConfig) -> tuple[ContextActivations, ActivationStream]:
    """saexp's passes of the model, and its mixing buffer on passes of its own."""
    data = StreamedData(cfg, real_model.model, ObjectCache())
    full = np.flatnonzero(data.corpus.lengths(np.arange(len(data.corpus))) == CONTEXT)
    # Whole passes, so that each gives two batches.
    full = full[: len(full) // PER_PASS * PER_PASS]
    sources = [
        ContextActivations(real_model.model, data.corpus, full, [real_model.at], data.settings)
        for _ in range(2)
    ]
    acts, _ = sources[0].forward(full[:PER_PASS])
    mean_norm = float(acts[real_model.at].double().norm(dim=-1).mean())
    for source in sources:
        # Instead of an estimate from the whole corpus.
        source.resume(Progress(), {"limits": [math.inf], "means": [mean_norm]})
    return sources[0], ActivationStream(sources[1], data.settings)


def _lens_store(real_model: RealModel, trainer: Any, ids: np.ndarray) -> Any:
    """SAELens' store of activations of the same contexts, with a buffer of the same size."""
    import datasets
    from sae_lens import LanguageModelSAERunnerConfig
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore

    name = f"model.layers.{real_model.layer}"
    proxy = HookedProxyLM(real_model.model.hf, real_model.model.tokenizer, hook_names=[name])
    runner_config: Any = LanguageModelSAERunnerConfig
    cfg = runner_config(
        sae=trainer.sae.cfg,
        model_name="smollm2",
        model_class_name="AutoModelForCausalLM",
        hook_name=name,
        context_size=CONTEXT,
        n_batches_in_buffer=BUFFER // CONTEXT,
        store_batch_size_prompts=PER_PASS,
        training_tokens=1000 * BATCH,
        train_batch_size_tokens=BATCH,
        exclude_special_tokens=True,
        prepend_bos=False,
        device="cpu",
        checkpoint_path=None,
        output_path=None,
    )
    data = datasets.Dataset.from_dict({"input_ids": ids})
    return ActivationsStore.from_config(proxy, cfg, override_dataset=data)


def with_the_model(real_model: RealModel, architecture: str) -> Work:
    """Steps of the SAE on batches of a mixing buffer, the passes that refill it included.

    The buffers are seeded differently, so that what is compared are the activations that the passes
    give; the steps themselves are compared by `sae_steps`.
    """
    cfg = configured(real_model, architecture)
    source, stream = _sources(real_model, cfg)
    own, other = both(real_model, architecture)
    ids = np.asarray(source.corpus.ids(source.contexts))
    store = _lens_store(real_model, other, ids)
    own.set_scale(stream.mean_norms)
    other.activation_scaler.scaling_factor = own.trainer.activation_scaler.scaling_factor
    some = source.contexts[:2]
    passed, _ = source.forward(some)
    theirs = store.get_activations(torch.from_numpy(ids[:2].astype(np.int64)))
    is_ordinary = ~np.isin(ids[:2], real_model.model.tokenizer.all_special_ids)
    distance = relative(
        passed[real_model.at], theirs[torch.from_numpy(is_ordinary)].to(real_model.dtype)
    )

    def saexp_way() -> float:
        for batch in itertools.islice(stream, 2):
            own.make_step(batch[real_model.at].float())
        return distance

    def lens_way() -> float:
        for batch in itertools.islice(store, 2):
            _lens_step(other, batch)
        return 0.0

    return Work(
        f"training with the model, {architecture}",
        "vectors",
        2 * BATCH,
        saexp_way,
        {"sae-lens ActivationsStore, SAETrainer": lens_way},
        lambda a, b: abs(a - b),
        1e-4 if real_model.is_exact else 0.1,
    )
