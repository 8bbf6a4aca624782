"""Configs of the groups `dataset` (lists of examples, and corpora) and `intervention`.

Those of the other groups are in `components`. No torch here."""

import codecs
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, replace
from typing import Any

from omegaconf import MISSING

from saexp.config.environment import at_least, one_of, parse_coefficients, parse_layers
from saexp.errors import ConfigError

COLUMNS = ("text", "group", "entity", "span", "entity_type", "prompt", "answer", "id", "split")
"""Columns of a data file that have a meaning; all others are kept as they are."""


MISSING_VALUES = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""Texts that `pandas.read_csv` treats as missing values by default."""


@dataclass(kw_only=True)
class DatasetConfig:
    """Texts with groups, spans, answers and splits."""

    name: str = MISSING
    """Registry name."""
    path: str | None = None
    """File or folder with the data."""
    model_name: str | None = None
    """The language model: shipped entities depend on it."""
    columns: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(COLUMNS))
    """Column name of this list -> the file's column name, where they differ."""
    missing_values: list[Any] = field(default_factory=lambda: list(MISSING_VALUES))
    """Texts that count as missing values in a column (a null, NaN or empty cell always does), by
    default those of `pandas.read_csv`. Where NA is a value: 'dataset.missing_values=["null","nan"]'
    """
    groups: list[str] | None = None
    """The two groups to contrast, first against second; by default those of the file."""
    group_rule: str | None = None
    """Rule on a column that defines the groups, e.g. `matching_tokens == 0`."""
    entity_types: list[str] | None = None
    """Entity types to keep; all by default."""
    n_examples: int | None = None
    """Most examples per group and entity type (seeded choice)."""
    split: dict[str, float] = field(default_factory=lambda: {"train": 0.5, "val": 0.1, "test": 0.4})
    """Fractions of entities per split, where the data has no splits."""
    template: str | None = None
    """Template of each entity's text, with {entity} and {entity_type}."""
    prompt_template: str | None = None
    """Template of the prompt that interventions run on, with {entity} and {entity_type}."""
    hf_split: str = "train"
    """Split of a `datasets` dataset."""
    text: str | None = None
    """Text from the command line."""
    answer: str | None = None
    """Its answer."""
    foil: str | None = None
    """A wrong answer to compare with."""
    answer_space: str = "auto"
    """Whether to put a space before an answer (or foil) that has none: auto (where one belongs
    between the prompt's last character and the answer's first), always, or never."""
    background: str | None = None
    """File of neutral text for the background filter; by default the shipped one."""
    max_length: int = 512
    """Longest text in tokens, special tokens included; longer texts are truncated."""
    truncation: str = "skip"
    """Texts truncated at max_length whose end determines the analysed tokens (positions last,
    negative indices): skip (and count) them, or keep (read them at the cut, with a note)."""
    seed: int = 0
    """Seed of the split and of the choice of examples."""

    def __post_init__(self) -> None:
        at_least("dataset.max_length", self.max_length, 2)
        one_of("dataset.answer_space", self.answer_space, ("auto", "always", "never"))
        one_of("dataset.truncation", self.truncation, ("skip", "keep"))
        if not all(isinstance(text, str | int | float) for text in self.missing_values):
            raise ConfigError(
                f"dataset.missing_values={list(self.missing_values)} must be texts or numbers "
                """(null itself always is missing); quote: 'dataset.missing_values=["null","NA"]'"""
            )
        at_least("dataset.seed", self.seed, 0)
        if self.n_examples is not None:
            at_least("dataset.n_examples", self.n_examples, 1)
        for name in self.columns:
            one_of("dataset.columns", name, COLUMNS)
        for name, fraction in self.split.items():
            one_of("dataset.split", name, ("train", "val", "test"))
            at_least(f"dataset.split.{name}", fraction, 0)
        if abs(sum(self.split.values()) - 1) > 1e-6:
            raise ConfigError(
                f"dataset.split sums to {sum(self.split.values()):g}; its fractions must sum to 1"
            )


@dataclass(kw_only=True)
class CustomDatasetConfig(DatasetConfig):
    """A data set that was registered without a config class."""

    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the data set, not validated."""


@dataclass(kw_only=True)
class WikidataConfig(DatasetConfig):
    """Entity and query files in the format of Ferrando et al. (2024)."""

    min_correct: int = 3
    """Correct sampled answers that make an attribute known."""
    min_known: int = 2
    """Known attributes that make an entity known."""
    max_unknown: int = 0
    """Largest number of known attributes of an unknown entity."""
    fetch: Any = field(default_factory=list)
    """Entity types to fetch from Wikidata into `path` first, one or a list."""
    n_fetched: int = 200
    """Entities to fetch per type."""
    endpoint: str = "https://query.wikidata.org/sparql"
    """SPARQL endpoint."""
    min_sitelinks: int = 20
    """Fewest Wikipedia articles about a fetched entity."""
    timeout: int = 60
    """Seconds that a query may take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("n_fetched", 1), ("min_sitelinks", 0), ("timeout", 1)):
            at_least(f"dataset.{name}", getattr(self, name), least)


DOCUMENTS = ("file", "paragraph", "line")


@dataclass(kw_only=True)
class CorpusConfig(DatasetConfig):
    """Documents tokenized once, and packed into contexts of equal length (`dataset=corpus`)."""

    context_size: int | None = None
    """Tokens per context; by default the model's maximum, at most 1024."""
    pack: bool = True
    """Concatenate documents into full contexts; false: a context per document, cut at the size."""
    separator: str = "bos"
    """Token between two documents of a context: bos (as sae-lens), eos, none, or the text of a
    token of the vocabulary, such as <|endoftext|>. A model whose texts do not begin with BOS gets
    none in place of bos, with a note."""
    text_column: str = "text"
    """Column of the texts in JSONL, Parquet and data sets."""
    document: str = "file"
    """What is a document in a text file: the file, a paragraph (between blank lines), or a line."""
    encoding: str = "utf-8"
    """Encoding of text files and JSONL."""
    subset: str | None = None
    """Configuration of a data set of the hub, such as 20231101.en."""
    streaming: bool = False
    """Fetch a data set of the hub while it is tokenized, up to `n_tokens`."""
    n_tokens: int | None = None
    """Stop after the context that reaches this number of tokens; all by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("dataset.document", self.document, DOCUMENTS)
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ConfigError(
                f"dataset.encoding={self.encoding}: no such encoding; type utf-8 or latin-1"
            ) from error
        if self.context_size is not None:
            at_least("dataset.context_size", self.context_size, 2)
        if self.n_tokens is not None:
            at_least("dataset.n_tokens", self.n_tokens, 1)
        if self.streaming and self.n_tokens is None:
            raise ConfigError(
                "dataset.streaming=true reads until dataset.n_tokens= is reached; type a number"
            )


PLACES = ("all", "entity", "entity_last", "entity_to_end", "last", "prompt", "generated")
UNITS = ("raw", "max_act", "p99_act", "resid_norm")
DIRECTIONS = ("latents", "mean_difference", "denoised_difference", "probe", "random")
CONTROL_KINDS = ("frequency", "disruption", "random_norm", "random_kl")
"""Latents of similar activation frequency; active latents scaled to equal KL on neutral text;
random directions of equal norm; random directions scaled to equal KL."""
RULES = ("always", "active", "at_least")
SELECTED = "selected"
PER_LAYER = "selected_per_layer"


DEFAULT_OUTCOMES = (["refusal"], ["refusal", "neutral_kl"])
"""Outcomes of the shipped interventions where none is named."""


SIZES = ("auto", "full", "small")
SMALL: dict[str, Any] = {
    "top_k": 2,
    "n_controls": 79,
    "n_curve_controls": 0,
    "control_kinds": ["random_norm"],
    "n_prompts": 30,
    "n_choice_prompts": 15,
    "n_neutral": 5,
}
"""Numbers of a small causal test, in place of those that are left at their defaults.

With 79 controls a p-value can be 0.0125, which stays below 0.05 after Holm over three tests."""


@dataclass(kw_only=True)
class InterventionConfig:
    """A causal test: what is changed, where, how strongly, and which outcomes are measured."""

    name: str = MISSING
    """Registry name: `none` runs no causal test."""
    latents: Any = SELECTED
    """`selected` by the contrast, a list of latent indices, or latents of the SAEs of several
    layers, changed together: {1: [12, 77], 2: selected}, or selected_per_layer with
    layers=[1,2]."""
    top_k: int = 4
    """Selected latents per group (and layer) that are tested together."""
    size: str = "auto"
    """full: the numbers of prompts, latents and controls as they are; small: fewer of those that
    are left at their defaults (30 and 15 prompts per group, top_k=2, 79 random directions as
    controls at the selected coefficient, 5 neutral texts); auto: small on a CPU for a model of more
    than 10 million parameters outside its embeddings, where the full test takes hours."""
    keep: list[str] = field(default_factory=list)
    """Names of these numbers that `size` does not change, such as n_prompts; those that are typed
    on the command line are among them."""
    min_output_score: float | None = None
    """Test only selected latents with at least this output score (Arad et al. 2025)."""
    directions: list[str] = field(default_factory=lambda: ["latents"])
    """Directions that are added or removed, one or several: latents, mean_difference,
    denoised_difference (its component in the span of the latents' decoder rows), probe, random."""
    layers: Any = None
    """Layers that are changed, a list or all, where the intervention supports it (steer, patch, …);
    with latents=selected_per_layer, the layers whose SAEs are used."""
    rule: str = "always"
    """clamp: always move a latent to its target, only where it is active, or to at_least its
    target."""
    values: list[float] | None = None
    """clamp: targets of the listed latents, in their order; by default their mean in the other
    group."""
    error: bool = False
    """splice: add the reconstruction error."""
    streams: list[str] = field(default_factory=lambda: ["resid_post"])
    """patch: streams to patch, one after another: resid_post, attn_out, mlp_out, attn_z."""
    heads: Any = None
    """patch: heads of attn_z to patch, one after another, a list or all."""
    embedding: bool = False
    """orthogonalize: remove the directions from the embeddings too."""
    unit: str = "resid_norm"
    """Unit of the coefficient: raw, max_act, p99_act or resid_norm (the stream's
    median norm over ordinary positions)."""
    default_coefficients: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6, 0.9])
    """Coefficients used when `coefficient` is not given."""
    coefficient: Any = None
    """Coefficient, a number or a list."""
    where: str = "entity_last"
    """Tokens that are changed: all, entity, entity_last, entity_to_end, last, prompt, generated, or
    any option of the positions group (in chat, token counts refer to the user's message)."""
    where_options: dict[str, Any] = field(default_factory=dict)
    """Settings of that positions option, fields of `PositionsConfig`, such as {n: 2}."""
    n_controls: int = 99
    """Controls of each kind per main condition, at its selected coefficient, on test prompts; the
    smallest p-value is 1 / (n_controls + 1). 0: no controls."""
    n_curve_controls: int = 10
    """Controls (at most n_controls) per condition at every coefficient, of the kinds frequency and
    random_norm; on train prompts too, where they help to select the coefficient."""
    control_kinds: list[str] = field(default_factory=lambda: list(CONTROL_KINDS))
    """Kinds of control: frequency (latents of similar activation frequency), disruption (latents
    scaled to equal KL on neutral text), random_norm and random_kl (random directions of equal norm
    or KL); kinds that do not apply to the intervention are left out."""
    frequency_caliper: float = 2.0
    """Largest ratio between the activation frequencies of a latent and its control."""
    kl_caliper: float = 1.1
    """Largest ratio between the KL of a condition and of controls scaled to equal KL."""
    n_prompts: int = 100
    """Prompts per group, from the test split (seeded choice)."""
    n_choice_prompts: int = 40
    """Prompts per group from the train split, on which the reported coefficient is selected."""
    max_new_tokens: int = 30
    """Longest generation in tokens."""
    temperature: float = 0.0
    """Sampling temperature, seeded per prompt; 0 is greedy decoding."""
    outcomes: list[str] = field(default_factory=lambda: ["refusal"])
    """Outcomes, registry names of kind `outcome`."""
    alternatives: list[str] | None = field(default_factory=lambda: ["dont_know", "answer_logit"])
    """Outcomes that are measured instead where `outcomes` is the default and refusal is constant
    without intervention (a model that never refuses); []: nothing is changed then; null: refusal is
    tested all the same. Outcomes that you name are always tested."""
    n_neutral: int = 10
    """Neutral texts on which side effects are measured (outcome neutral_kl)."""
    prediction_test: bool = False
    """Report the p-value of a prediction t-test beside the rank p-value among controls; it assumes
    that controls are normally distributed and has no smallest value."""
    batch_tokens: Any = "auto"
    """Tokens per batch of prompts, padding included; auto: as many as keep the KV cache within
    2 GiB, at most 65536 (16384 on a CPU)."""
    seed: int = 0
    """Seed of the choice of prompts and controls."""

    @property
    def replaces_constant(self) -> bool:
        """Whether a rate that is constant without intervention is replaced by `alternatives`."""
        return self.alternatives is not None and list(self.outcomes) in DEFAULT_OUTCOMES

    def effective_keep(self) -> list[str]:
        """Of `keep` what can change a result: numbers that have their defaults."""
        names = set(self.keep) if self.name != "none" else set()
        return sorted(n for n in names if getattr(self, n) == _default_of(InterventionConfig, n))

    def smaller(self) -> tuple["InterventionConfig", dict[str, tuple[Any, Any]]]:
        """The config with the numbers of `SMALL`, and name -> (default, number) of those replaced:
        those that have their defaults and are not in `keep`."""
        changed = {}
        for name, number in SMALL.items():
            default = _default_of(InterventionConfig, name)
            if getattr(self, name) == default and name not in self.keep:
                changed[name] = (default, number)
        return replace(self, **{name: new for name, (_, new) in changed.items()}), changed

    def __post_init__(self) -> None:
        one_of("intervention.size", self.size, SIZES)
        for name in self.keep:
            one_of("intervention.keep", name, tuple(SMALL))
        one_of("intervention.unit", self.unit, UNITS)
        one_of("intervention.rule", self.rule, RULES)
        if not self.directions:
            raise ConfigError(
                "intervention.directions is empty; choose from " + ", ".join(DIRECTIONS)
            )
        for direction in self.directions:
            one_of("intervention.directions", direction, DIRECTIONS)
        for key, least in (("n_controls", 0), ("n_prompts", 1), ("n_choice_prompts", 0)):
            at_least(f"intervention.{key}", getattr(self, key), least)
        self._check_controls()
        for key in ("max_new_tokens", "top_k", "n_neutral"):
            at_least(f"intervention.{key}", getattr(self, key), 1)
        if self.batch_tokens != "auto":
            if not str(self.batch_tokens).isdecimal():
                raise ConfigError(
                    f"intervention.batch_tokens={self.batch_tokens} is not a number; type auto, or "
                    "8192"
                )
            at_least("intervention.batch_tokens", int(self.batch_tokens), 1)
        at_least("intervention.temperature", self.temperature, 0)
        if self.coefficient is not None:
            parse_coefficients(self.coefficient)
        if self.layers is not None and self.layers != "all":
            parse_layers(self.layers)
            self.layers = list(self.layers) if isinstance(self.layers, list) else [self.layers]
        self._check_latents()
        self._check_values()

    @property
    def by_layer(self) -> bool:
        """Whether latents are those of several layers' SAEs, each changed at its own layer."""
        return isinstance(self.latents, dict) or self.latents == PER_LAYER

    def latents_at(self, layer: int) -> Any:
        """The latents listed for a layer's SAE, or `selected`."""
        if isinstance(self.latents, dict):
            return self.latents[layer]
        return SELECTED if self.latents == PER_LAYER else self.latents

    def latent_layers(self, n_layers: int) -> list[int]:
        """Layers that `latents` lists, for a model of `n_layers`; none if it lists no layers."""
        if isinstance(self.latents, dict):
            return sorted(self.latents)
        if not self.by_layer:
            return []
        return list(range(n_layers)) if self.layers == "all" else sorted(parse_layers(self.layers))

    def targets_at(self, layer: int) -> dict[int, float]:
        """clamp: latents of a layer's SAE -> `values`."""
        assert self.values is not None
        targets = dict(zip(self._listed(), self.values, strict=True))
        if isinstance(self.latents, dict):
            return {latent: value for (at, latent), value in targets.items() if at == layer}
        return {latent: value for (_, latent), value in targets.items()}

    def _listed(self) -> list[tuple[int | None, int]]:
        """(layer, latent) of every latent listed, in order; layer None is that of the run's SAE."""
        if isinstance(self.latents, dict):
            lists = {k: v for k, v in self.latents.items() if isinstance(v, list)}
            return [(layer, latent) for layer, latents in lists.items() for latent in latents]
        return [(None, latent) for latent in self.latents] if _is_list(self.latents) else []

    def _check_controls(self) -> None:
        at_least("intervention.n_curve_controls", self.n_curve_controls, 0)
        if not self.control_kinds:
            raise ConfigError(
                "intervention.control_kinds is empty; choose from "
                f"{', '.join(CONTROL_KINDS)}, or type intervention.n_controls=0 for no controls"
            )
        for kind in self.control_kinds:
            one_of("intervention.control_kinds", kind, CONTROL_KINDS)
        self.control_kinds = [k for k in CONTROL_KINDS if k in self.control_kinds]
        for key in ("frequency_caliper", "kl_caliper"):
            value = getattr(self, key)
            if not 1 < value < float("inf"):
                raise ConfigError(
                    f"intervention.{key}={value} is not a factor above 1; type e.g. "
                    f"intervention.{key}={2.0 if key == 'frequency_caliper' else 1.1}"
                )

    def _check_latents(self) -> None:
        if isinstance(self.latents, dict):
            if self.latents and all(str(k).isdecimal() for k in self.latents):
                self.latents = {int(k): v for k, v in self.latents.items()}
            wrong = not self.latents or not all(isinstance(k, int) for k in self.latents)
            wrong |= not all(v == SELECTED or _is_list(v) for v in self.latents.values())
        else:
            wrong = self.latents not in (SELECTED, PER_LAYER) and not _is_list(self.latents)
        if wrong:
            raise ConfigError(
                f"intervention.latents={self.latents} contains no latents; type selected, a list "
                "such as '[1234,77]', or latents by layer, '{1:[12,77],2:selected}'"
            )
        if not self.by_layer:
            return
        if self.directions != ["latents"]:
            raise ConfigError(
                f"intervention.latents={self.latents} are latents of several layers, which need "
                f"'intervention.directions=[latents]', not {self.directions}"
            )
        if self.latents == PER_LAYER and self.layers is None:
            raise ConfigError(
                f"intervention.latents={PER_LAYER} needs layers; type 'intervention.layers=[1,2]', "
                "or all"
            )
        if isinstance(self.latents, dict) and self.layers is not None:
            raise ConfigError(
                f"intervention.latents={self.latents} lists its own layers; leave out "
                "intervention.layers"
            )
        if self.name in ("splice", "patch"):
            raise ConfigError(
                f"intervention={self.name} changes no latents; leave out intervention.latents"
            )

    def _check_values(self) -> None:
        if self.values is None:
            return
        n = len(self._listed())
        if len(self.values) != n:
            raise ConfigError(
                f"intervention.values has {len(self.values)} targets for {n} listed latents; "
                "list as many in intervention.latents"
            )
        if isinstance(self.latents, dict) and SELECTED in self.latents.values():
            raise ConfigError(
                "intervention.values sets the targets of listed latents, but intervention.latents="
                f"{self.latents} leaves some to be selected; list them all"
            )


def _default_of(kind: type, name: str) -> Any:
    """The default of a field of a dataclass."""
    [one] = [f for f in fields(kind) if f.name == name]
    if one.default is not NO_DEFAULT:
        return one.default
    assert one.default_factory is not NO_DEFAULT, f"{name} has no default"
    return one.default_factory()


def _is_list(value: Any) -> bool:
    """Whether a value is a list of latent indices."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
