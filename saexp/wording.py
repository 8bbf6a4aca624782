"""Words of messages and reports."""


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number and its noun: "1 row", "3 rows"; `many` where that is not `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def brief(text: str, length: int) -> str:
    """One line of at most this many characters, cut between words."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    return line[: length - 1].rpartition(" ")[0].rstrip(".,;:") + " …"
