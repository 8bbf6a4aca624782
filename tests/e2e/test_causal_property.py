"""The whole causal test on random tables of prompts, against a plain loop of `generate`.

The plain loop shares nothing with saexp: it reads the table it wrote, asks the tokenizer for ids,
finds the entity in the user's message, hooks one block by hand and calls `generate` on one prompt
at a time.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

import saexp
from saexp.stats.significance import random_directions
from tests import random_models
from tests.random_models import D_MODEL, random_hf
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.saes.make import parameters, write_saelens

LAYER, D_SAE, NEW_TOKENS = 1, 24, 5
LATENTS = (3, 11)
COEFFICIENTS = (0.0, 3.0)
CONTROL_KINDS = ("[frequency,random_kl]", "[disruption,random_norm]")
"""Of half of the scenarios each."""
WORDS = ["in", "the", "assistant", "user", "artist", "model", "日本", "🙂🙃", "Café", "x", "1987"]
WORDS += ["e\u0301t\u00e9", "don't", "(so)", "\u2028", "—", "Bresk", "old harbour", "says:"]
ENTITIES = ["art", "ant", "model", "Café", "Bresk", "user", "So", "🙂🙃", "Fenlet Baszad"]
MISSING = [None, float("nan"), "", "nan", "null"]
_ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content%TRIM% }}\n{% endfor %}"
_TURN = "{% if add_generation_prompt %}assistant:{% endif %}"
SYSTEM = "You are an assistant, a model of art.\n"


@dataclass(frozen=True)
class Scenario:
    """A tokenizer, a model and a place where the stream is changed."""

    name: str
    architecture: str
    special: str
    """What the tokenizer puts around `$A`."""
    where: str
    template: str | None = None
    before: str = ""
    """Text of the template before the user's message."""
    padding: str = "right"
    file: str = "jsonl"
    batch_tokens: int = 256
    seed: int = 0
    trims: bool = False


def _chat(before: str = "", trim: str = "") -> str:
    return before + _ROLES.replace("%TRIM%", trim) + _TURN


SCENARIOS = [
    Scenario("base without BOS", "gpt2", "$A", "all", padding="left", file="csv", seed=1),
    Scenario("EOS appended", "llama", "<bos> $A <eos>", "last", batch_tokens=64, seed=2),
    Scenario("EOS alone appended", "gpt_neox", "$A <eos>", "entity_last", file="csv", seed=3),
    Scenario("no BOS, generated", "qwen2", "$A", "generated", padding="left", seed=4),
    Scenario("sliding window", "gemma2", "<bos> $A", "entity_to_end", batch_tokens=700, seed=5),
    Scenario(
        "chat without BOS, tokenizer with",
        "llama",
        "<bos> $A",
        "entity",
        template=_chat(SYSTEM),
        before=SYSTEM + "user: ",
        padding="left",
        file="csv",
        seed=7,
    ),
    Scenario(
        "chat, entity to end",
        "gemma2",
        "<bos> $A <eos>",
        "entity_to_end",
        template=_chat("{{ bos_token }}" + SYSTEM, " | trim"),
        before="<bos>" + SYSTEM + "user: ",
        file="csv",
        batch_tokens=64,
        seed=9,
        trims=True,
    ),
]


def table_of(scenario: Scenario) -> list[dict[str, Any]]:
    """Prompts of 1 to 60 words with groups, entities, spans, and values that are missing."""
    rng = np.random.default_rng(scenario.seed)

    def words(n: int) -> list[str]:
        return [WORDS[i] for i in rng.integers(len(WORDS), size=n)]

    rows: list[dict[str, Any]] = []
    for number in range(20):
        n = int(rng.choice([1, 2, 3, 5, 8, 13, 30, 60]))
        entity = ENTITIES[int(rng.integers(len(ENTITIES)))]
        text = " ".join([*words(n // 2), entity, *words(n - n // 2 - 1)])
        text = text if text.strip() else "x"
        row: dict[str, Any] = {
            "id": f"row{number}",
            "text": text,
            "group": ["a", "b"][number % 2],
            "entity": entity,
            # An entity belongs to one split.
            "split": "train" if ENTITIES.index(entity) % 2 else "test",
        }
        for column, chance in (("entity", 0.15), ("group", 0.1)):
            if rng.random() < chance:
                row[column] = MISSING[int(rng.integers(len(MISSING)))]
        if row["entity"] == entity and rng.random() < 0.2:
            start = text.index(entity)
            row["span"] = [start, start + len(entity)]
        if rng.random() < 0.2:
            row["prompt"] = " ".join(["x", *words(2), entity, *words(1)])
            row.pop("span", None)
        rows.append(row)
    return rows


def write(rows: list[dict[str, Any]], file: Path) -> None:
    if file.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    frame = pd.DataFrame(rows)
    if "span" in frame:
        frame["span"] = frame["span"].map(lambda v: v if isinstance(v, float) else json.dumps(v))
    frame.to_csv(file, index=False)


def is_missing(value: Any) -> bool:
    return value is None or value != value or value in ("", "nan", "null")


def tokenizer_of(scenario: Scenario) -> Any:
    fast = random_models.tokenizer.__wrapped__()
    special = [(name, fast.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    used = [pair for pair in special if pair[0] in scenario.special]
    fast.backend_tokenizer.post_processor = Sequence(
        [
            ByteLevel(trim_offsets=True),
            TemplateProcessing(single=scenario.special, special_tokens=used),
        ]
    )
    fast.padding_side = scenario.padding
    fast.chat_template = scenario.template
    return fast


@dataclass
class PlainLoop:
    """One prompt at a time, with a hook written by hand."""

    hf: Any
    tokenizer: Any
    scenario: Scenario
    W_dec: torch.Tensor

    def ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]], int]:
        """Token ids, characters of each, and where the user's message begins among these."""
        if self.scenario.template is not None:
            messages = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            whole = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            assert encoded["input_ids"] == ids
            assert whole.startswith(self.scenario.before)
            shift = len(self.scenario.before)
            if self.scenario.trims:
                shift -= len(text) - len(text.lstrip())
            return ids, encoded["offset_mapping"], shift
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if self.scenario.special.endswith("<eos>"):
            ids, offsets = ids[:-1], offsets[:-1]
        return ids, offsets, 0

    def positions(
        self, text: str, span: tuple[int, int] | None
    ) -> tuple[list[int], list[int]] | None:
        """Ids and the prompt's tokens that are changed; None where the entity is not there."""
        ids, offsets, shift = self.ids_and_offsets(text)
        special = set(self.tokenizer.all_special_ids)
        where = self.scenario.where
        if where == "all":
            return ids, [i for i, token in enumerate(ids) if token not in special]
        if where == "generated":
            return ids, []
        if where == "last":
            return ids, [len(ids) - 1]
        if span is None:
            return None
        start, end = span[0] + shift, span[1] + shift
        inside = [
            i
            for i, (a, b) in enumerate(offsets)
            if ids[i] not in special and a < end and b > start and b > a
        ]
        last = inside[-1]
        chosen = {"entity": inside, "entity_last": [last]}
        return ids, chosen.get(where, list(range(last, len(ids))))

    def steer(self, delta: torch.Tensor, positions: list[int]) -> Callable[..., Any]:
        after = self.scenario.where in ("all", "generated")

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            if stream.shape[1] == 1 and self.prompt_done:
                changed = stream + delta if after else stream
            else:
                changed = stream.clone()
                changed[0, positions] += delta
                self.prompt_done = True
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def block(self) -> Any:
        inner = self.hf.base_model
        blocks = getattr(inner, "layers", None) or getattr(inner, "h", None)
        return blocks[LAYER]

    def generate(self, ids: list[int], delta: torch.Tensor, positions: list[int]) -> Any:
        self.prompt_done = False
        handle = self.block().register_forward_hook(self.steer(delta, positions))
        try:
            return self.hf.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
                return_dict_in_generate=True,
                output_logits=True,
            )
        finally:
            handle.remove()

    def text(self, output: Any, n_prompt: int) -> str:
        tokens = output.sequences[0, n_prompt:].tolist()
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def is_near_tie(self, output: Any) -> bool:
        """Whether rounding could have chosen another token somewhere."""
        best = torch.cat(output.logits).topk(2).values
        return bool(((best[:, 0] - best[:, 1]) < 1e-4).any())


def last_mention(text: str, entity: str) -> tuple[int, int] | None:
    whole = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(entity)}(?!\w)", text)]
    spans = whole or [m.span() for m in re.finditer(re.escape(entity), text)]
    return spans[-1] if spans else None


def span_of(row: dict[str, Any]) -> tuple[int, int] | None:
    """The last mention of the row's entity in its prompt, or the span that the row gives."""
    if row.get("span"):
        return tuple(row["span"])
    if is_missing(row["entity"]):
        return None
    return last_mention(row.get("prompt", row["text"]), row["entity"])


def added(record: dict[str, Any], own: str, W_dec: torch.Tensor) -> torch.Tensor:
    """What coefficient 1 of a condition adds; of a control, at its condition's norm."""
    rows = W_dec[[int(latent) for latent in own.split("+")]]
    if record["role"] != "control":
        return rows.sum(0)
    kind = record["control_kind"]
    if kind.startswith("random"):
        number = int(record["condition"].rsplit("_", 1)[1])
        of = ("control", f"layer_{LAYER}.resid_post", record["of"])
        direction = random_directions(number, D_MODEL, 0, *of)[-1]
    else:
        theirs = W_dec[[int(latent) for latent in record["latent"].split("+")]]
        scale = rows.norm(dim=1) / theirs.norm(dim=1)
        direction = scale @ theirs
    return direction / direction.norm() * rows.sum(0).norm()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_causal_test_equals_a_plain_loop_of_generate(
    tmp_path: Path, scenario: Scenario
) -> None:
    hf_logging.disable_progress_bar()
    limit = {"n_positions": 512} if scenario.architecture == "gpt2" else {}
    limit = limit or {"max_position_embeddings": 512}
    hf = random_hf_with(scenario.architecture, limit)
    tokenizer = tokenizer_of(scenario)
    hf.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # As users load it: transformers has tokenizer classes of its own for some architectures.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    weights = parameters("standard", D_MODEL, D_SAE)
    about = {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {
            "hook_name": f"blocks.{LAYER}.hook_resid_post",
            "prepend_bos": "<bos>" in scenario.special,
        },
    }
    write_saelens(tmp_path / "sae", about, weights)
    rows = table_of(scenario)
    file = tmp_path / f"table.{scenario.file}"
    write(rows, file)
    cfg = saexp.compose(
        [
            "model=hf",
            f"model.name={tmp_path / 'model'}",
            f"model.chat={'true' if scenario.template else 'false'}",
            "sae=local",
            f"sae.path={tmp_path / 'sae'}",
            f"layer={LAYER}",
            f"dataset={scenario.file}",
            f"dataset.path={file}",
            "dataset.max_length=500",
            "positions=all",
            f"intervention.latents={list(LATENTS)}".replace(" ", ""),
            f"intervention.where={scenario.where}",
            "intervention.unit=raw",
            f"intervention.batch_tokens={scenario.batch_tokens}",
            f"intervention.max_new_tokens={NEW_TOKENS}",
            "intervention.outcomes=[length]",
            "intervention.n_controls=1",
            f"intervention.control_kinds={CONTROL_KINDS[scenario.seed % 2]}",
            "intervention.n_neutral=1",
            f"coefficient={list(COEFFICIENTS)}".replace(" ", ""),
            "analyzer.n_bootstrap=0",
            "analyzer.n_background=200",
            FEW_NEUTRAL,
            "analyzer.scores=false",
            "sae.check=off",
            "tracker=none",
            "device=cpu",
            f"cache_dir={tmp_path / 'cache'}",
        ]
    )
    result = saexp.run(cfg, tmp_path / "run")
    effects = result.tables["effects"]
    loop = PlainLoop(hf, tokenizer, scenario, weights["W_dec"])
    by_id = {row["id"]: row for row in rows}
    steerable = {
        row["id"]
        for row in rows
        if loop.positions(row.get("prompt", row["text"]), span_of(row)) is not None
    }
    assert set(effects["example_id"]) <= steerable
    baseline = effects[effects["role"] == "baseline"]
    grouped = {row["id"] for row in rows if not is_missing(row["group"])}
    assert grouped & steerable <= set(baseline["example_id"])
    assert not baseline["example_id"].duplicated().any()

    controls = result.tables["controls"].set_index(["condition", "coefficient"])
    differing, unchanged = 0, {}
    for record in effects.to_dict("records"):
        row = by_id[record["example_id"]]
        placed = loop.positions(row.get("prompt", row["text"]), span_of(row))
        assert placed is not None
        ids, positions = placed
        delta = torch.zeros(D_MODEL)
        if record["role"] != "baseline" and record["coefficient"]:
            own = effects.loc[effects["condition"] == record["of"], "latent"].iloc[0]
            at = record["condition"], record["coefficient"]
            ratio = controls.loc[at, "norm_ratio"] if record["role"] == "control" else 1.0
            delta = record["coefficient"] * ratio * added(record, own, weights["W_dec"])
        # Whatever its condition, a prompt that nothing is added to has one text.
        key = record["example_id"] if not delta.any() else None
        generated = unchanged.get(key) or loop.generate(ids, delta, positions)
        if key is not None:
            unchanged[key] = generated
        expected = loop.text(generated, len(ids))
        if record["generated_text"] != expected:
            assert loop.is_near_tie(generated), (record["example_id"], record["condition"], ids)
            differing += 1
    assert differing <= 1
    steered = effects[effects["coefficient"] != 0]
    plain = baseline.set_index("example_id")["generated_text"]
    unlike = steered["generated_text"].to_numpy() != plain[steered["example_id"]].to_numpy()
    assert unlike.mean() > 0.2


def random_hf_with(architecture: str, options: dict[str, Any]) -> Any:
    """A random model with a longer context than the shared ones have."""
    settings = random_models.ARCHITECTURES[architecture][1]
    earlier = {key: settings[key] for key in options if key in settings}
    settings.update(options)
    try:
        return random_hf(architecture)
    finally:
        settings.update(earlier)
