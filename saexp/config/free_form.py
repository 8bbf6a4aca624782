"""Options whose keys are the user's own: templates and rules of task=label by entity type."""

import re
from collections.abc import Sequence

_FREE = re.compile(r"\+{0,2}(task\.options\.(rules|templates)\.[^=]+)=(.*)", re.DOTALL)


def with_free_keys(overrides: Sequence[str]) -> list[str]:
    """The overrides, so that Hydra takes new keys of free-form options without a `+`.

    A template that is a plain text is quoted for Hydra, which would refuse its braces:

    >>> with_free_keys(["task.options.templates.book.creator=Who wrote {entity}?"])
    ['++task.options.templates.book.creator="Who wrote {entity}?"']
    """
    return [_with_free_key(override) for override in overrides]


def _with_free_key(override: str) -> str:
    match = _FREE.fullmatch(override)
    if not match:
        return override
    key, group, value = match.groups()
    if group == "templates" and "{" in value and value.lstrip()[:1] not in ("'", '"', "[", "{"):
        value = '"' + value.replace('"', r"\"") + '"'
    return f"++{key}={value}"
