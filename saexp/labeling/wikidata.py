"""Published entity and query files, and entities fetched from Wikidata."""

import json
import logging
import re
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import WikidataConfig
from saexp.data.datasets import TEXT_TEMPLATE, filled, finish
from saexp.data.examples import Example, ExampleSet, MissingValues, Skip, find_mentions, skip_notes
from saexp.data.tables import check_characters, may_hold_surrogates, open_text
from saexp.errors import ConfigError, DataError
from saexp.files import write_json
from saexp.labeling.matchers import Rules, canonical, is_correct
from saexp.labeling.quantities import year
from saexp.labeling.questions import (
    DROPPED,
    Thresholds,
    entity_groups,
    pick,
    read_attributes,
    truths_of,
)

log = logging.getLogger(__name__)


ENDPOINT = "https://query.wikidata.org/sparql"
AGENT = "saexp (sparse-autoencoder experiments; urllib)"

KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "player": (
        "?item wdt:P106 ?kind . VALUES ?kind { wd:Q937857 wd:Q3665646 wd:Q10871364 wd:Q10833314 }",
        {"birthplace": "P19", "birth_year": "P569", "teams": "P54"},
    ),
    "movie": (
        "?item wdt:P31 wd:Q11424 .",
        {
            "director": "P57",
            "screenwriter": "P58",
            "cast": "P161",
            "genre": "P136",
            "release_year": "P577",
            "duration": "P2047",
        },
    ),
    "city": (
        "?item wdt:P31/wdt:P279* wd:Q515 .",
        {"country": "P17", "population": "P1082", "elevation": "P2044", "coordinates": "P625"},
    ),
    "song": (
        "?item wdt:P31 ?kind . VALUES ?kind { wd:Q7366 wd:Q134556 wd:Q105543609 }",
        {"performer": "P175", "album": "P361", "year": "P577", "genre": "P136"},
    ),
}
"""Entity type -> (pattern of its items, attribute -> property)."""

_YEARS = ("birth_year", "release_year", "year")
_NO_LABEL = re.compile(r"Q\d+")


def sparql(entity_type: str, n: int, min_sitelinks: int) -> str:
    """The query: `n` items with at least so many Wikipedia pages, one row per attribute value."""
    if entity_type not in KINDS:
        raise ConfigError(f"fetch={entity_type}: the types are {', '.join(KINDS)}")
    pattern, properties = KINDS[entity_type]
    values = " ".join(f'(wdt:{p} "{name}")' for name, p in properties.items())
    return (
        "SELECT ?item ?itemLabel ?attribute ?value ?valueLabel WHERE {\n"
        f"  {{ SELECT DISTINCT ?item WHERE {{ {pattern} ?item wikibase:sitelinks ?links . "
        f"FILTER(?links >= {int(min_sitelinks)}) }} LIMIT {int(n)} }}\n"
        f"  VALUES (?property ?attribute) {{ {values} }}\n"
        "  ?item ?property ?value .\n"
        '  SERVICE wikibase:label { bd:serviceParam wikibase:language "en" . }\n}'
    )


def fetch_entities(
    entity_type: str,
    n: int = 200,
    *,
    endpoint: str = ENDPOINT,
    min_sitelinks: int = 20,
    timeout: int | float = 60,
) -> tuple[list[dict[str, Any]], int]:
    """Entities in the published format, and how many items had no English name.

    Raises DataError, in one line, where the endpoint does not answer as it should.
    """
    answer = ask(sparql(entity_type, n, min_sitelinks), endpoint, timeout)
    return to_entities(answer, entity_type, endpoint)


def ask(query: str, endpoint: str, timeout: int | float) -> Any:
    """The parsed JSON answer of a SPARQL endpoint (POST, so that long queries fit)."""
    if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError(f"endpoint={endpoint} is no http address")
    request = urllib.request.Request(
        endpoint,
        data=urllib.parse.urlencode({"query": query, "format": "json"}).encode(),
        headers={"Accept": "application/sparql-results+json", "User-Agent": AGENT},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        wait = error.headers.get("Retry-After") if error.headers else None
        error.close()
        after = f"; ask again after {wait} s" if wait else ""
        raise DataError(f"{endpoint}: answered {error.code} {error.reason}{after}") from error
    except TimeoutError as error:
        raise DataError(_late(endpoint, timeout)) from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise DataError(_late(endpoint, timeout)) from error
        raise DataError(f"{endpoint}: is not in reach ({reason})") from error
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{endpoint}: its answer is no JSON ({error})") from error


def _late(endpoint: str, timeout: int | float) -> str:
    return f"{endpoint}: no answer within {timeout:g} s; set a longer timeout, or a smaller n"


def to_entities(answer: Any, entity_type: str, where: str) -> tuple[list[dict[str, Any]], int]:
    """Rows of a SPARQL JSON answer, gathered per item; values of one attribute become a list."""
    try:
        rows = answer["results"]["bindings"]
        cells = [
            {name: (cell["type"], cell["value"]) for name, cell in row.items()} for row in rows
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: its answer has no results.bindings of SPARQL JSON") from error
    items: dict[str, dict[str, Any]] = {}
    unnamed: set[str] = set()
    for row in cells:
        missing = [v for v in ("item", "itemLabel", "attribute", "value") if v not in row]
        if missing:
            raise DataError(f"{where}: a row of its answer has no ?{missing[0]}")
        item, name = row["item"][1], row["itemLabel"][1]
        if _NO_LABEL.fullmatch(name):
            unnamed.add(item)
            continue
        attribute = row["attribute"][1]
        value = _value(attribute, row)
        if value is None:
            continue
        found = items.setdefault(item, {"name": name, "values": {}})
        kept = found["values"].setdefault(attribute, [])
        if value not in kept:
            kept.append(value)
    entities = [
        {
            "entity": found["name"],
            "entity_type": entity_type,
            "attributes": [
                {"attribute_type": a, "attribute_value": v[0] if len(v) == 1 else v}
                for a, v in found["values"].items()
            ],
        }
        for found in items.values()
    ]
    if not entities:
        raise DataError(f"{where}: no {entity_type} with an English name in its answer")
    return entities, len(unnamed)


def _value(attribute: str, row: Mapping[str, tuple[str, str]]) -> Any:
    """A cell's value: a label for an item, a year for a date, text for the rest."""
    kind, text = row["value"]
    if kind == "bnode":
        return None
    if kind == "uri":
        label = row.get("valueLabel", ("", ""))[1]
        return None if not label or _NO_LABEL.fullmatch(label) else label
    if attribute in _YEARS:
        found = year(text)
        return None if found is None else int(found)
    return text


QUERY_FIELDS = ("entity", "entity_type", "prompt_type", "correct_answer", "prompt")

Row = tuple[str, dict[str, Any]]
"""(file and line or index, columns)."""


def wikidata(cfg: WikidataConfig, **_: Any) -> ExampleSet:
    """One example per entity of a file, or of a folder's .json and .jsonl files.

    Entity files give the attributes (for task=label). Query files with sampled labels give the
    groups, by the rule of `Thresholds`; their entities have one of their questions as prompt, a
    seeded choice that does not depend on the labels. Entities that are neither known nor unknown
    are dropped; how many is noted.
    """
    if cfg.fetch:
        _fetch(cfg)
    if not cfg.path:
        raise ConfigError("dataset=wikidata needs a file or folder: type dataset.path=…")
    entities: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    queries: list[dict[str, Any]] = []
    missing = MissingValues(cfg.missing_values)
    n_rows, skips = 0, []
    for where, published in read_published(cfg.path):
        row = missing.cleaned(published)
        n_rows += 1
        nameless = [c for c in ("entity_type", "entity") if c in row and row[c] is None]
        if nameless:
            skips.append(Skip(where, f"{nameless[0]} is empty or a missing value"))
            continue
        key = (_text(where, row, "entity_type"), _text(where, row, "entity"))
        if "attributes" in row:
            pairs = entities.setdefault(key, [])
            try:
                pairs += [p for p in read_attributes(row["attributes"] or []) if p not in pairs]
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error
        else:
            queries.append(_query(where, row))
    names = dict.fromkeys([*entities, *((q["entity_type"], q["entity"]) for q in queries)])
    of_query = _chosen_query(queries, cfg.seed)
    groups = _groups(queries, cfg)
    examples = []
    for entity_type, entity in names:
        group = groups.get((entity_type, entity))
        if group == DROPPED:
            continue
        named = {"entity": entity, "entity_type": entity_type}
        text = filled("dataset.template", cfg.template or TEXT_TEMPLATE, named)
        spans = find_mentions(text, entity)
        if not spans:
            raise ConfigError(f"dataset.template={cfg.template}: has no {{entity}} in it")
        asked = of_query.get((entity_type, entity))
        prompt = asked["prompt"] if asked else None
        if cfg.prompt_template:
            prompt = filled("dataset.prompt_template", cfg.prompt_template, named)
        extra: dict[str, Any] = {}
        if (entity_type, entity) in entities:
            extra["attributes"] = [
                {"attribute_type": a, "attribute_value": v}
                for a, v in entities[entity_type, entity]
            ]
        if asked and not cfg.prompt_template:
            extra["attribute"] = asked["attribute"]
        examples.append(
            Example(
                id=f"{entity_type}/{entity}",
                text=text,
                group=group,
                spans=spans,
                entity=entity,
                entity_type=entity_type,
                prompt=prompt,
                answers=asked["truths"] if asked and not cfg.prompt_template else (),
                extra=extra,
            )
        )
    if not examples:
        left_out = f" ({skips[0].reason} in {len(skips)} rows)" if skips else ""
        raise DataError(f"{cfg.path}: no entity is known or unknown by its labels{left_out}")
    made = finish(
        cfg, examples, cfg.path, [*missing.notes(n_rows), *skip_notes(skips, n_rows, "row")]
    )
    dropped = sum(group == DROPPED for group in groups.values())
    if dropped:
        made.notes.append(
            f"{dropped} of {len(groups)} labelled entities are neither known nor unknown, so they "
            "are left out"
        )
    return made


def _fetch(cfg: WikidataConfig) -> None:
    """Write freshly fetched entities to `dataset.path`, unless the file is there.

    Beside the file stands what was asked for. Raises ConfigError where that is not what is asked
    for now.
    """
    if not cfg.path or Path(cfg.path).is_dir():
        raise ConfigError("dataset.fetch needs a file to write: type dataset.path=FILE")
    file = Path(cfg.path)
    types = [cfg.fetch] if isinstance(cfg.fetch, str) else list(cfg.fetch)
    asked = {n: getattr(cfg, n) for n in ("n_fetched", "min_sitelinks", "endpoint")}
    query = {
        "fetch": types,
        **asked,
        "queries": [sparql(t, cfg.n_fetched, cfg.min_sitelinks) for t in types],
    }
    beside = file.with_name(f"{file.name}.query")
    if file.exists():
        _check_fetched(file, beside, query)
        log.info("%s is there already, so nothing is fetched", file)
        return
    found: list[dict[str, Any]] = []
    for entity_type in types:
        some, unnamed = fetch_entities(
            entity_type,
            cfg.n_fetched,
            endpoint=cfg.endpoint,
            min_sitelinks=cfg.min_sitelinks,
            timeout=cfg.timeout,
        )
        log.info("fetched %d of type %s; %d without a name", len(some), entity_type, unnamed)
        found += some
    # The query first: a file without one counts as the user's own.
    for path, content in ((beside, query), (file, found)):
        write_json(path, content, option="dataset.path=")


def _check_fetched(file: Path, beside: Path, query: Mapping[str, Any]) -> None:
    """Raise ConfigError for a file that another query fetched; one without a query is kept."""
    try:
        made_by = json.loads(beside.read_text("utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        made_by = None
    if not isinstance(made_by, dict):
        log.warning("%s is damaged: what fetched dataset.path=%s is not known", beside, file)
        return
    if made_by == query:
        return
    option = next((n for n in query if made_by.get(n) != query[n]), "query")
    raise ConfigError(
        f"dataset.path={file} was fetched with {option}={made_by.get(option)}, not "
        f"{query.get(option)}; delete it to fetch anew, or type another dataset.path="
    )


def read_published(path: str) -> Iterator[Row]:
    """Rows of .json lists and .jsonl files with where each stands. Raises DataError."""
    place = Path(path)
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix in (".json", ".jsonl"))
    else:
        files = [place]
    if not files or not all(f.is_file() for f in files):
        raise DataError(f"dataset.path={path}: no such file, nor a folder with .json files")
    for file in files:
        with open_text(file) as opened:
            text = opened.read()
        escaped = may_hold_surrogates(text)
        for where, row in _lines(file, text) if _is_lines(file, text) else _list(file, text):
            if escaped:
                check_characters(where, row)
            yield where, row


def _is_lines(file: Path, text: str) -> bool:
    return file.suffix == ".jsonl" or not text.lstrip().startswith("[")


def _lines(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: is no JSON ({error.msg})") from error
            yield where, _object(where, row)


def _list(file: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: is no JSON ({error.msg})") from error
    for index, row in enumerate(rows):
        yield f"{file}[{index}]", _object(f"{file}[{index}]", row)


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, not {type(row).__name__}")
    if "attributes" not in row:
        missing = [f for f in QUERY_FIELDS if f not in row]
        if missing:
            raise DataError(
                f"{where}: is neither an entity (entity, entity_type, attributes) nor a query "
                f"('{missing[0]}' is missing)"
            )
    return row


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: '{name}' must be a text, neither empty nor a missing value")
    return value


def _query(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A query with its truths, and the number of right samples (None where it has none).

    Samples without labels are judged here.
    """
    entity_type, entity = _text(where, row, "entity_type"), _text(where, row, "entity")
    attribute = canonical(_text(where, row, "prompt_type"), entity_type)
    truths = truths_of(row["correct_answer"], attribute)
    prompt = row.get("question") or _text(where, row, "prompt")
    if not isinstance(prompt, str):
        raise DataError(f"{where}: 'question' must be a text")
    labels = row.get("string_matching_sampled_labels") or []
    samples = row.get("sampled_completions") or []
    if not isinstance(labels, list) or not isinstance(samples, list):
        raise DataError(f"{where}: sampled completions and their labels must be lists")
    if labels:
        n_correct = sum(str(x).lower() in ("correct", "true", "1") for x in labels)
    elif samples:
        rules, named = Rules(), {"question": prompt, "entity": entity}
        answers = [str(sample) for sample in samples if sample is not None]
        n_correct = sum(
            is_correct(a, truths, entity_type, attribute, rules, **named) for a in answers
        )
    else:
        n_correct = None
    return {
        "entity": entity,
        "entity_type": entity_type,
        "attribute": attribute,
        "truths": truths,
        "prompt": prompt,
        "n_correct": n_correct,
    }


def _chosen_query(
    queries: list[dict[str, Any]], seed: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """Per entity one of its queries, whether its answer is known or not."""
    of_entity: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for query in queries:
        of_entity.setdefault((query["entity_type"], query["entity"]), []).append(query)
    return {key: some[pick(seed, *key, n=len(some))] for key, some in of_entity.items()}


def _groups(queries: list[dict[str, Any]], cfg: WikidataConfig) -> dict[tuple[str, str], str]:
    thresholds = Thresholds(cfg.min_correct, cfg.min_known, cfg.max_unknown)
    judged = [q for q in queries if q["n_correct"] is not None]
    if not judged:
        return {}
    # One attribute asked twice is one attribute.
    asked = pd.DataFrame(judged)[["entity", "entity_type", "attribute", "n_correct"]]
    asked = asked.groupby(["entity_type", "entity", "attribute"], sort=False).max().reset_index()
    table = entity_groups(asked, thresholds)
    counts = Counter(table["group"])
    log.info(
        "%d entities by their labels: %s; %d of %d queries have no sampled answers",
        len(table),
        ", ".join(f"{n} {group}" for group, n in sorted(counts.items())),
        len(queries) - len(judged),
        len(queries),
    )
    keys = zip(table["entity_type"].map(str), table["entity"].map(str), strict=True)
    return dict(zip(keys, table["group"].map(str), strict=True))
