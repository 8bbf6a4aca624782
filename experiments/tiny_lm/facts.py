"""Write entity_recognition/facts.jsonl: every fact the shipped model was trained on, by entity.

python experiments/tiny_lm/facts.py
"""

import json
from pathlib import Path

from corpus import ENTITY_TYPES
from tokenizer import make_world

if __name__ == "__main__":
    world, _ = make_world(0)
    rows = [
        {
            "id": f"{kind}-known-{number:03d}",
            "entity": entity.name,
            "entity_type": kind,
            "text": f"The {kind} {entity.name}",
            "attributes": entity.facts,
        }
        for kind in ENTITY_TYPES
        for number, entity in enumerate(world.known[kind])
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    folder = Path(__file__).parents[1] / "entity_recognition"
    (folder / "facts.jsonl").write_text(lines, encoding="utf-8")
