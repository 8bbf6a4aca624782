"""Fresh entities by a SPARQL query, in the published entity format. Nothing here runs unasked.

Answers are read in the SPARQL 1.1 Query Results JSON Format (W3C).
"""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from saexp.data.quantities import year
from saexp.errors import ConfigError, DataError

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
