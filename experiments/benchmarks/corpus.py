"""Compare the collection of a corpus with the bare forward pass, its memory, and tokenization.

    python experiments/benchmarks/corpus.py                      # the CPU, one thread
    python experiments/benchmarks/corpus.py --only speed --dtypes float32,bfloat16
    python experiments/benchmarks/corpus.py --device cuda --threads 8 --scale 20

speed: tokens per second of `task=collect dataset=corpus positions=all` into an empty store,
tokenized beforehand, and of the bare forward pass of the required blocks on the same packed
batches, in turn, each in a process of its own. On a CPU both are per CPU second, because wall time
depends on what else the machine does, and there are two references: `speed` has glibc's defaults,
as saexp and any other program, and `speed_kept` lets glibc keep all freed memory, a faster limit.
memory: peak resident memory of a process that collects, at 1 x and at 4 x the tokens;
memory_dashboard, memory_stats, memory_train (from the store) and memory_evaluate: of these tasks.
tokenization: tokens per second of tokenizing and packing, and of `datasets.map` with as many
processes as saexp has threads.

Every measurement is a fresh process; ratios are medians of `--repeats` alternating runs. The rows
are written to `measured/corpus_<device>.csv`. Targets: speed and speed_kept >= 0.9, memory <= 1.1,
tokenization >= 1.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

MEASURED = Path(__file__).parent / "measured"
COLUMNS = (
    "measurement",
    "model",
    "device",
    "dtype",
    "threads",
    "tokens",
    "unit",
    "saexp",
    "reference",
    "ratio",
    "target",
)
TASKS = {
    "memory": ("task=collect",),
    "memory_dashboard": ("task=dashboard", "task.latents=top:5"),
    "memory_stats": ("task=analyze", "analyzer=stats", "intervention=none"),
    "memory_train": ("task=train", "sae_trainer.source=store", "sae_trainer.n_samples=100000"),
    "memory_evaluate": ("task=evaluate", "task.n_bootstrap=100"),
}
"""Measurement of memory -> the words of the task; those but the first are of the tiny model."""
REFERENCES = {"speed": "bare", "speed_kept": "bare_kept"}
"""Measurement of speed -> the job of its reference."""
TARGETS = {
    **dict.fromkeys(REFERENCES, ">= 0.9"),
    **dict.fromkeys(TASKS, "<= 1.1"),
    "tokenization": ">= 1",
}
SHAPES = {"gemma2-small": "small", "gemma2-2b": "2b"}
"""Random models of Gemma-2's architecture: sizes that differ from Gemma-2-2B."""
LAYERS = {"tiny": 2, "gemma2-small": 5, "gemma2-2b": 12}
TOKENS = {"tiny": 300_000, "gemma2-small": 30_000, "gemma2-2b": 4_000}
"""Tokens at scale 1."""
CONTEXT_SIZE = 256
READY = "ready:"
"""Begins the lines that a process of `timed` prints."""


# What a fresh process does; the parent imports no torch, so that its memory does not count.


def compose(job: dict[str, Any], *words: str) -> Any:
    """The config of a task, by default `task=collect`, on this job's corpus."""
    import saexp

    model = ["model=tiny"]
    if job["model"] != "tiny":
        model = ["model=hf", f"model.name={job['folder']}/{job['model']}"]
    return saexp.compose(
        [
            *model,
            *(words or ("task=collect",)),
            "dataset=corpus",
            f"dataset.path={job['folder']}/texts_{job['tokens']}.jsonl",
            f"dataset.context_size={CONTEXT_SIZE}",
            "positions=all",
            "tracker=none",
            f"layer={LAYERS[job['model']]}",
            f"device={job['device']}",
            f"dtype={job['dtype']}",
            f"cache_dir={job['folder']}/cache_{job['model']}",
        ]
    )


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Write the random models and the texts: shuffled words of the shipped neutral text."""
    import numpy as np
    import peers
    import torch
    import transformers

    import saexp

    folder = Path(job["folder"])
    tiny = saexp.build("model", saexp.compose(["model=tiny"]).model)
    for name in job["models"]:
        if name != "tiny" and not (folder / name).exists():
            torch.manual_seed(0)
            config = transformers.Gemma2Config(**peers.SHAPES[SHAPES[name]])  # pyright: ignore
            torch.set_default_dtype(torch.bfloat16 if name == "gemma2-2b" else torch.float32)
            transformers.Gemma2ForCausalLM(config).save_pretrained(folder / name)
            tiny.tokenizer.save_pretrained(folder / name)
    source = Path(saexp.__file__).parent / "assets" / "tiny" / "background.txt"
    words = source.read_text(encoding="utf-8").split()
    per_word = len(tiny.tokenizer(" ".join(words))["input_ids"]) / len(words)
    for n_tokens in job["sizes"]:
        rng, n_words = np.random.default_rng(0), 0
        with (folder / f"texts_{n_tokens}.jsonl").open("w", encoding="utf-8") as file:
            while n_words * per_word < n_tokens:
                chosen = rng.choice(words, rng.integers(20, 600))
                n_words += len(chosen)
                file.write(json.dumps({"text": " ".join(chosen)}) + "\n")
    return {}


class Work(NamedTuple):
    """What is measured again and again."""

    n_tokens: int
    do: Callable[[], Any]
    reset: Callable[[], Any] = lambda: None
    """Is called before each time, and not measured."""


def bare_pass(job: dict[str, Any], *, keeps_memory: bool) -> Work:
    """The bare forward pass of the required blocks on the batches of the collection, of a model
    that transformers loads."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    import transformers
    from peers import bare_forward

    import saexp
    from saexp.context import keep_freed_memory
    from saexp.models.forward import TokenBudget
    from saexp.pipeline.collect import open_corpus

    cfg = compose(job)
    model = saexp.build("model", cfg.model)
    if keeps_memory:
        keep_freed_memory()
    corpus = open_corpus(cfg, model)
    per_pass = max(1, TokenBudget("auto", model.device).tokens // corpus.context_size)
    batches = []
    for start in range(0, len(corpus), per_pass):
        contexts = np.arange(start, min(start + per_pass, len(corpus)))
        ids = torch.from_numpy(corpus.ids(contexts, model.pad_id))
        mask = torch.arange(ids.shape[1]) < torch.from_numpy(corpus.lengths(contexts))[:, None]
        batches.append((ids.to(model.device), mask.long().to(model.device)))
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        model.source, dtype=getattr(torch, job["dtype"])
    )
    loaded: Any = SimpleNamespace(hf=hf.to(model.device).eval(), device=model.device)
    return Work(corpus.n_tokens, bare_forward(loaded, int(cfg.layer), batches))


def without_stores(cfg: Any) -> None:
    """Remove the stores of an earlier collection."""
    import shutil

    shutil.rmtree(Path(cfg.cache_dir) / "activations", ignore_errors=True)


def collecting(cfg: Any, folder: Path, objects: Any) -> Callable[[], int]:
    """The task, by default `task=collect`; returns the number of tokens that it forwards."""
    import saexp

    def run() -> int:
        run_folder = tempfile.mkdtemp(prefix="run_", dir=folder)
        return int(
            saexp.run(cfg, run_folder, objects=objects).metrics["collection/tokens_forwarded"] or 0
        )

    return run


def timed(work: Work, clock: Callable[[], float]) -> None:
    """Do the work once, print its number of tokens, and then the seconds of each further time,
    one for each line of stdin."""
    work.do()
    sys.stdout.write(f"\n{READY} {work.n_tokens}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        work.reset()
        began = clock()
        work.do()
        sys.stdout.write(f"\n{READY} {clock() - began}\n")
        sys.stdout.flush()


def collection(job: dict[str, Any]) -> Work:
    """The collection; the first one tokenizes the corpus."""
    from saexp.context import ObjectCache

    cfg = compose(job)
    without_stores(cfg)
    collect = collecting(cfg, Path(job["folder"]), ObjectCache())
    return Work(collect(), collect, partial(without_stores, cfg))


def memory(job: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Peak resident memory in MB of this process, which does one task."""
    from saexp.context import ObjectCache

    cfg = compose(job, *words)
    without_stores(cfg)
    n_tokens = collecting(cfg, Path(job["folder"]), ObjectCache())()
    per_unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * per_unit
    return {"tokens": n_tokens, "peak": [peak / 1e6]}


def tokenization(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of both, from the same file, without special tokens."""
    import shutil

    import datasets

    import saexp
    from saexp.pipeline.collect import open_corpus

    datasets.disable_progress_bars()
    cfg, folder = compose(job), Path(job["folder"])
    model = saexp.build("model", cfg.model)
    tokenizer, processes = model.tokenizer, job["threads"] if job["threads"] > 1 else None

    def ours() -> int:
        shutil.rmtree(Path(cfg.cache_dir) / "corpora", ignore_errors=True)
        return open_corpus(cfg, model).n_tokens

    def encoded(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    def theirs() -> int:
        cache_dir = tempfile.mkdtemp(prefix="datasets_", dir=folder)
        texts = datasets.load_dataset(
            "json", data_files=cfg.dataset.path, split="train", cache_dir=cache_dir
        )
        assert isinstance(texts, datasets.Dataset)
        tokenized = texts.map(encoded, batched=True, remove_columns=["text"], num_proc=processes)
        return len(tokenized)

    n_tokens = ours()
    theirs()
    seconds: dict[str, list[float]] = {"saexp": [], "reference": []}
    for _ in range(job["repeats"]):
        for name, function in (("reference", theirs), ("saexp", ours)):
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {"tokens": n_tokens, **{k: [n_tokens / s for s in v] for k, v in seconds.items()}}


TIMED = {
    "collection": collection,
    "bare": partial(bare_pass, keeps_memory=False),
    "bare_kept": partial(bare_pass, keeps_memory=True),
}
JOBS = {
    "prepare": prepare,
    "tokenization": tokenization,
    **{kind: partial(memory, words=words) for kind, words in TASKS.items()},
}


def worker(kind: str, job: dict[str, Any]) -> None:
    """Do one job and print its result as the last line."""
    import logging

    import torch

    torch.set_num_threads(job["threads"])
    logging.getLogger("saexp").setLevel(logging.WARNING)
    if kind in TIMED:
        clock = time.perf_counter if job["device"] == "cuda" else time.process_time
        timed(TIMED[kind](job), clock)
    else:
        sys.stdout.write("\n" + json.dumps(JOBS[kind](job)) + "\n")


# The parent.


def command_of(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """The command and the environment of the process that does a job."""
    threads = str(job["threads"])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "true" if job["threads"] > 1 else "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-W", "ignore", __file__, "--worker", kind, json.dumps(job)]
    return {"args": command, "env": environment, "text": True}


def fresh(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job in a process of its own."""
    done = subprocess.run(**command_of(kind, job), capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} {job}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alternating(kinds: Sequence[str], job: dict[str, Any]) -> dict[str, list[float]]:
    """Tokens per second of jobs of TIMED, each in a process of its own, one after another."""

    def answer(process: subprocess.Popen[str]) -> float:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(READY):
                return float(line.split()[1])
        raise SystemExit(f"a process of {', '.join(kinds)} ended: {job}")

    processes: dict[str, subprocess.Popen[str]] = {}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        for kind in kinds:
            started = subprocess.Popen(
                **command_of(kind, job), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            processes[kind] = started
            n_tokens = answer(started)
        for _ in range(job["repeats"]):
            for kind, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                speeds[kind].append(n_tokens / answer(process))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return speeds


def measured_speed(job: dict[str, Any], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of these measurements of speed, whose collections are the same."""
    speeds = alternating(["collection", *(REFERENCES[kind] for kind in kinds)], job)
    per = "CPU second" if job["device"] != "cuda" else "second"
    about = {key: job[key] for key in ("model", "device", "dtype", "threads", "tokens")}
    return [
        about
        | {"measurement": kind, "target": TARGETS[kind], "unit": f"tokens per {per}"}
        | compared(speeds["collection"], speeds[REFERENCES[kind]])
        for kind in kinds
    ]


def compared(own: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """The medians of both, and of their ratios."""
    ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
    return {
        "saexp": round(statistics.median(own)),
        "reference": round(statistics.median(other)),
        "ratio": round(ratio, 3),
    }


def measured(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    row = {key: job[key] for key in ("model", "device", "dtype", "threads")}
    row |= {"measurement": kind, "target": TARGETS[kind]}
    if kind in TASKS:
        small, large = fresh(kind, job), fresh(kind, {**job, "tokens": 4 * job["tokens"]})
        numbers = {"saexp": large["peak"], "reference": small["peak"]}
        row |= {"tokens": large["tokens"], "unit": "MB, at 4 x and 1 x"}
    else:
        numbers = fresh(kind, job)
        row |= {"tokens": numbers["tokens"], "unit": "tokens per second"}
    return row | compared(numbers["saexp"], numbers["reference"])


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(row[c]) for c in COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write it as CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "JOB"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=[k for k in TARGETS if k != "speed_kept"])
    parser.add_argument("--models", default="tiny,gemma2-small")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], json.loads(args.worker[1]))
        return
    models = args.models.split(",")
    sizes = {name: round(TOKENS[name] * args.scale) for name in models}
    out = args.out or MEASURED / f"corpus_{args.device}.csv"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        basic = {
            "folder": folder,
            "device": args.device,
            "threads": args.threads,
            "repeats": args.repeats,
        }
        every = sorted({n * k for n in sizes.values() for k in (1, 4)})
        fresh("prepare", {**basic, "models": models, "sizes": every})
        for kind in [args.only] if args.only else [k for k in TARGETS if k != "speed_kept"]:
            for name in models if kind not in TASKS or kind == "memory" else ["tiny"]:
                for dtype in args.dtypes.split(","):
                    # Tokenization is of no model and no dtype.
                    if kind == "tokenization" and (rows and rows[-1]["measurement"] == kind):
                        continue
                    job = {**basic, "model": name, "dtype": dtype, "tokens": sizes[name]}
                    if kind == "speed":
                        of_speed = list(REFERENCES) if args.device == "cpu" else [kind]
                        new = measured_speed(job, of_speed)
                    else:
                        new = [measured(kind, job)]
                    rows += new
                    for row in new:
                        about = f"{row['measurement']}, {name}, {dtype}"
                        sys.stderr.write(f"{about}: {row['ratio']}\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    sys.stdout.write(show(rows) + "\n")


if __name__ == "__main__":
    main()
