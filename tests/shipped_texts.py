"""Texts of the entities that are shipped with the tiny model, and a tenth of its neutral ones."""

import json
from pathlib import Path

from saexp.models.resolution import ASSETS

GROUPS = ("known", "unknown")
FEW_NEUTRAL = f"dataset.background={Path(__file__).with_name('neutral_texts.txt')}"
"""A run collects the shipped neutral text in half a second, these 60 of its 600 lines at once."""


def texts_of(group: str, n: int = 40) -> list[str]:
    """The first n texts of a group."""
    lines = (ASSETS / "tiny" / "entities.jsonl").read_text("utf-8").splitlines()
    entities = [json.loads(line) for line in lines]
    return [entity["text"] for entity in entities if entity["group"] == group][:n]
