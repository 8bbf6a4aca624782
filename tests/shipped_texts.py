"""Texts of the entities that are shipped with the tiny model."""

import json

from saexp.models.resolution import ASSETS

GROUPS = ("known", "unknown")


def texts_of(group: str, n: int = 40) -> list[str]:
    """The first n texts of a group."""
    lines = (ASSETS / "tiny" / "entities.jsonl").read_text("utf-8").splitlines()
    entities = [json.loads(line) for line in lines]
    return [entity["text"] for entity in entities if entity["group"] == group][:n]
