"""Compare the shipped SAEs with a null SAE and with sae-lens' trainer, on the same text.

    python experiments/real_model/compare.py --text outputs/corpus/corpus.jsonl --out outputs/saes

At block 15, three SAEs are trained with the settings of the shipped ones on the same activation
vectors in the same order: saexp's training; sae-lens' own class and loop; and a null SAE (arXiv
2602.14111) whose decoder stays at random unit directions while encoder and biases are trained. All
of them, the three shipped SAEs and untrained random directions (sae=random) are then measured on
the beginnings of documents that none of them was trained on, the last ones of the file. Every
finished SAE stays in the output folder, and a repeated command continues after it.
"""

import argparse
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

import saexp
from saexp import registry
from saexp.analysis.evaluation import EvaluationSettings, evaluate_saes, numbers
from saexp.config import RunConfig
from saexp.data.tokenization import tokenize_texts
from saexp.models import Hookpoint
from saexp.models.hooks import capture
from saexp.models.loading import LanguageModel
from saexp.saes.training import Training
from saexp.saes.training_architectures import TrainingSource
from saexp.saes.training_pass import N_SCALE_BATCHES, ReaderBatches, train_together
from saexp.stats.significance import derived_seed, random_directions

log = logging.getLogger(__name__)

LAYER, WIDTH, CONTEXT = 15, 4096, 256
N_TRAINED_DOCUMENTS = 1500
"""The first documents of the file are trained on."""
N_HELD_OUT = 32
"""The last documents of the file are measured on, their first `CONTEXT` tokens."""
SEPARATOR = "<|endoftext|>"
MAX_NORM_RATIO = 5.0
HOOKPOINT = Hookpoint(LAYER, "resid_post")
METRICS = (
    "reconstruction/explained_variance",
    "reconstruction/explained_variance_legacy",
    "reconstruction/ce_loss_score",
    "sparsity/l0",
)
"""Those that have an interval."""


class NullTraining(Training):
    """The training of an SAE whose decoder rows stay at random unit directions.

    b_dec begins at the vectors' mean, which such rows cannot represent and which Adam would take
    thousands of steps to reach: this favours the null SAE.
    """

    mean: Tensor | None = None

    def _initialize(self) -> None:
        super()._initialize()
        rows = random_directions(self.d_sae, self.source.d_in, self.cfg.seed, "null SAE")
        with torch.no_grad():
            self.sae.W_dec.copy_(rows)
            self.sae.W_enc.copy_(rows.T)
        self.sae.W_dec.requires_grad_(False)

    def set_scale(self, mean_norms: Mapping[Hookpoint, float]) -> None:
        """As for any SAE, with b_dec at the scaled mean."""
        super().set_scale(mean_norms)
        assert self.mean is not None
        scaler: Any = self.trainer.activation_scaler
        with torch.no_grad():
            self.sae.b_dec.copy_(self.mean * scaler.scaling_factor)


def config(n_vectors: int) -> RunConfig:
    """The settings of the shipped SAEs."""
    words = "task=train model=smollm2 sae_trainer=batchtopk sae_trainer.options.k=32 device=cpu"
    return saexp.compose([*words.split(), f"sae_trainer.n_samples={n_vectors}"])


def contexts(model: LanguageModel, texts: list[str], seed: int) -> Int[np.ndarray, "n 256"]:
    """Packed contexts in random order, each beginning anywhere in a document."""
    separator = model.tokenizer.convert_tokens_to_ids(SEPARATOR)
    ids: list[int] = []
    for encoded in model.tokenizer(texts, add_special_tokens=False).input_ids:
        ids += [*encoded, separator]
    packed = np.array(ids[: len(ids) // CONTEXT * CONTEXT]).reshape(-1, CONTEXT)
    return np.random.default_rng(seed).permutation(packed)


@torch.inference_mode()
def collect(model: LanguageModel, texts: list[str], n: int, folder: Path) -> np.memmap[Any, Any]:
    """Activation vectors `[n, d_model]` of ordinary norm, in random order, as float16 on disk."""
    file, size = folder / "vectors.dat", (n, model.d_model)
    if (folder / "vectors.json").is_file():
        return np.memmap(file, dtype=np.float16, mode="r", shape=size)
    vectors = np.memmap(file, dtype=np.float16, mode="w+", shape=size)
    order = np.random.default_rng(1).permutation(n)
    n_collected, median, began = 0, 0.0, time.monotonic()
    for batch in np.array_split(rows := contexts(model, texts, 0), len(rows) // 16):
        with capture(model, [HOOKPOINT], stop=True) as streams:
            model.hf(input_ids=torch.from_numpy(batch), use_cache=False)
        acts = streams[HOOKPOINT].flatten(0, 1).float()
        norms = acts.norm(dim=-1)
        median = median or float(norms.median())
        acts = acts[norms <= MAX_NORM_RATIO * median][: n - n_collected]
        vectors[order[n_collected : n_collected + len(acts)]] = acts.half().numpy()
        n_collected += len(acts)
        if n_collected == n:
            break
    if n_collected < n:
        raise SystemExit(
            f"{n_collected:,} vectors in the text, {n:,} requested; type a smaller --n"
        )
    vectors.flush()
    seconds = time.monotonic() - began
    (folder / "vectors.json").write_text(json.dumps({"n": n, "seconds": seconds}) + "\n")
    log.info("collected %d vectors in %.0f s", n, seconds)
    return vectors


def batches(vectors: np.ndarray, size: int, step: int = 0) -> Iterator[Float[Tensor, "b d"]]:
    """Batches in order, from a step on."""
    for first in range(step * size, len(vectors) - size + 1, size):
        yield torch.from_numpy(np.asarray(vectors[first : first + size], dtype=np.float32))


def train(cfg: RunConfig, kind: type[Training], vectors: np.ndarray, folder: Path) -> None:
    """Train an SAE with saexp and save it."""
    source = TrainingSource("smollm2", HOOKPOINT, vectors.shape[1], CONTEXT, prepend_bos=False)
    checkpoints = folder.with_name(f"{folder.name}_checkpoints")
    training = kind(cfg.sae_trainer, WIDTH, source, checkpoints, torch.device("cpu"))
    if isinstance(training, NullTraining):
        training.mean = next(batches(vectors, 8 * cfg.sae_trainer.batch_size)).mean(0)
    training.resume()
    reader = ReaderBatches(
        {training.streams: lambda step: batches(vectors, cfg.sae_trainer.batch_size, step)}
    )
    for _, record in train_together([training], reader):
        log.info("%s: %s", folder.name, {k: round(v, 4) for k, v in record.items()})
    training.save(folder)
    pd.DataFrame(training.records).to_csv(folder / "steps.csv", index=False)


def train_with_sae_lens(cfg: RunConfig, vectors: np.ndarray, folder: Path) -> None:
    """Train an SAE with sae-lens' own class and loop, with the same settings, and save it."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    trainer, size = cfg.sae_trainer, cfg.sae_trainer.batch_size
    n_steps = len(vectors) // size
    torch.manual_seed(derived_seed(trainer.seed, "training", HOOKPOINT.name))
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=vectors.shape[1],
            d_sae=WIDTH,
            k=trainer.options["k"],
            normalize_activations=trainer.normalize_activations,  # pyright: ignore[reportArgumentType]
            metadata=SAEMetadata(
                model_name="smollm2", hook_name=HOOKPOINT.transformer_lens, prepend_bos=False
            ),
        )
    )
    # The factor is estimated from the same batches as saexp's, which are then trained on too.
    first = itertools.islice(batches(vectors, size), N_SCALE_BATCHES)
    SAETrainer(
        SAETrainerConfig(
            total_training_samples=n_steps * size,
            train_batch_size_samples=size,
            lr=trainer.lr,
            lr_end=0.0,
            lr_warm_up_steps=int(trainer.lr_warm_up * n_steps),
            lr_decay_steps=int(trainer.lr_decay * n_steps),
            dead_feature_window=trainer.dead_feature_window,
            feature_sampling_window=n_steps,
            n_batches_for_norm_estimate=N_SCALE_BATCHES,
            device="cpu",
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        itertools.chain(first, batches(vectors, size)),
    ).fit()
    sae.save_inference_model(folder)


def measure(model: LanguageModel, saes: dict[str, Any], texts: list[str]) -> pd.DataFrame:
    """A row per SAE: its numbers on the same texts, with 95% intervals over documents."""
    tokens = tokenize_texts(model, texts, CONTEXT)
    settings = EvaluationSettings(ablations=("zero",), max_norm_ratio=MAX_NORM_RATIO)
    rows = []
    for (name, sae), evaluation in zip(
        saes.items(), evaluate_saes(model, list(saes.values()), tokens, settings), strict=True
    ):
        values = numbers(evaluation, 1000, 0)
        row: dict[str, Any] = {"sae": name, "layer": sae.hookpoint.layer, "width": sae.d_sae}
        for metric in METRICS:
            for side in ("", "_ci_low", "_ci_high"):
                row[metric.partition("/")[2] + side] = values[metric + side]
        row["dead_fraction"] = values["sparsity/dead_fraction"]
        row["n_positions"] = values["sparsity/n_positions"]
        row["n_documents"] = values["evaluation/n_units"]
        row["ce_clean"], row["ce_sae"] = (
            values[f"reconstruction/ce_{state}"] for state in ("clean", "sae")
        )
        rows.append(row)
    return pd.DataFrame(rows)


def main(text: Path, n_vectors: int, out: Path) -> None:
    """Train what is not trained yet, measure everything, and write compared.csv."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    out.mkdir(parents=True, exist_ok=True)
    with text.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    cfg = config(n_vectors)
    model = registry.build("model", cfg.model)
    vectors = collect(model, documents[:N_TRAINED_DOCUMENTS], n_vectors, out)
    for name in ("saexp", "null", "sae_lens"):
        folder = out / name
        if folder.exists():
            continue
        began = time.process_time()
        if name == "sae_lens":
            train_with_sae_lens(cfg, vectors, folder)
        else:
            train(cfg, NullTraining if name == "null" else Training, vectors, folder)
        log.info("%s: %.0f CPU seconds", name, time.process_time() - began)
    random = saexp.compose(["model=smollm2", "sae=random", f"layer={LAYER}", f"width={WIDTH}"])
    saes = {f"shipped, block {layer}": saexp.load_sae("smollm2", layer=layer) for layer in (7, 22)}
    saes[f"shipped, block {LAYER}"] = saexp.load_sae("smollm2", layer=LAYER)
    saes |= {name: saexp.load_sae(str(out / name)) for name in ("saexp", "sae_lens", "null")}
    saes["random directions"] = registry.build("sae", random.sae, d_in=model.d_model)
    table = measure(model, saes, documents[-N_HELD_OUT:])
    table.to_csv(out / "compared.csv", index=False, float_format="%.4f")
    log.info("%s", table.to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="the file that corpus.py makes")
    parser.add_argument("--n", type=int, default=500_000, help="activation vectors")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    main(arguments.text, arguments.n, arguments.out)
