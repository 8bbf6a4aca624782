"""Write the shipped data sets of the tiny world: entities, indirect objects, passages, background.

python experiments/tiny_lm/export.py --out saexp/assets/tiny
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from corpus import (
    ATTRIBUTES,
    ENTITY_TYPES,
    REFUSAL,
    Entity,
    World,
    ioi,
    passage,
    question,
    sentence,
)
from tokenizer import make_world
from transformers import PreTrainedTokenizerFast

N_IOI, N_BACKGROUND = 200, 600


def entity_rows(world: World) -> list[dict[str, str]]:
    """One question per entity, its attribute drawn by the seed; text ends at the name's end."""
    rng = np.random.default_rng(world.seed + 900)
    rows = []
    for kind in ENTITY_TYPES:
        for group, entities in (("known", world.known), ("unknown", world.held_out)):
            for number, entity in enumerate(entities[kind]):
                attribute = str(rng.choice(list(ATTRIBUTES[kind])))
                rows.append(_row(f"{kind}-{group}-{number:03d}", group, entity, attribute))
    return rows


def _row(name: str, group: str, entity: Entity, attribute: str) -> dict[str, str]:
    answer = f" {entity.facts[attribute]}." if entity.facts else REFUSAL
    return {
        "id": name,
        "entity": entity.name,
        "entity_type": entity.entity_type,
        "group": group,
        "text": f"The {entity.entity_type} {entity.name}",
        "prompt": question(entity, attribute),
        "answer": answer,
    }


def ioi_rows(world: World) -> list[dict[str, str]]:
    """Distinct sentences with name pairs that training never showed."""
    rng = np.random.default_rng(world.seed + 901)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < N_IOI:
        prompt, answer, foil = ioi(world, rng, held_out=True)
        row = {"id": str(len(rows)), "text": prompt, "answer": answer, "foil": foil}
        rows.setdefault(prompt, row)
    return list(rows.values())


def passage_rows(world: World, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, object]]:
    """Memorised and unseen passages cut in the middle, in the columns of study E.

    `perfect_match` and `matching_tokens` say what each passage is; the card measures what the model
    does with it.
    """
    rows = []
    for memorised, passages in ((True, world.memorised), (False, world.unseen)):
        for text in passages:
            tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            cut = tokens["offset_mapping"][len(tokens["input_ids"]) // 2][0]
            rows.append(
                {
                    "input_text": text[:cut],
                    "generated_continuation_text": text[cut:],
                    "perfect_match": memorised,
                    "matching_tokens": len(tokens["input_ids"]) // 2 if memorised else 0,
                }
            )
    return rows


def background_lines(world: World) -> list[str]:
    """Prose and indirect-object sentences that name no entity."""
    rng = np.random.default_rng(world.seed + 902)
    lines = []
    for _ in range(N_BACKGROUND // 3):
        prompt, answer, _ = ioi(world, rng, held_out=False)
        lines += [sentence(rng), passage(rng), f"{prompt}{answer}."]
    return lines


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    random_world, name_tokenizer = make_world(0)
    _write_jsonl(out / "entities.jsonl", entity_rows(random_world))
    _write_jsonl(out / "ioi.jsonl", ioi_rows(random_world))
    with (out / "memorization.csv").open("w", encoding="utf-8", newline="") as file:
        table = passage_rows(random_world, name_tokenizer)
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    (out / "background.txt").write_text(
        "\n".join(background_lines(random_world)) + "\n", encoding="utf-8"
    )
