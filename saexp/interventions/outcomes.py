"""Outcomes that are measured under an intervention; registry kind `outcome`.

By `source`: `text` outcomes score a generation, `next` outcomes read the logits after the prompt,
`phrases` outcomes the probability that given phrases follow it, `cost` outcomes are measured on
neutral text, `heads` outcomes on attention. By `kind`: a `rate` is
true or false per prompt, a `mean` is a number."""

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.data import Example
from saexp.data.tables import text_lines
from saexp.data.tokenization import PositionNotFound, answer_text, answer_token, foil_of
from saexp.digests import code_digest
from saexp.interventions.cached_generation import LogitReader, read_logits
from saexp.interventions.results_cache import ResultCache
from saexp.interventions.stream_edits import Row, SAEs
from saexp.labeling.matchers import is_correct
from saexp.models.loading import LanguageModel
from saexp.registry import resolve

_ASSETS = Path(__file__).parent.parent / "assets"
PATTERNS = _ASSETS / "refusal_patterns.txt"
HEDGES = _ASSETS / "hedging_patterns.txt"
DONT_KNOW = ("I don't know", "I do not know", "I'm not sure", "I am not sure")
"""Phrases of the outcome `dont_know`."""
KNOWS = "Are you sure you know the {entity_type} {entity}? Answer yes or no."
"""Self-knowledge question of Ferrando et al. 2024, section 5."""
_NGRAM = 3


def read_patterns(path: Path = PATTERNS) -> list[re.Pattern[str]]:
    """One regular expression per line; lines that begin with # are comments."""
    lines = [line for line in text_lines(path) if line.strip() and not line.startswith("#")]
    return [re.compile(line, re.IGNORECASE) for line in lines]


class _Patterns:
    """Base of outcomes that are true where a regular expression of a file matches."""

    name, kind, source = "", "rate", "text"
    file = PATTERNS

    def __init__(self) -> None:
        self.patterns = read_patterns(self.file)

    def score(self, generated: str, example: Example, tokens: Sequence[int] = ()) -> bool:  # noqa: ARG002
        """True for a match; the entity's name is removed first, as it may contain such words."""
        text = generated.replace("\u2019", "'")
        if example.entity:
            name = example.entity.replace("\u2019", "'")
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "it", text)
        return any(p.search(text) for p in self.patterns)


class Refusal(_Patterns):
    """Whether the model refuses, for example by saying that it does not know."""

    name = "refusal"


class Hedging(_Patterns):
    """Whether the model hedges its answer ("perhaps", "I think", "it may have been")."""

    name, file = "hedging", HEDGES


class Accuracy:
    """Whether the generation contains a correct answer, by `labeling.matchers`."""

    name, kind, source = "accuracy", "rate", "text"
    reads_answers = True

    def score(self, generated: str, example: Example, tokens: Sequence[int] = ()) -> bool | None:  # noqa: ARG002
        """None where the example has no answer."""
        if not example.answers:
            return None
        attribute = example.extra.get("attribute")
        return is_correct(
            generated,
            list(example.answers),
            entity_type=example.entity_type,
            attribute=None if attribute is None else str(attribute),
            question=example.question,
            entity=example.entity,
        )


class ExactMatch:
    """Whether the generation begins with the answer as whole words, ignoring white space."""

    name, kind, source = "exact_match", "rate", "text"
    reads_answers = True
    lacking = "have no answer, or one that intervention.max_new_tokens cuts off"
    max_new_tokens: int | None = None

    def prepare(self, tokenizer: Any, max_new_tokens: int) -> None:  # noqa: ARG002
        """Called by the causal test with the maximum length of a generation."""
        self.max_new_tokens = max_new_tokens

    def score(self, generated: str, example: Example, tokens: Sequence[int] = ()) -> bool | None:
        """None where the example has no answer, or where the text is cut off within one."""
        text = " ".join(generated.split())
        answers = [" ".join(answer.split()) for answer in example.answers if answer.strip()]
        patterns = (rf"{re.escape(x)}(?!\w)" if x[-1].isalnum() else re.escape(x) for x in answers)
        if any(re.match(pattern, text) for pattern in patterns):
            return True
        cut_off = len(tokens) == self.max_new_tokens and any(x.startswith(text) for x in answers)
        return None if cut_off or not answers else False


class MatchingTokens:
    """Number of leading tokens of the generation that match the start of the best answer."""

    name, kind, source = "matching_tokens", "mean", "text"
    reads_answers = True
    _tokenizer: Any = None

    def prepare(self, tokenizer: Any, max_new_tokens: int) -> None:  # noqa: ARG002
        """Called by the causal test with the tokenizer."""
        self._tokenizer = tokenizer

    def score(self, generated: str, example: Example, tokens: Sequence[int] = ()) -> float | None:  # noqa: ARG002
        """None where the example has no answer. Leading white space is ignored."""
        answers = [answer.lstrip() for answer in example.answers if answer.strip()]
        if not answers:
            return None

        def text(n: int) -> str:
            decoded = self._tokenizer.decode(
                list(tokens[:n]), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return decoded.lstrip()

        shared = max(len(commonprefix([answer, text(len(tokens))])) for answer in answers)
        if not shared:
            return 0.0
        # The text only grows with the number of tokens, except for incomplete characters.
        n = bisect_right(range(len(tokens) + 1), shared, key=lambda n: len(text(n))) - 1
        return float(n)


class Repetition:
    """Fraction of the generation's token 3-grams that occurred in it before."""

    name, kind, source = "repetition", "mean", "text"

    def score(self, generated: str, example: Example, tokens: Sequence[int] = ()) -> float:  # noqa: ARG002
        """0 where no 3-gram is repeated, or there is none."""
        grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
        return 1 - len(Counter(grams)) / len(grams) if grams else 0.0


class Length:
    """Number of generated tokens without the end token."""

    name, kind, source = "length", "mean", "text"

    def score(self, generated: str, example: Example, tokens: Sequence[int] = ()) -> float:  # noqa: ARG002
        """Number of tokens."""
        return float(len(tokens))


class Perplexity:
    """exp of the mean loss of the generation under the model without intervention."""

    name, kind, source = "perplexity", "mean", "text"

    def score(self, generated: str, example: Example, tokens: Sequence[int] = ()) -> float | None:  # noqa: ARG002
        """The causal test computes it; None where nothing was generated."""
        return None


class NextToken(ABC):
    """Base of outcomes that are read from the logits after the prompt."""

    name, kind, source = "", "mean", "next"
    reads_answers = False
    """Whether `tokens` depend on the example's answers."""

    def prompt(self, example: Example) -> Example:
        """The prompt: the example's own, unless the outcome asks a question."""
        return example

    @abstractmethod
    def tokens(self, example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
        """(tokens for, tokens against); PositionNotFound is raised where the example has none."""

    @abstractmethod
    def value(
        self, logits: Float[Tensor, " V"], first: Sequence[int], second: Sequence[int]
    ) -> float:
        """The outcome from next-token logits."""


def reader_kind(outcome: Any) -> str | None:
    """Cache key of the values that an outcome reads from logits: its name, code and attributes.

    The compared tokens are part of the row. None for code that is not in a file, whose values are
    not cached.
    """
    code = code_digest(type(outcome))
    return None if code is None else repr((outcome.name, code, sorted(vars(outcome).items())))


class _Answer(NextToken):
    """Base of outcomes of the answer's first token alone."""

    reads_answers = True

    def value(
        self,
        logits: Float[Tensor, " V"],
        first: Sequence[int],
        second: Sequence[int],  # noqa: ARG002
    ) -> float:
        return self.read(logits, first[0])

    def read(self, logits: Float[Tensor, " V"], token: int) -> float:
        """The outcome from next-token logits and that token; by default its logit."""
        return float(logits[token])

    def tokens(self, example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
        if not example.answers:
            raise PositionNotFound("no answer")
        return [answer_token(tokenizer, example, example.answers[0])], []


class AnswerProbability(_Answer):
    """Probability of the answer's first token."""

    name = "answer_probability"

    def read(self, logits: Float[Tensor, " V"], token: int) -> float:
        return float(logits.softmax(-1)[token])


class AnswerLogit(_Answer):
    """Logit of the answer's first token."""

    name = "answer_logit"


class AnswerRank(_Answer):
    """Rank of the answer's first token; 0 for the most likely token."""

    name = "answer_rank"

    def read(self, logits: Float[Tensor, " V"], token: int) -> float:
        return float((logits > logits[token]).sum())


class LogitDifference(_Answer):
    """Logit of the answer's first token minus the foil's (the data set's column `foil`)."""

    name = "logit_difference"

    def tokens(self, example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
        foil = foil_of(example)
        if foil is None:
            raise PositionNotFound("no foil")
        first, _ = super().tokens(example, tokenizer)
        second = [answer_token(tokenizer, example, foil, "foil")]
        if first == second:
            raise PositionNotFound("answer and foil begin with one token")
        return first, second

    def value(
        self, logits: Float[Tensor, " V"], first: Sequence[int], second: Sequence[int]
    ) -> float:
        return float(logits[first[0]] - logits[second[0]])


class YesNo(NextToken):
    """Log-odds of yes against no after a question about the entity, over their spellings.

    logsumexp of the logits of the first tokens of Yes, yes, " Yes", " yes", minus the same of no.
    """

    name = "yes_no"

    def prompt(self, example: Example) -> Example:
        if not example.entity:
            raise PositionNotFound("no entity to ask about")
        text = KNOWS.format(entity=example.entity, entity_type=example.entity_type or "entity")
        return replace(example, prompt=text).as_prompt()

    def tokens(self, example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:  # noqa: ARG002
        words = (("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no"))
        yes, no = (
            {tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in spelled}
            for spelled in words
        )
        shared = yes & no
        if yes <= shared or no <= shared:
            raise PositionNotFound("yes and no begin with one token in this vocabulary")
        return sorted(yes - shared), sorted(no - shared)

    def value(
        self, logits: Float[Tensor, " V"], first: Sequence[int], second: Sequence[int]
    ) -> float:
        return float(logits[list(first)].logsumexp(0) - logits[list(second)].logsumexp(0))


class DontKnow:
    """Log-probability, in nats, that the answer begins with "I don't know" or a similar phrase.

    The probability is the sum over `phrases`, which exclude each other.
    """

    name, kind, source = "dont_know", "mean", "phrases"
    phrases = DONT_KNOW


class NeutralKL:
    """Cost: KL(unedited || edited) per token of neutral text; every token or the weights edited."""

    name, kind, source = "neutral_kl", "mean", "cost"


class Attention:
    """Attention from the last token to the entity, per layer and head, summed over its tokens."""

    name, kind, source = "attention", "mean", "heads"


def outcome_objects(names: Sequence[str]) -> list[Any]:
    """The registered outcomes of these names."""
    return [resolve("outcome", name)() for name in names]


def tested_kinds(outcomes: Sequence[Any]) -> dict[str, str]:
    """Name -> kind of the outcomes with a number per prompt, whose effects are tested."""
    return {o.name: o.kind for o in outcomes if o.source in ("text", "next", "phrases")}


def has_value(outcome: Any, example: Example, tokenizer: Any) -> bool:
    """Whether an outcome can be measured on this prompt, as far as the prompt itself says.

    An outcome that compares with the answer (`reads_answers`) needs one, and one that asks about
    the entity needs an entity. Outcomes on neutral text (`cost`) have a value on no prompt.
    """
    if outcome.source == "next":
        try:
            outcome.prompt(example)
            outcome.tokens(example, tokenizer)
        except PositionNotFound:
            return False
        return True
    reads_answers = getattr(outcome, "reads_answers", False)
    return outcome.source != "cost" and (bool(example.answers) or not reads_answers)


def rounding_notes(outcomes: Sequence[Any], dtype: torch.dtype) -> list[str]:
    """A note where outcomes are read from logits in 16 bits, on their rounding."""
    names = [o.name for o in outcomes if o.source in ("next", "phrases")]
    if not names or dtype not in (torch.bfloat16, torch.float16):
        return []
    verb = "is" if len(names) == 1 else "are"
    step = 16 * torch.finfo(dtype).eps
    return [
        f"{' and '.join(names)} {verb} read from logits in {str(dtype).removeprefix('torch.')}, "
        f"which has steps of {step:g} between 16 and 32: a smaller change of a single prompt may "
        "be rounding; dtype=float32 is finer"
    ]


def mean_loss(logits: Float[Tensor, "n V"], ids: Sequence[int]) -> np.ndarray:
    """Mean negative log-likelihood, nats, of `ids` under the logits before each of them."""
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(list(ids), device=logits.device))
    return np.asarray([float(loss)])


def phrase_tokens(
    tokenizer: Any, example: Example, phrases: Sequence[str]
) -> list[tuple[int, ...]]:
    """The tokens of each phrase after `example.text`, a space between them where one belongs.

    A phrase whose tokens begin with those of another one is left out, so that the phrases exclude
    each other. Raises PositionNotFound where a phrase merges with the prompt's last token.
    """
    options = {"add_special_tokens": False}
    before = list(tokenizer(example.text, **options)["input_ids"])
    tokens: list[tuple[int, ...]] = []
    for phrase in phrases:
        whole = list(tokenizer(example.text + answer_text(example, phrase), **options)["input_ids"])
        if whole[: len(before)] != before or len(whole) == len(before):
            raise PositionNotFound(f"'{phrase}' merges with the prompt's last token")
        tokens.append(tuple(whole[len(before) :]))
    tokens = list(dict.fromkeys(tokens))
    return [t for t in tokens if not any(t != u and t[: len(u)] == u for u in tokens)]


def phrase_log_probabilities(
    model: LanguageModel,
    saes: SAEs,
    rows: Sequence[Row],
    phrases: Sequence[Sequence[tuple[int, ...]]],
    *,
    batch_tokens: int,
    cache: ResultCache | None,
    label: str,
) -> list[float]:
    """Per row the natural logarithm of the probability that one of its phrases follows.

    `phrases[i]` are token sequences of which none begins with another, so that their probabilities
    add up. Under a row's operations, tokens of a phrase count as generated ones.
    """
    wholes = [
        replace(row.followed_by(ids), sample=None, generated=False, about=(len(ids),))
        for row, some in zip(rows, phrases, strict=True)
        for ids in some
    ]
    reader = LogitReader(
        _log_probability, "log-probability of the last tokens", lambda r: r.about[0] + 1, label
    )
    values = read_logits(model, wholes, saes, reader, batch_tokens=batch_tokens, cache=cache)
    logs = iter(float(value[0]) for value in values)
    return [float(np.logaddexp.reduce([next(logs) for _ in some])) for some in phrases]


def _log_probability(row: Row, logits: Float[Tensor, "n V"]) -> np.ndarray:
    """Of the row's last tokens, from the logits before each of them."""
    ids = torch.tensor(row.ids[-row.about[0] :], device=logits.device)
    logs = logits[:-1].log_softmax(-1).gather(1, ids[:, None])
    return np.asarray([float(logs.double().sum())])


def constant_rate_notes(effects: pd.DataFrame, kinds: Mapping[str, str]) -> list[str]:
    """A note per rate that is constant over all prompts and conditions, and so uninformative."""
    notes = []
    for name in (name for name, kind in kinds.items() if kind == "rate"):
        values = effects[name].dropna()
        if len(values) > 1 and values.nunique() == 1:
            notes.append(
                f"{name.replace('_', ' ')} is {int(values.iloc[0])} on every prompt with and "
                "without intervention, so it is uninformative: use prompts on which it differs, or "
                "choose other intervention.outcomes"
            )
    return notes


def direction_of_set(direction: str) -> str:
    """The direction that a condition counts towards: a latent of no group counts to `latents`."""
    return "latents" if direction == "latent" else direction


def metric_names(conditions: Iterable[tuple[str, str, str, str]]) -> dict[str, str]:
    """Condition -> its name in metrics, from (condition, role, direction, latents) of all in order.

    Single latents are numbered per direction in their order, which is by rank where the analyzer
    selects them: a metric's name must not depend on which these are. A patch at the only location
    of its direction is named without it.

    >>> metric_names([("known_154", "single", "known", "154"), ("known_7", "single", "known", "7")])
    {'known_154': 'known_top1', 'known_7': 'known_top2'}
    """
    described = list(conditions)
    patches = Counter(d for name, _, d, _ in described if name.startswith(f"{d}_patch_"))
    n_singles: Counter[str] = Counter()
    names = {}
    for name, _, direction, latents in described:
        names[name] = name
        if name == f"{direction}_{latents}":
            counted = direction_of_set(direction)
            n_singles[counted] += 1
            names[name] = f"{counted}_top{n_singles[counted]}"
        elif name.startswith(f"{direction}_patch_") and patches[direction] == 1:
            names[name] = f"{direction}_patch"
    return names
