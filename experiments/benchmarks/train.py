"""Compare the training of SAEs on a corpus with SAELens, dictionary_learning and sparsify.

    python experiments/benchmarks/train.py                       # the CPU, one thread
    python experiments/benchmarks/train.py --dtypes float32,bfloat16 --repeats 3
    PYTHONPATH=<folder> python experiments/benchmarks/train.py   # with tools that are not installed

speed: activation vectors that are trained on per second, the language model's forward passes
included: the same texts in the same order, model, dtype, batch size, context size, buffer,
architecture and number of steps. The time runs from the end of the first part of the buffer to the
last step, over whole refills, so that neither loading, the first filling of the buffer, the
estimate of the norms nor the final evaluation counts. On one thread of a CPU it is CPU time,
because wall time depends on what else the machine does. The SAE is float32 in all tools; the model
and the buffer are of the column `dtype`.
four: the same time of four SAEs in one pass, and of one.
quality: SAEs of several seeds, evaluated by saexp on the same held-out texts; `saexp_spread` and
`reference_spread` are standard deviations.

SAELens runs its `LanguageModelSAETrainingRunner` on the same Hugging Face model, which it leaves
after the block that is read. dictionary_learning (0.1, with nnsight 0.3) and sparsify are used
where they can be imported; a line reports which are not. Every measurement is a fresh process, and
the tools take turns; the numbers are medians of `--repeats`. The rows are written to
`measured/train_<device>.csv`. Targets: speed >= 1.5 beside SAELens, four <= 1.6.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "measured"
COLUMNS = (
    "measurement",
    "model",
    "device",
    "dtype",
    "threads",
    "steps",
    "unit",
    "saexp",
    "reference",
    "ratio",
    "target",
    "saexp_spread",
    "reference_spread",
)
KINDS = ("speed", "four", "quality")
WAYS = ("saexp", "sae-lens", "dictionary_learning", "sparsify")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layer": 2, "width": 1024, "buffer_rows": 32_768, "n_steps": 160},
    "smollm": {"layer": 15, "width": 4096, "buffer_rows": 8192, "n_steps": 16},
}
"""`smollm`: random weights of SmolLM2-135M's shape (30 blocks, d_model 576), at its middle."""
QUALITY = {"buffer_rows": 65_536, "n_steps": 600}
SMOLLM = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
VALUES = {"topk": [32, 16, 64, 128], "batchtopk": [32, 16, 64, 128], "standard": [1, 0.5, 2, 4]}
"""k or L1 coefficient of one SAE, and of four."""
SHOWN = {
    "reconstruction/explained_variance": "explained variance",
    "reconstruction/ce_loss_score": "CE score",
    "sparsity/l0": "L0",
}


# What a fresh process does; the parent imports no torch.


def prepare(job: dict[str, Any]) -> Any:
    """Write the random model and texts of shuffled lines of the shipped neutral text; returns the
    reasons why tools are left out."""
    import numpy as np
    import torch
    import training_ways
    import transformers

    import saexp

    folder = Path(job["folder"])
    if "smollm" in job["models"]:
        torch.manual_seed(0)
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM))  # pyright: ignore
        hf.save_pretrained(folder / "smollm")
        tiny = saexp.build("model", saexp.compose(["model=tiny"]).model)
        tiny.tokenizer.save_pretrained(folder / "smollm")
    source = Path(saexp.__file__).parent / "assets" / "tiny" / "background.txt"
    lines = source.read_text(encoding="utf-8").splitlines()
    rng = np.random.default_rng(0)
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(job["n_texts"]):
            chosen = rng.choice(lines, rng.integers(2, 20))
            file.write(json.dumps({"text": " ".join(chosen)}) + "\n")
    return [reason for way in job["ways"] if (reason := training_ways.missing(way))]


def steps(job: dict[str, Any]) -> Any:
    """Seconds of the steps after the first part of the buffer, and the folder of the SAE."""
    import training_ways

    done = training_ways.WAYS[job["way"]](job)
    n_saes = len(job["values"]) if job["way"] == "saexp" else 1
    cycle = job["buffer_rows"] // 2 // job["batch_size"]
    assert len(done.times) == job["n_steps"] * n_saes, "an optimizer step per step and SAE"
    return {"seconds": done.times[-1] - done.times[cycle * n_saes - 1], "folder": done.folder}


def evaluate(job: dict[str, Any]) -> Any:
    """The numbers of several SAEs at the held-out positions."""
    import training_ways

    return training_ways.evaluated(job, job["folders"])


JOBS = {"prepare": prepare, "steps": steps, "evaluate": evaluate}


def worker(kind: str, job: dict[str, Any]) -> None:
    """Do one job and print its result as the last line."""
    import logging

    import torch

    torch.set_num_threads(job["threads"])
    logging.getLogger("saexp").setLevel(logging.WARNING)
    sys.stdout.write("\n" + json.dumps(JOBS[kind](job)) + "\n")


# The parent.


def fresh(kind: str, job: dict[str, Any]) -> Any:
    """The result of a job in a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(job["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    command = [sys.executable, "-W", "ignore", __file__, "--worker", kind, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} {job}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def basic_row(job: dict[str, Any]) -> dict[str, Any]:
    """The columns that describe a job."""
    about = {key: job[key] for key in ("model", "device", "dtype", "threads")}
    return {**dict.fromkeys(COLUMNS, ""), **about, "steps": job["n_steps"]}


def speed(job: dict[str, Any], ways: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row for each other tool that has the architecture."""
    used = [w for w in ways if w != "sparsify" or job["architecture"] == "topk"]
    cycle = job["buffer_rows"] // 2 // job["batch_size"]
    rows = (job["n_steps"] - cycle) * job["batch_size"]
    rates: dict[str, list[float]] = {way: [] for way in used}
    for _ in range(repeats):
        for way in used:
            rates[way].append(rows / fresh("steps", {**job, "way": way})["seconds"])
    is_single = job["device"] == "cpu" and job["threads"] == 1
    result = []
    for way in used[1:]:
        pairs = zip(rates["saexp"], rates[way], strict=True)
        row = basic_row(job) | {
            "measurement": f"{job['architecture']} beside {way}",
            "unit": f"vectors per {'CPU ' if is_single else ''}second",
            "saexp": round(statistics.median(rates["saexp"])),
            "reference": round(statistics.median(rates[way])),
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            "target": ">= 1.5" if way == "sae-lens" else "",
        }
        result.append(row)
    return result


def four(job: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Seconds of four SAEs and of one."""
    job = {**job, "way": "saexp"}
    many = {**job, "values": VALUES[job["architecture"]]}
    pairs = [
        (fresh("steps", many)["seconds"], fresh("steps", job)["seconds"]) for _ in range(repeats)
    ]
    row = basic_row(job) | {
        "measurement": f"four {job['architecture']} SAEs beside one",
        "unit": "seconds",
        "saexp": round(statistics.median(a for a, _ in pairs), 2),
        "reference": round(statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "target": "<= 1.6",
    }
    return [row]


def quality(job: dict[str, Any], n_seeds: int) -> list[dict[str, Any]]:
    """Numbers of saexp's SAEs and of SAELens', trained with several seeds."""
    job = {**job, **QUALITY}
    folders = {
        way: [
            fresh("steps", {**job, "way": way, "seed": seed})["folder"] for seed in range(n_seeds)
        ]
        for way in ("saexp", "sae-lens")
    }
    numbers = {way: fresh("evaluate", {**job, "folders": f}) for way, f in folders.items()}
    result = []
    for metric, name in SHOWN.items():
        values = {way: [one[metric] for one in listed] for way, listed in numbers.items()}
        means = {way: statistics.mean(listed) for way, listed in values.items()}
        spreads = {way: statistics.stdev(v) if len(v) > 1 else 0.0 for way, v in values.items()}
        row = basic_row(job) | {
            "measurement": f"{name}, {job['architecture']}",
            "unit": f"mean of {n_seeds} seeds",
            "saexp": round(means["saexp"], 4),
            "reference": round(means["sae-lens"], 4),
            "ratio": round(means["saexp"] / means["sae-lens"], 4),
            "saexp_spread": round(spreads["saexp"], 4),
            "reference_spread": round(spreads["sae-lens"], 4),
        }
        result.append(row)
    return result


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(row[c]) for c in COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "JOB"), help=argparse.SUPPRESS)
    parser.add_argument("--only", help=f"of {','.join(KINDS)}", default=",".join(KINDS))
    parser.add_argument("--models", default="tiny,smollm")
    parser.add_argument("--architectures", default="topk,batchtopk,standard")
    parser.add_argument("--tools", default=",".join(WAYS[1:]))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of the language model")
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--width", type=int, help="latents; default: of the model")
    parser.add_argument("--buffer-rows", type=int, help="default: of the model")
    parser.add_argument("--steps", type=int, help="default: of the model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="of quality")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def jobs(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """A job for each model, dtype and architecture."""
    overrides = {"width": args.width, "buffer_rows": args.buffer_rows, "n_steps": args.steps}
    basic = {
        "folder": folder,
        "device": args.device,
        "threads": args.threads,
        "batch_size": args.batch_size,
        "batch_tokens": args.batch_tokens,
        "context_size": args.context_size,
        "seed": 0,
    }
    return [
        {
            **basic,
            **SIZES[model],
            **{key: value for key, value in overrides.items() if value is not None},
            "model": model,
            "dtype": dtype,
            "architecture": architecture,
            "values": VALUES[architecture][:1],
        }
        for model in args.models.split(",")
        for dtype in args.dtypes.split(",")
        for architecture in args.architectures.split(",")
    ]


def measured(job: dict[str, Any], kind: str, ways: list[str], args: Any) -> list[dict[str, Any]]:
    """The rows of one kind; quality is measured on the shipped model, which is trained."""
    if kind == "speed":
        return speed(job, ways, args.repeats)
    if kind == "four":
        return four(job, args.repeats)
    return quality(job, args.seeds) if job["model"] == "tiny" else []


def main() -> None:
    """Measure, print the table, write it as CSV."""
    args = arguments()
    if args.worker:
        worker(args.worker[0], json.loads(args.worker[1]))
        return
    ways = ["saexp", *args.tools.split(",")]
    out = args.out or MEASURED / f"train_{args.device}.csv"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        listed = jobs(args, folder)
        about = {"models": args.models.split(","), "ways": ways, "n_texts": args.texts}
        for reason in fresh("prepare", {**listed[0], **about}):
            sys.stdout.write(reason + "\n")
            ways.remove(reason.split()[0])
        for kind in args.only.split(","):
            for job in listed:
                new_rows = measured(job, kind, ways, args)
                rows += new_rows
                for row in new_rows:
                    names = (row[c] for c in ("measurement", "model", "dtype", "ratio"))
                    sys.stderr.write(", ".join(map(str, names)) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    sys.stdout.write(show(rows) + "\n")


if __name__ == "__main__":
    main()
