"""Measure a tiny model and its SAEs on held-out data; write the numbers, and the model card.

python experiments/tiny_lm/measure.py --model saexp/assets/tiny/model --sae saexp/assets/tiny/sae \
    --out experiments/tiny_lm/measured/tiny.json
python experiments/tiny_lm/measure.py --card experiments/tiny_lm/README.md
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import ATTRIBUTES, ENTITY_TYPES, REFUSAL, Entity, World, document, ioi, question
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tokenizer import make_world
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from saexp.interventions.cached_generation import generate
from saexp.interventions.stream_edits import Row
from saexp.models import Hookpoint
from saexp.models.hooks import edit, run_truncated
from saexp.models.loading import LanguageModel
from saexp.saes import SparseAutoencoder
from saexp.saes.loading import load_sae

log = logging.getLogger("measure")

N_DOCUMENTS, BATCH = 1000, 64
MARKS = ("<!-- measured -->", "<!-- /measured -->")


def load(path: Path) -> LanguageModel:
    """A saved tiny model in float32."""
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return LanguageModel.wrap(hf, AutoTokenizer.from_pretrained(path), path.name)


def continuations(model: LanguageModel, prompts: Sequence[str], n: int) -> list[str]:
    """Greedy continuations of at most `n` tokens."""
    rows = [Row(tuple(model.tokenizer(p)["input_ids"])) for p in prompts]
    out = generate(model, rows, max_new_tokens=n, batch_tokens=8192)
    return model.tokenizer.batch_decode(out, skip_special_tokens=True)


def behaviour(model: LanguageModel, world: World) -> dict[str, float]:
    """Shares of right answers, refusals, indirect objects, and passages continued exactly."""

    def share(cases: list[tuple[str, str]], n: int, right: Callable[[str, str], bool]) -> float:
        generated = continuations(model, [p for p, _ in cases], n)
        return float(np.mean([right(g, a) for g, (_, a) in zip(generated, cases, strict=True)]))

    def begins(generated: str, answer: str) -> bool:
        return generated.startswith(answer)

    def every(entities: dict[str, list[Entity]]) -> list[tuple[str, str]]:
        return [
            (question(e, a), f" {e.facts[a]}." if e.facts else REFUSAL)
            for kind in ENTITY_TYPES
            for e in entities[kind]
            for a in ATTRIBUTES[kind]
        ]

    rng = np.random.default_rng(world.seed + 950)
    pairs = [ioi(world, rng, held_out=True)[:2] for _ in range(300)]
    halves = {}
    for name, passages in (("memorised", world.memorised), ("unseen", world.unseen)):
        ids = [model.tokenizer(p)["input_ids"] for p in passages]
        cuts = [len(i) // 2 for i in ids]
        rows = [Row(tuple(i[:c])) for i, c in zip(ids, cuts, strict=True)]
        longest = max(len(i) - c for i, c in zip(ids, cuts, strict=True))
        out = generate(model, rows, max_new_tokens=longest, batch_tokens=8192)
        exact = [o[: len(i) - c] == i[c:] for o, i, c in zip(out, ids, cuts, strict=True)]
        halves[name] = float(np.mean(exact))
    return {
        "known questions answered": share(every(world.known), 6, begins),
        "held-out unknown names refused": share(every(world.held_out), 6, begins),
        "known questions refused": share([(q, REFUSAL) for q, _ in every(world.known)], 6, begins),
        "indirect object, held-out pairs": share(pairs, 2, begins),
        "memorised passages continued exactly": halves["memorised"],
        "unseen passages continued exactly": halves["unseen"],
    }


def entity_rows(model: LanguageModel, world: World) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """(per layer `[n, d_model]` at the name's last token, known?, entity type)."""
    entities = [e for g in (world.known, world.held_out) for t in ENTITY_TYPES for e in g[t]]
    texts = [f"The {e.entity_type} {e.name}" for e in entities]
    enc = model.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    last = enc["attention_mask"].sum(1) - 1
    hookpoints = [Hookpoint(n, "resid_post") for n in range(model.n_layers)]
    record = run_truncated(
        model, enc["input_ids"], enc["attention_mask"], hookpoints, (torch.arange(len(last)), last)
    )
    known = np.array([e.facts is not None for e in entities])
    return [record[h] for h in hookpoints], known, np.array([e.entity_type for e in entities])


def recognition(model: LanguageModel, world: World) -> dict[str, float]:
    """Test AUROC of a linear probe for known against unknown, per layer; half the names train."""
    layers, known, _ = entity_rows(model, world)
    train = np.random.default_rng(5).permutation(len(known)) < len(known) // 2
    aurocs = {}
    for number, acts in enumerate(layers):
        x = acts.numpy()
        x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
        probe = LogisticRegression(C=0.01, max_iter=2000).fit(x[train], known[train])
        scores = probe.decision_function(x[~train])
        aurocs[f"probe at layer {number}"] = float(roc_auc_score(known[~train], scores))
    return aurocs


@torch.inference_mode()
def reconstruction(model: LanguageModel, sae: SparseAutoencoder, world: World) -> dict[str, float]:
    """L0, explained variance and CE score over every token but BOS of fresh documents.

    The reconstruction (or zeros) stands in at every position but BOS and padding; scored is the
    prediction of every token after the first.
    """
    rng = np.random.default_rng(world.seed + 960)
    texts = [document(world, rng, statements=0.5).text for _ in range(N_DOCUMENTS)]
    sums = dict.fromkeys(("clean", "sae", "zero", "n", "l0", "rows", "error"), 0.0)
    streams = []
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for start in range(0, len(texts), BATCH):
        enc = model.tokenizer(
            texts[start : start + BATCH], padding=True, padding_side="right", return_tensors="pt"
        )
        ids, mask = enc["input_ids"], enc["attention_mask"].bool()
        inner = mask.clone()
        inner[:, 0] = False
        captured: dict[str, Tensor] = {}

        def splice(stream: Tensor, inner: Tensor = inner, captured: Any = captured) -> Tensor:
            x = stream[inner]
            acts = sae.encode(x)
            captured.update(x=x, acts=acts, reconstruction=sae.decode(acts, x))
            new = stream.clone()
            new[inner] = captured["reconstruction"].to(stream.dtype)
            return new

        def zero(stream: Tensor, inner: Tensor = inner) -> Tensor:
            return stream.masked_fill(inner[..., None], 0)

        functions: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
            ("clean", lambda s: s),
            ("sae", splice),
            ("zero", zero),
        )
        for name, function in functions:
            with edit(model, {sae.hookpoint: function}):
                logits = model.hf(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            sums[name] += float(losses[inner[:, 1:].flatten()].double().sum())
        sums["n"] += int(inner.sum())
        sums["l0"] += float((captured["acts"] > 0).sum())
        fired |= (captured["acts"] > 0).any(0)
        streams.append((captured["x"], captured["reconstruction"]))
    x, again = (torch.cat(p).double() for p in zip(*streams, strict=True))
    error, spread = (x - again).square().sum(), (x - x.mean(0)).square().sum()
    clean, spliced, zeroed = (sums[k] / sums["n"] for k in ("clean", "sae", "zero"))
    return {
        "L0": sums["l0"] / sums["n"],
        "explained variance": float(1 - error / spread),
        "CE clean": clean,
        "CE spliced": spliced,
        "CE score": (zeroed - spliced) / (zeroed - clean),
        "never fired": float((~fired).double().mean()),
        "tokens": sums["n"],
    }


def measure(path: Path, saes: Path) -> dict[str, Any]:
    """All numbers of one model."""
    world, _ = make_world(0)
    model = load(path)
    folders = sorted(
        saes.glob("layer_*/width_*"), key=lambda f: (f.parent.name, int(f.name.split("_")[1]))
    )
    loaded = {f"{f.parent.name}, {f.name}".replace("_", " "): load_sae(f) for f in folders}
    loaded = {name: sae.float() for name, sae in loaded.items()}
    parameters = sum(p.numel() for p in model.hf.parameters())
    return {
        "parameters": parameters,
        "behaviour": behaviour(model, world),
        "recognition": recognition(model, world),
        "saes": {name: reconstruction(model, sae, world) for name, sae in loaded.items()},
    }


def card(path: Path) -> None:
    """Put the measured numbers between the card's marks."""
    folder = Path(__file__).parent / "measured"
    measured = {f.stem: json.loads(f.read_text("utf-8")) for f in sorted(folder.glob("*.json"))}
    lines = ["", f"| | {' | '.join(measured)} |", f"|---|{'---|' * len(measured)}"]
    for part in ("behaviour", "recognition"):
        for name in measured["tiny"][part]:
            values = [m[part].get(name) for m in measured.values()]
            shown = " | ".join("–" if v is None else f"{v:.3f}" for v in values)
            unit = "" if part == "behaviour" else " (AUROC, entity's last token)"
            lines.append(f"| {name}{unit} | {shown} |")
    columns = ("L0", "explained variance", "CE score", "CE clean", "CE spliced", "never fired")
    for model, numbers in measured.items():
        if not numbers["saes"]:
            continue
        lines += ["", f"SAEs of {model}:", "", f"| | {' | '.join(columns)} |"]
        lines.append(f"|---|{'---|' * len(columns)}")
        for name, values in numbers["saes"].items():
            lines.append(f"| {name} | {' | '.join(f'{values[c]:.3f}' for c in columns)} |")
    text = path.read_text("utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    body = "\n".join(lines)
    path.write_text(f"{before}{MARKS[0]}\n{body}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--sae", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--card", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.model:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        numbers = measure(args.model, args.sae)
        args.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        log.info("%s", json.dumps(numbers["behaviour"]))
    if args.card:
        card(args.card)
