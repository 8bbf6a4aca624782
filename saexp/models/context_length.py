"""How long a text a model can read."""

from typing import Any

from torch import nn

from saexp.errors import ModelError
from saexp.models.loading import LanguageModel
from saexp.models.rope import is_dynamic

_OFFSET = 2
"""OPT's table has two rows more than positions."""


def context_limit(model: LanguageModel) -> int | None:
    """Tokens that the model is made for, by its config; None where that has no end.

    Dynamic NTK is there for texts beyond what its config calls the maximum.
    """
    about = model.text_config
    limit = getattr(about, "max_position_embeddings", None)
    return None if limit is None or is_dynamic(about) else int(limit)


def position_limit(model: LanguageModel) -> int | None:
    """Positions of a model that looks them up in a table (GPT-2, OPT, GPT-J); None for others.

    Rotary models read longer texts than they were made for, if badly; a table has no more rows.
    """
    about = model.text_config
    limit = getattr(about, "max_position_embeddings", None)
    # What a config says of rotary embeddings spares reading the weights.
    if limit is None or getattr(about, "rope_parameters", None):
        return None
    token: Any = model.hf.get_input_embeddings()
    for module in model.hf.modules():
        is_other = isinstance(module, nn.Embedding) and module is not token
        if is_other and limit <= module.num_embeddings <= limit + _OFFSET:
            return int(limit)
        table = getattr(module, "embed_positions", None)
        if not isinstance(table, nn.Module) and table is not None and len(table) == limit:
            return int(limit)
    return None


def check_positions(model: LanguageModel, longest: int, n_new: int = 0, key: str = "") -> None:
    """Raise ModelError where a prompt of `longest` tokens and `n_new` generated ones are more than
    the model has positions. `key` sets the number of new tokens."""
    limit = position_limit(model)
    if limit is None or longest + n_new <= limit:
        return
    short = model.name.rpartition("/")[2]
    if not n_new:
        raise ModelError(
            f"a prompt is {longest} tokens long, but {short} has {limit} positions; "
            f"type dataset.max_length={limit}, or shorten the prompt"
        )
    fewer = f"{key}={limit - longest}, or " if limit > longest else ""
    shorter = f"dataset.max_length={limit - n_new}, which leaves longer prompts out"
    told = fewer + (shorter if limit > n_new else f"a smaller {key}")
    raise ModelError(
        f"a prompt of {longest} tokens and {n_new} new ones do not fit into the {limit} positions "
        f"of {short}; type {told}"
    )
