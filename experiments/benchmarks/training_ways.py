"""The same training of an SAE as users of each tool write it, with the time of every step.

Each way takes a job (see `train.py`) and returns its `Steps`. No tool is changed: the times are
taken after each step of its optimizer.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

REFERENCE_ROWS = 16_384
"""Positions from which saexp estimates the mean norm; SAELens is given as many."""
LR, LR_WARM_UP, LR_DECAY, DEAD_WINDOW = 1e-3, 0.05, 0.2, 500
Job = dict[str, Any]


@dataclass
class Steps:
    """The clock after each step of the optimizer."""

    device: str
    clock: Callable[[], float]
    times: list[float] = field(default_factory=list)
    folder: str = ""
    """The trained SAE, where the way saves one that saexp reads."""

    def after_step(self, *_: Any) -> None:
        """Note the time."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(self.clock())


@contextmanager
def timed(job: Job) -> Iterator[Steps]:
    """Record the steps of every optimizer. One thread is timed by its CPU time."""
    is_single = job["device"] == "cpu" and job["threads"] == 1
    steps = Steps(job["device"], time.process_time if is_single else time.perf_counter)
    handle = register_optimizer_step_post_hook(steps.after_step)
    try:
        yield steps
    finally:
        handle.remove()


def compose(job: Job, *words: str) -> Any:
    """The config of `task=train` on this job's corpus."""
    import saexp

    model = ["model=tiny"]
    if job["model"] != "tiny":
        model = ["model=hf", f"model.name={job['folder']}/{job['model']}"]
    trainer = job["architecture"]
    option, values = OPTIONS[trainer], job["values"]
    variants = [f"{{{option}:{value}}}" for value in values] if len(values) > 1 else []
    return saexp.compose(
        [
            *model,
            "task=train",
            "dataset=corpus",
            f"dataset.path={job['folder']}/texts.jsonl",
            f"dataset.context_size={job['context_size']}",
            "tracker=none",
            f"layer={job['layer']}",
            f"width={job['width']}",
            f"device={job['device']}",
            f"dtype={job['dtype']}",
            f"cache_dir={job['folder']}/cache_{job['model']}",
            f"store.batch_tokens={job['batch_tokens']}",
            "positions.max_norm_ratio=null",
            f"sae_trainer={trainer}",
            f"sae_trainer.options.{option}={values[0]}",
            f"sae_trainer.n_samples={job['n_steps'] * job['batch_size']}",
            f"sae_trainer.batch_size={job['batch_size']}",
            f"sae_trainer.buffer_rows={job['buffer_rows']}",
            f"sae_trainer.lr={LR}",
            f"sae_trainer.lr_warm_up={LR_WARM_UP}",
            f"sae_trainer.lr_decay={LR_DECAY}",
            f"sae_trainer.dead_feature_window={DEAD_WINDOW}",
            f"sae_trainer.checkpoint_every={job['n_steps']}",
            f"sae_trainer.seed={job['seed']}",
            *([f"sae_trainer.variants=[{','.join(variants)}]"] if variants else []),
            *words,
        ]
    )


OPTIONS = {"topk": "k", "batchtopk": "k", "standard": "l1_coefficient"}
"""Architecture -> the option that sets its sparsity."""


def language_model(job: Job) -> tuple[Any, str]:
    """(the model of the job, the Hugging Face name of the block that is read)."""
    import saexp

    model = saexp.build("model", compose(job).model)
    return model, f"model.layers.{job['layer']}"


def contexts(job: Job, model: Any) -> np.ndarray:
    """Token ids `[n, context_size]` that saexp trains on, in the order of its first epoch."""
    from saexp.pipeline.collect import open_corpus
    from saexp.pipeline.training_stream import split

    cfg = compose(job)
    corpus = open_corpus(cfg, model)
    train, _ = split(corpus, cfg.sae_trainer.held_out, cfg.seed)
    rng = np.random.default_rng([job["seed"], 0])
    order = train[rng.permutation(len(train))]
    full = order[corpus.lengths(order) == job["context_size"]]
    return np.asarray(corpus.ids(full))


def dataset_of(ids: np.ndarray) -> Any:
    """A data set with a column `input_ids`."""
    import datasets

    return datasets.Dataset.from_dict({"input_ids": ids})


def saexp_way(job: Job) -> Steps:
    """`task=train`, whole: what follows the last step is not timed."""
    import saexp

    folder = tempfile.mkdtemp(prefix="run_", dir=job["folder"])
    cfg = compose(job)
    with timed(job) as steps:
        saexp.run(cfg, folder)
    steps.folder = f"{folder}/sae"
    return steps


def sae_lens_way(job: Job) -> Steps:
    """SAELens' `LanguageModelSAETrainingRunner` on the same Hugging Face model."""
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.registry import get_sae_training_class

    model, name = language_model(job)
    _, config_class = get_sae_training_class(job["architecture"])
    n_steps = job["n_steps"]
    options: dict[str, Any] = {OPTIONS[job["architecture"]]: job["values"][0]}
    if job["architecture"] == "standard":
        options["l1_warm_up_steps"] = int(0.1 * n_steps)
    folder = tempfile.mkdtemp(prefix="sae_lens_", dir=job["folder"])
    runner_config: Any = LanguageModelSAERunnerConfig
    cfg = runner_config(
        sae=config_class(
            d_in=model.d_model,
            d_sae=job["width"],
            normalize_activations="expected_average_only_in",
            device=job["device"],
            **options,
        ),
        model_name=model.name,
        model_class_name="AutoModelForCausalLM",
        hook_name=name,
        context_size=job["context_size"],
        n_batches_in_buffer=job["buffer_rows"] // job["context_size"],
        store_batch_size_prompts=job["batch_tokens"] // job["context_size"],
        training_tokens=n_steps * job["batch_size"],
        train_batch_size_tokens=job["batch_size"],
        n_batches_for_norm_estimate=max(1, REFERENCE_ROWS // job["batch_size"]),
        lr=LR,
        lr_end=0.0,
        lr_warm_up_steps=int(LR_WARM_UP * n_steps),
        lr_decay_steps=int(LR_DECAY * n_steps),
        dead_feature_window=DEAD_WINDOW,
        exclude_special_tokens=True,
        device=job["device"],
        seed=job["seed"],
        checkpoint_path=None,
        output_path=folder,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(job["seed"])
    proxy = HookedProxyLM(model.hf, model.tokenizer, hook_names=[name])
    data = dataset_of(contexts(job, model))
    with timed(job) as steps:
        LanguageModelSAETrainingRunner(cfg, override_dataset=data, override_model=proxy).run()
    steps.folder = folder
    return steps


def dictionary_learning_way(job: Job) -> Steps:
    """dictionary_learning's `trainSAE` on its `ActivationBuffer`."""
    # Not a dependency of the project.
    nnsight = importlib.import_module("nnsight")
    buffers = importlib.import_module("dictionary_learning.buffer")
    trainers = importlib.import_module("dictionary_learning.trainers")
    training = importlib.import_module("dictionary_learning.training")

    model, _ = language_model(job)
    traced = nnsight.LanguageModel(model.hf, tokenizer=model.tokenizer)
    ids = contexts(job, model)
    # The buffer takes texts and cuts them to contexts; a bit of the next context fills each up.
    longer = np.concatenate([ids, np.roll(ids, -1, axis=0)[:, : job["context_size"] // 2]], axis=1)
    texts = model.tokenizer.batch_decode(longer, skip_special_tokens=True)
    buffer = buffers.ActivationBuffer(
        (texts[n % len(texts)] for n in range(10**9)),
        traced,
        traced.model.layers[job["layer"]],
        d_submodule=model.d_model,
        n_ctxs=job["buffer_rows"] // job["context_size"],
        ctx_len=job["context_size"],
        refresh_batch_size=job["batch_tokens"] // job["context_size"],
        out_batch_size=job["batch_size"],
        device=job["device"],
        remove_bos=True,
    )
    names = {"topk": "TopKTrainer", "batchtopk": "BatchTopKTrainer", "standard": "StandardTrainer"}
    architecture, n_steps = job["architecture"], job["n_steps"]
    value = job["values"][0]
    options: dict[str, Any] = {"k": value}
    if architecture == "standard":
        options = {"l1_penalty": value, "sparsity_warmup_steps": int(0.1 * n_steps)}
    settings = {
        "trainer": getattr(trainers, names[architecture]),
        "steps": n_steps,
        "activation_dim": model.d_model,
        "dict_size": job["width"],
        "layer": job["layer"],
        "lm_name": model.name,
        "lr": LR,
        "warmup_steps": int(LR_WARM_UP * n_steps),
        "seed": job["seed"],
        "device": job["device"],
        **options,
    }
    with timed(job) as steps:
        training.trainSAE(buffer, [settings], steps=n_steps, device=job["device"])
    return steps


def sparsify_way(job: Job) -> Steps:
    """sparsify's `Trainer`, which has no buffer: a batch is the positions of some contexts."""
    # Not a dependency of the project.
    sparsify = importlib.import_module("sparsify")

    model, _ = language_model(job)
    per_batch = job["batch_size"] // job["context_size"]
    ids = contexts(job, model)
    n = job["n_steps"] * per_batch
    data = dataset_of(np.resize(ids, (n, ids.shape[1]))).with_format("torch")
    cfg = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=job["width"], k=job["values"][0]),
        batch_size=per_batch,
        hookpoints=[f"layers.{job['layer']}"],
        optimizer="adam",
        lr=LR,
        lr_warmup_steps=int(LR_WARM_UP * job["n_steps"]),
        exclude_tokens=sorted(set(model.tokenizer.all_special_ids)),
        init_seeds=[job["seed"]],
        save_every=10**9,
        save_dir=tempfile.mkdtemp(prefix="sparsify_", dir=job["folder"]),
        log_to_wandb=False,
    )
    with timed(job) as steps:
        sparsify.Trainer(cfg, data, model.hf).fit()
    return steps


WAYS: dict[str, Callable[[Job], Steps]] = {
    "saexp": saexp_way,
    "sae-lens": sae_lens_way,
    "dictionary_learning": dictionary_learning_way,
    "sparsify": sparsify_way,
}
ARCHITECTURES = {"sparsify": ("topk",)}
"""The architectures that a tool has, where it has not all."""


def missing(way: str) -> str | None:
    """Why a tool cannot be used; None where it can."""
    modules = {"dictionary_learning": ("nnsight", "dictionary_learning"), "sparsify": ("sparsify",)}
    for name in modules.get(way, ()):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{way} is left out: {error}"
    return None


def evaluated(job: Job, folders: list[str]) -> list[dict[str, float | None]]:
    """Explained variance, L0 and CE score of SAEs at the held-out positions, by saexp's code."""
    from saexp.analysis.evaluation import EvaluationSettings, evaluate_saes, numbers
    from saexp.context import ObjectCache
    from saexp.pipeline.training_stream import StreamedData
    from saexp.saes.loading import load_sae

    cfg = compose(job)
    model, _ = language_model(job)
    texts = StreamedData(cfg, model, ObjectCache()).evaluation_texts()
    saes = [load_sae(f, job["layer"], "resid_post").to(model.device) for f in folders]
    settings = EvaluationSettings(batch_tokens=job["batch_tokens"], ablations=("zero",))
    return [numbers(e, 0, 0) for e in evaluate_saes(model, saes, texts, settings)]
