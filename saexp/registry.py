"""(kind, name) -> "module:attribute": what a config's name stands for, imported when it is built.

No module named here is imported before something of it is wanted, so that `--help` needs no torch.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from saexp.errors import ConfigError

_F = TypeVar("_F", bound=Callable[..., Any])

_KEY_FIELD = {"model": "loader", "sae": "loader"}
"""Kinds whose `name` says *which* weights; another field says *how* they are loaded."""

_BUILTIN: dict[str, dict[str, str]] = {
    "task": {
        "analyze": "saexp.tasks.analyze:analyze",
        "collect": "saexp.tasks.collect:collect",
        "train": "saexp.tasks.train:train",
        "cache": "saexp.tasks.cache:manage",
        "evaluate": "saexp.tasks.evaluate:evaluate",
        "dashboard": "saexp.tasks.dashboard:dashboard",
        "label": "saexp.tasks.label:label",
    },
    "model": {
        "hf": "saexp.models.loading:load_model",
    },
    "sae": {
        "release": "saexp.saes.loading:load_release",
        "path": "saexp.saes.loading:load_path",
        "random": "saexp.saes.loading:random_sae",
    },
    "dataset": {
        "entities": "saexp.data.datasets:entities",
        "jsonl": "saexp.data.datasets:jsonl",
        "csv": "saexp.data.datasets:csv",
        "text": "saexp.data.datasets:text",
        "ioi": "saexp.data.datasets:ioi",
        "memorization": "saexp.data.datasets:memorization",
        "hf": "saexp.data.datasets:hf",
        "prompt": "saexp.data.datasets:prompt",
        "wikidata": "saexp.labeling.wikidata:wikidata",
    },
    "positions": {
        "entity_last": "saexp.data.positions:EntityLast",
        "entity_all": "saexp.data.positions:EntityAll",
        "entity_last_n": "saexp.data.positions:EntityLastN",
        "after_entity": "saexp.data.positions:AfterEntity",
        "last": "saexp.data.positions:Last",
        "all": "saexp.data.positions:All",
        "random": "saexp.data.positions:Random",
        "middle": "saexp.data.positions:Middle",
        "indices": "saexp.data.positions:Indices",
        "substring": "saexp.data.positions:Substring",
        "continuation": "saexp.data.positions:Continuation",
    },
    "analyzer": {
        "contrast": "saexp.analysis.contrast:ContrastAnalyzer",
        "stats": "saexp.analysis.group_statistics:StatsAnalyzer",
        "top_features": "saexp.analysis.top_features:TopFeaturesAnalyzer",
        "probe": "saexp.analysis.probe:ProbeAnalyzer",
        "capability": "saexp.analysis.capability:CapabilityAnalyzer",
    },
    "intervention": {
        "steer": "saexp.interventions.edits:Steer",
        "clamp": "saexp.interventions.edits:Clamp",
        "scale": "saexp.interventions.edits:Scale",
        "ablate": "saexp.interventions.edits:Ablate",
        "project_out": "saexp.interventions.edits:ProjectOut",
        "orthogonalize": "saexp.interventions.edits:Orthogonalize",
        "splice": "saexp.interventions.edits:SpliceIn",
        "patch": "saexp.interventions.edits:PatchFrom",
    },
    "outcome": {
        "refusal": "saexp.interventions.outcomes:Refusal",
        "accuracy": "saexp.interventions.outcomes:Accuracy",
        "exact_match": "saexp.interventions.outcomes:ExactMatch",
        "matching_tokens": "saexp.interventions.outcomes:MatchingTokens",
        "yes_no": "saexp.interventions.outcomes:YesNo",
        "answer_probability": "saexp.interventions.outcomes:AnswerProbability",
        "answer_rank": "saexp.interventions.outcomes:AnswerRank",
        "answer_logit": "saexp.interventions.outcomes:AnswerLogit",
        "logit_difference": "saexp.interventions.outcomes:LogitDifference",
        "neutral_kl": "saexp.interventions.outcomes:NeutralKL",
        "perplexity": "saexp.interventions.outcomes:Perplexity",
        "repetition": "saexp.interventions.outcomes:Repetition",
        "length": "saexp.interventions.outcomes:Length",
        "attention": "saexp.interventions.outcomes:Attention",
    },
    "tracker": {
        "wandb": "saexp.tracking.wandb:WandbTracker",
        "jsonl": "saexp.tracking.trackers:JsonlTracker",
        "none": "saexp.tracking.trackers:NullTracker",
    },
}

_registered: dict[tuple[str, str], Callable[..., Any]] = {}


def register(kind: str, name: str) -> Callable[[_F], _F]:
    """Class or function decorator that makes `name` buildable under `kind`.

    Raises ConfigError when the kind does not exist or the name is taken by another object.
    """
    if kind not in _BUILTIN:
        raise ConfigError(f"no component kind '{kind}'; the kinds are {', '.join(_BUILTIN)}")

    def add(target: _F) -> _F:
        known = _registered.get((kind, name))
        same = known is not None and (known.__module__, known.__qualname__) == (
            target.__module__,
            target.__qualname__,
        )
        if name in _BUILTIN[kind] or (known is not None and not same):
            raise ConfigError(f"{kind} '{name}' is registered already; choose another name")
        _registered[kind, name] = target
        return target

    return add


def names(kind: str) -> list[str]:
    """Names buildable under `kind`, sorted."""
    return sorted({*_BUILTIN[kind], *(n for k, n in _registered if k == kind)})


def registered() -> list[Callable[..., Any]]:
    """Every class and function that was registered from outside this table."""
    return list(_registered.values())


def require(kind: str, name: str) -> None:
    """Raise ConfigError naming the nearest names where (kind, name) is unknown; imports nothing."""
    if kind not in _BUILTIN:
        raise ConfigError(f"no component kind '{kind}'; the kinds are {', '.join(_BUILTIN)}")
    if (kind, name) not in _registered and name not in _BUILTIN[kind]:
        raise ConfigError(f"no {kind} is called '{name}'; {did_you_mean(name, names(kind))}")


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """The class or function behind (kind, name). Raises ConfigError naming the nearest names."""
    require(kind, name)
    if (kind, name) in _registered:
        return _registered[kind, name]
    module, _, attribute = _BUILTIN[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(kind: str, cfg: Any, **runtime: Any) -> Any:
    """Build the object that a typed config stands for; `runtime` holds what no config can."""
    key_field = _KEY_FIELD.get(kind, "name")
    name = getattr(cfg, key_field, None)
    if name is None:
        raise ConfigError(
            f"the {kind} config has no '{key_field}', so nothing can be built from it"
        )
    target = resolve(kind, str(name))
    if (kind, str(name)) in _registered:
        _check_call(kind, str(name), target, cfg, runtime)
    return target(cfg, **runtime)


def _check_call(
    kind: str, name: str, target: Callable[..., Any], cfg: Any, runtime: dict[str, Any]
) -> None:
    """Raise ConfigError for a component of the user's own that cannot be called so."""
    try:
        inspect.signature(target).bind(cfg, **runtime)
    except TypeError as error:
        given = ", ".join(["its config", *(f"{key}=" for key in runtime)])
        where = inspect.getsourcefile(target) or target.__module__
        raise ConfigError(
            f"{where}: {kind} '{name}' cannot be built: {error}; it is called with {given}"
        ) from error
    except ValueError:
        # Written in C, so that its signature is not known.
        return


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """'did you mean a, b?' for near misses, else 'choose from …'."""
    options = list(known)
    near = difflib.get_close_matches(str(word), options, n=n, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"choose from {', '.join(options)}"
