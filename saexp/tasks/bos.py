"""Whether a run's texts begin with the BOS token: as typed, else as its SAEs were trained."""

from collections.abc import Iterable, Sequence

from saexp.config import RunConfig
from saexp.data.prompts import as_read, tokenize_prompts
from saexp.data.tokens import adds_bos
from saexp.errors import ConfigError
from saexp.models.loading import LanguageModel
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder

BOS = "check/begins_with_bos"
"""Metric: 1 where texts begin with BOS, else 0."""
Wish = tuple[str, bool | None]
"""(SAE, whether it was trained on texts that begin with BOS; None where its files do not say)."""


def wish(sae: SparseAutoencoder) -> Wish:
    """What an SAE's files say."""
    said = sae.metadata.get("prepend_bos")
    name = f"{sae.metadata.get('name', 'the SAE')} at {sae.hookpoint.name}"
    return name, None if said is None else bool(said)


def begins_with_bos(model: LanguageModel) -> bool:
    """Whether the run's texts do."""
    return adds_bos(model.tokenizer) if model.prepend_bos is None else model.prepend_bos


def settle_bos(
    cfg: RunConfig,
    model: LanguageModel,
    saes: Iterable[SparseAutoencoder | Wish],
    asked: bool | None = None,
    key: str = "model.prepend_bos",
) -> TaskResult:
    """Set `model.prepend_bos` for the run, before its first text is tokenised; metric and notes.

    `asked`, typed as `key`, or else `model.prepend_bos` decides; without either the SAEs do, and
    the tokenizer for those that do not say. Raises ConfigError where they disagree, and where the
    tokenizer has no BOS token to put there.
    """
    own, has = adds_bos(model.tokenizer), getattr(model.tokenizer, "bos_token_id", None) is not None
    if asked is None:
        asked, key = cfg.model.prepend_bos, "model.prepend_bos"
    if asked and not has:
        raise ConfigError(f"{key}=true, but the tokenizer of {model.name} has no BOS token")
    wishes = [one if isinstance(one, tuple) else wish(one) for one in saes]
    means = [own if said is None or (said and not has) else said for _, said in wishes]
    if asked is None and len(set(means)) > 1:
        raise _disagreement(wishes, means)
    begins = asked if asked is not None else next(iter(means), own)
    model.prepend_bos = asked if asked is not None else (None if begins == own else begins)
    result = TaskResult(metrics={BOS: int(begins)})
    result.notes = _notes(model, wishes, asked, key, own, has) + _of_chat(model, begins)
    return result


def _of_chat(model: LanguageModel, begins: bool) -> list[str]:
    """A note where prompts in chat begin otherwise than the run's texts."""
    tokenizer = model.tokenizer
    if not model.cfg.chat or not getattr(tokenizer, "chat_template", None):
        return []
    [tokens] = tokenize_prompts(model, as_read(model, ["a"]), 1)
    if (tokens.ids[:1] == (tokenizer.bos_token_id,)) == begins:
        return []
    note = (
        f"prompts in chat begin {'without' if begins else 'with'} BOS, as the chat template of "
        f"{model.name} has them, and texts {'with' if begins else 'without'}"
    )
    # A BOS of the template may mark a role, as in ChatML, so removing it is not suggested.
    return [f"{note}; model.prepend_bos=true makes prompts begin like texts" if begins else note]


def _disagreement(wishes: Sequence[Wish], means: Sequence[bool]) -> ConfigError:
    wants, lacks = wishes[means.index(True)][0], wishes[means.index(False)][0]
    return ConfigError(
        f"{wants} reads texts that begin with BOS and {lacks} texts that do not (as they were "
        "trained, or as the tokenizer has it), so one run cannot read both; run them apart, or "
        "type model.prepend_bos=true (or false) for all"
    )


def _notes(
    model: LanguageModel,
    wishes: Sequence[Wish],
    asked: bool | None,
    key: str,
    own: bool,
    has: bool,
) -> list[str]:
    """What a reader must know: BOS put there or left out, and SAEs trained another way."""
    of = {said: [name for name, n in wishes if n is said] for said in (True, False)}
    if asked is not None:
        told = []
        if others := of[not asked]:
            told.append(
                f"{key}={str(asked).lower()} was typed, though {others[0]} was trained "
                f"{'without' if asked else 'with'} BOS in front of its texts"
            )
        return told
    if of[True] and not has:
        return [
            f"{of[True][0]} was trained on texts that begin with BOS, and the tokenizer of "
            f"{model.name} has none: texts are read without"
        ]
    if model.prepend_bos is None:
        return []
    name = of[not own][0]
    if model.prepend_bos:
        return [
            f"texts begin with BOS, as {name} was trained (prepend_bos in its config); the "
            "tokenizer puts none there by itself; model.prepend_bos=false leaves it out"
        ]
    return [
        f"texts are read without the BOS that the tokenizer puts in front, as {name} was trained "
        "(prepend_bos=false in its config); model.prepend_bos=true keeps it"
    ]
