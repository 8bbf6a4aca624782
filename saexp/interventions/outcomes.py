"""What is looked at in a generation; registry kind `outcome`."""

import re
from pathlib import Path

from saexp.data.examples import Example

PATTERNS = Path(__file__).parent.parent / "assets" / "refusal_patterns.txt"


def read_patterns(path: Path = PATTERNS) -> list[re.Pattern[str]]:
    """One regular expression per line; lines that begin with # are comments."""
    lines = path.read_text("utf-8").splitlines()
    return [re.compile(x, re.IGNORECASE) for x in lines if x.strip() and not x.startswith("#")]


class Refusal:
    """Whether the model says it does not know."""

    name = "refusal"

    def __init__(self) -> None:
        self.patterns = read_patterns()

    def score(self, generated: str, example: Example) -> bool:
        """True for a refusal; the entity's own name is taken out first."""
        text = generated.replace("\u2019", "'")
        if example.entity:
            text = text.replace(example.entity, "it")
        return any(p.search(text) for p in self.patterns)
