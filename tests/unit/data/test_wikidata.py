"""Published files read as they are, groups from their labels, and entities fetched by a query."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs

import pytest

import saexp
from saexp import registry
from saexp.config import WikidataConfig
from saexp.errors import ConfigError, DataError, SaexpError
from saexp.labeling import questions
from saexp.labeling.wikidata import (
    KINDS,
    ask,
    fetch_entities,
    read_published,
    sparql,
    to_entities,
    wikidata,
)

ENTITIES = [
    {
        "entity": name,
        "entity_type": "movie",
        "attributes": [
            {"attribute_type": "directors", "attribute_value": ["Some Director"]},
            {"attribute_type": "release_year", "attribute_value": 1994},
        ],
    }
    for name in ("First Film", "Second Film", "Third Film", "Fourth Film")
]


def query(entity, attribute, n_correct, n=10, **more):
    right = "Some Director" if attribute == "directors" else "1994"
    wrong = ["error"] * (n - n_correct - 1) + ["refusal"] * (n > n_correct)
    return {
        "entity": entity,
        "entity_type": "movie",
        "prompt_type": f"movie_{attribute}",
        "correct_answer": right,
        "prompt": f"<bos>user: {attribute} of {entity}?",
        "question": f"{attribute} of {entity}?",
        "greedy_completion": right,
        "sampled_completions": [right] * n_correct + ["no"] * (n - n_correct),
        "string_matching_greedy_label": "correct",
        "string_matching_sampled_labels": ["correct"] * n_correct + wrong,
        "label": "correct",
        **more,
    }


QUERIES = [
    query("First Film", "directors", 10),
    query("First Film", "release_year", 3),
    query("Second Film", "directors", 2),
    query("Second Film", "release_year", 0),
    query("Third Film", "directors", 9),
    query("Third Film", "release_year", 2),
]


def build(path, **options):
    cfg = WikidataConfig(name="wikidata", path=str(path) if path else None, **options)
    return registry.build("dataset", cfg)


def message_of(make, kind: type[SaexpError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture()
def folder(tmp_path):
    """Entities, and queries by attribute, as they are published."""
    (tmp_path / "queries").mkdir()
    (tmp_path / "movie.json").write_text(json.dumps(ENTITIES))
    for attribute in ("directors", "release_year"):
        attribute_queries = [q for q in QUERIES if q["prompt_type"].endswith(attribute)]
        file = tmp_path / "queries" / f"movie_{attribute}.json"
        file.write_text(json.dumps(attribute_queries))
    return tmp_path


def test_entity_files_alone_have_no_groups(folder):
    got = build(folder / "movie.json")
    assert got.groups == ()
    assert [e.entity for e in got.examples] == [e["entity"] for e in ENTITIES]
    first = got.examples[0]
    assert first.text == "The movie First Film"
    assert [first.text[a:b] for a, b in first.spans] == ["First Film"]
    assert first.extra["attributes"] == ENTITIES[0]["attributes"]
    assert first.group is None and first.prompt is None
    assert {e.split for e in got.examples} <= {"train", "val", "test"}


def test_labels_make_the_groups_and_what_is_neither_is_dropped(folder, caplog):
    with caplog.at_level("INFO"):
        got = build(folder)
    assert {e.entity: e.group for e in got.examples} == {
        "First Film": "known",
        "Second Film": "unknown",
    }
    assert got.groups == ("known", "unknown")
    assert "1 dropped, 1 known, 1 unknown" in caplog.text
    assert "0 of 6 queries have no sampled answers" in caplog.text
    known = got.examples[0]
    assert known.prompt in ("directors of First Film?", "release_year of First Film?")
    assert known.extra["attribute"] in ("director", "release_year")
    assert known.answers in (("Some Director",), ("1994",))


def test_json_lines_and_one_file_give_the_same(tmp_path):
    lines = tmp_path / "all.jsonl"
    lines.write_text("\n".join(map(json.dumps, QUERIES)) + "\n\n")
    whole = tmp_path / "all.json"
    whole.write_text(json.dumps(QUERIES))
    first, second = build(lines), build(whole)
    assert first.examples == second.examples
    assert [e.group for e in first.examples] == ["known", "unknown"]


def test_thresholds(folder):
    queries_folder = folder / "queries"
    assert message_of(lambda: build(queries_folder, min_correct=1)) == (
        f"{queries_folder}: all rows are of one group, known (2); a contrast needs two"
    )
    one = build(queries_folder, min_correct=1, max_unknown=1)
    assert [(e.entity, e.group) for e in one.examples][1] == ("Second Film", "unknown")
    loose = build(folder / "queries", min_correct=10, min_known=1)
    assert {e.entity: e.group for e in loose.examples} == {
        "First Film": "known",
        "Second Film": "unknown",
        "Third Film": "unknown",
    }


def test_samples_without_labels_are_judged_here(tmp_path):
    file = tmp_path / "q.json"
    rows = [{**q, "string_matching_sampled_labels": []} for q in QUERIES]
    file.write_text(json.dumps(rows))
    assert [(e.entity, e.group) for e in build(file).examples] == [
        ("First Film", "known"),
        ("Second Film", "unknown"),
    ]


def test_queries_not_answered_yet_have_no_groups(tmp_path):
    file = tmp_path / "q.json"
    empty = {"sampled_completions": [], "string_matching_sampled_labels": [], "question": None}
    file.write_text(json.dumps([{**q, **empty, "greedy_completion": None} for q in QUERIES]))
    got = build(file)
    assert got.groups == ()
    assert len(got.examples) == 3
    assert got.examples[0].prompt.startswith("<bos>user: ")


def test_the_prompt_does_not_depend_on_the_labels(tmp_path):
    def prompts(n_correct):
        rows = [
            query(f"Film {i}", a, n_correct if i % 2 else 0)
            for i in range(40)
            for a in ("directors", "release_year")
        ]
        file = tmp_path / f"{n_correct}.json"
        file.write_text(json.dumps(rows))
        return [e.prompt.partition(" ")[0] for e in build(file).examples]

    one = prompts(10)
    assert one == prompts(5)
    assert 10 < one.count("directors") < 30


def test_custom_templates_are_used(folder):
    got = build(folder, template="'{entity}' ({entity_type})", prompt_template="Who is {entity}?")
    assert got.examples[0].text == "'First Film' (movie)"
    assert got.examples[0].prompt == "Who is First Film?"
    assert got.examples[0].answers == ()
    message = message_of(lambda: build(folder, template="The film"), ConfigError)
    assert message == (
        "dataset.template=The film contains no {entity}; type e.g. 'The {entity_type} {entity}'"
    )


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("x", "must be an object, not str"),
        ({"entity": "A", "entity_type": "movie"}, "('prompt_type' is missing)"),
        ({**ENTITIES[0], "entity": " "}, "'entity' must be text"),
        ({**ENTITIES[0], "entity_type": 3}, "'entity_type' must be text"),
        ({**ENTITIES[0], "entity": "\ud83d"}, "holds half a character"),
        ({**ENTITIES[0], "attributes": [{"attribute_type": "x"}]}, "needs attribute_type and"),
        ({**QUERIES[0], "sampled_completions": "x"}, "must be lists"),
        ({**QUERIES[0], "question": None, "prompt": None}, "'prompt' must be text"),
    ],
)
def test_bad_rows_are_named_with_file_and_place(tmp_path, row, part):
    listed, lines = tmp_path / "bad.json", tmp_path / "bad.jsonl"
    listed.write_text(json.dumps([ENTITIES[0], row]))
    lines.write_text("\n".join(map(json.dumps, [ENTITIES[0], row])))
    for file, where in ((listed, f"{listed}[1]: "), (lines, f"{lines}:2: ")):
        message = message_of(lambda f=file: build(f))
        assert message.startswith(where)
        assert part in message


def test_files_that_cannot_be_read(tmp_path):
    assert message_of(lambda: build(None), ConfigError) == (
        "dataset=wikidata needs a file or folder: type dataset.path=FILE"
    )
    for path in (tmp_path, tmp_path / "absent.json"):
        assert message_of(lambda p=path: build(p)) == (
            f"dataset.path={path} is neither a file nor a folder with .json files"
        )
    broken = tmp_path / "b.json"
    broken.write_text('[\n{"entity": }]')
    assert message_of(lambda: build(broken)).startswith(f"{broken}:2: not valid JSON (")
    broken.write_text('{"entity": ')
    assert message_of(lambda: build(broken)).startswith(f"{broken}:1: not valid JSON (")
    broken.write_bytes(b'["\xe9"]')
    assert message_of(lambda: list(read_published(str(broken)))) == (
        f"{broken}: is not UTF-8 text (byte 2)"
    )


@pytest.mark.parametrize("nothing", [None, float("nan"), "NaN", "null", ""])
def test_missing_values_of_published_files(tmp_path, nothing):
    attributes = [
        {"attribute_type": "director", "attribute_value": nothing},
        {"attribute_type": "cast", "attribute_value": ["Ann Lee", nothing]},
        {"attribute_type": "coordinates", "attribute_value": [1.5, nothing]},
    ]
    film = {"entity": "Film Film", "entity_type": "movie", "attributes": attributes}
    row = query("Film Film", "directors", 3, correct_answer=nothing, question=nothing)
    row["sampled_completions"].append(nothing)
    file = tmp_path / "f.json"
    file.write_text(json.dumps([film, row, query("Other", "directors", 0)]))
    got = build(file, min_known=1)
    one = got.examples[0]
    assert (one.answers, one.prompt, one.group) == ((), row["prompt"], "known")
    asked, _ = questions([one])
    assert [(q.attribute, q.truths) for q in asked] == [("cast", ("Ann Lee",))]
    assert got.notes[0].startswith("missing values in 3 rows, by column: 'attributes' 1, ")
    assert "'correct_answer' 1" in got.notes[0] and "'question' 1" in got.notes[0]


@pytest.mark.parametrize("column", ["entity", "entity_type"])
@pytest.mark.parametrize("nothing", [None, float("nan"), "nan"])
def test_a_published_row_without_its_entity_is_a_counted_skip(tmp_path, column, nothing):
    file = tmp_path / "f.json"
    file.write_text(json.dumps([{**ENTITIES[0], column: nothing}, ENTITIES[1]]))
    got = build(file)
    assert [e.entity for e in got.examples] == [ENTITIES[1]["entity"]]
    assert got.notes[-1] == (f"1 of 2 rows was skipped: {column} is empty or a missing value (1)")
    file.write_text(json.dumps([{**ENTITIES[0], column: nothing}]))
    assert message_of(lambda: build(file)) == (
        f"{file}: no entity is labelled as known or unknown "
        f"({column} is empty or a missing value in 1 row)"
    )


@pytest.mark.parametrize(
    "attributes", [None, "NA", [{"attribute_type": None, "attribute_value": 1}]]
)
def test_attributes_that_are_missing_values_are_none(tmp_path, attributes):
    file = tmp_path / "f.json"
    file.write_text(json.dumps([{**ENTITIES[0], "attributes": attributes}]))
    (one,) = build(file).examples
    assert questions([one]) == ([], {"neither attributes nor a prompt": 1})
    assert build(file).notes[0].startswith("missing values in 1 rows, by column: 'attributes' 1")


def test_an_entity_that_is_called_as_a_missing_value_is(tmp_path):
    file = tmp_path / "f.json"
    file.write_text(json.dumps([{**ENTITIES[0], "entity": "None"}, ENTITIES[1]]))
    assert len(build(file).examples) == 1
    assert "dataset.missing_values sets" in build(file).notes[0]
    dataset = wikidata(WikidataConfig(name="wikidata", path=str(file), missing_values=["null"]))
    assert [e.entity for e in dataset.examples] == ["None", ENTITIES[1]["entity"]]


def test_every_mention_is_a_span(tmp_path):
    file = tmp_path / "f.json"
    file.write_text(json.dumps([{**ENTITIES[0], "entity": "Art"}]))
    got = build(file, template="Art: {entity} in Arthur's Art")
    assert got.examples[0].spans == ((0, 3), (5, 8), (21, 24))


def test_an_unknown_setting_is_refused(folder):
    words = ["dataset=wikidata", f"dataset.path={folder}", "dataset.min_corect=3"]
    assert message_of(lambda: saexp.compose(words), ConfigError).startswith(
        "no key 'dataset.min_corect'; did you mean dataset.min_correct, dataset.min_known"
    )


# --- fetching: a loopback server that answers as the SPARQL 1.1 results format says


def uri(n):
    return {"type": "uri", "value": f"http://www.wikidata.org/entity/Q{n}"}


def literal(text, **more):
    return {"type": "literal", "value": text, **more}


def binding(item, label, attribute, value, value_label=None):
    row = {
        "item": uri(item),
        "itemLabel": literal(label, **{"xml:lang": "en"}),
        "attribute": literal(attribute),
        "value": value,
    }
    return row if value_label is None else {**row, "valueLabel": literal(value_label)}


DATE = "http://www.w3.org/2001/XMLSchema#dateTime"
ANSWER = {
    "head": {"vars": ["item", "itemLabel", "attribute", "value", "valueLabel"]},
    "results": {
        "bindings": [
            binding(1, "First Film", "director", uri(10), "Ann Lee"),
            binding(1, "First Film", "director", uri(11), "Bo Li"),
            binding(1, "First Film", "director", uri(11), "Bo Li"),
            binding(
                1, "First Film", "release_year", literal("1994-05-12T00:00:00Z", datatype=DATE)
            ),
            binding(1, "First Film", "cast", uri(12), "Q12"),
            binding(1, "First Film", "screenwriter", {"type": "bnode", "value": "b0"}),
            binding(2, "Q2", "director", uri(10), "Ann Lee"),
            binding(3, "Second Film", "duration", literal("97")),
        ]
    },
}
EXPECTED = [
    {
        "entity": "First Film",
        "entity_type": "movie",
        "attributes": [
            {"attribute_type": "director", "attribute_value": ["Ann Lee", "Bo Li"]},
            {"attribute_type": "release_year", "attribute_value": 1994},
        ],
    },
    {
        "entity": "Second Film",
        "entity_type": "movie",
        "attributes": [{"attribute_type": "duration", "attribute_value": "97"}],
    },
]


@contextmanager
def endpoint(status=200, body=None, headers=(), wait=0.0):
    """(address, requests seen) of a server on the loopback interface."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            seen.append((dict(self.headers), parse_qs(self.rfile.read(length).decode())))
            time.sleep(wait)
            content = json.dumps(ANSWER).encode() if body is None else body
            try:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/sparql-results+json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/sparql", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_fetched_answer_is_in_the_published_format():
    with endpoint() as (address, seen):
        entities, unnamed = fetch_entities("movie", 7, endpoint=address, min_sitelinks=30)
    assert entities == EXPECTED
    assert unnamed == 1
    headers, form = seen[0]
    assert headers["Accept"] == "application/sparql-results+json"
    assert headers["User-Agent"].startswith("saexp")
    assert form["query"] == [sparql("movie", 7, 30)]
    assert "LIMIT 7" in form["query"][0] and ">= 30" in form["query"][0]


def test_fetching_writes_the_file_once_and_only_when_asked(tmp_path):
    file = tmp_path / "new" / "movies.json"
    with endpoint() as (address, seen):
        options = {"fetch": ["movie"], "endpoint": address, "n_fetched": 5}
        got = build(file, **options)
        assert [e.entity for e in got.examples] == ["First Film", "Second Film"]
        assert json.loads(file.read_text()) == EXPECTED
        build(file, **options)
        build(file, endpoint=address)
        assert len(seen) == 1
    message = message_of(lambda: build(tmp_path, fetch="movie"), ConfigError)
    assert message == "dataset.fetch needs a file to write: type dataset.path=FILE"


@pytest.mark.parametrize(
    ("change", "before"),
    [
        ({"n_fetched": 6}, "n_fetched=5, not 6"),
        ({"fetch": ["city"]}, "fetch=['movie'], not ['city']"),
        ({"min_sitelinks": 3}, "min_sitelinks=20, not 3"),
    ],
)
def test_a_file_that_another_query_fetched_is_not_taken_for_this_one(tmp_path, change, before):
    file = tmp_path / "movies.json"
    with endpoint() as (address, seen):
        options = {"fetch": ["movie"], "endpoint": address, "n_fetched": 5}
        build(file, **options)
        build(file, **{**options, "timeout": 3})
        message = message_of(lambda: build(file, **{**options, **change}), ConfigError)
        assert message.startswith(f"dataset.path={file} was fetched with {before}; delete the file")
        # Of a file that was not fetched nothing is known.
        (tmp_path / "movies.json.query").unlink()
        build(file, **{**options, **change})
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (
            {"status": 429, "headers": [("Retry-After", "30")]},
            "HTTP 429 Too Many Requests; try again after 30 s",
        ),
        ({"status": 500}, "HTTP 500 Internal Server Error"),
        ({"body": b"<html>"}, "the response is not valid JSON ("),
        ({"body": b"[1]"}, "the response is not SPARQL JSON (no results.bindings)"),
        (
            {"body": b'{"results": {"bindings": [{"x": {"type": "uri", "value": "y"}}]}}'},
            "a row of the response has no ?item",
        ),
        (
            {"body": b'{"results": {"bindings": []}}'},
            "the response has no movie with an English name",
        ),
    ],
)
def test_answers_that_are_none_are_one_line(answer, part):
    with endpoint(**answer) as (address, _):
        message = message_of(lambda: fetch_entities("movie", 7, endpoint=address))
    assert message.startswith(f"{address}: ")
    assert part in message


def test_an_endpoint_that_does_not_answer():
    with endpoint(wait=0.4) as (address, _):
        message = message_of(lambda: ask("x", address, 0.1))
        assert message == (
            f"{address}: no response within 0.1 s; increase "
            "dataset.timeout, or decrease dataset.n_fetched"
        )
    message = message_of(lambda: ask("x", address, 1))
    assert message.startswith(f"{address}: cannot be reached (")
    assert message_of(lambda: ask("x", "file:///etc/hostname", 1), ConfigError) == (
        "dataset.endpoint=file:///etc/hostname is not an http(s) address"
    )


def test_queries_name_every_attribute_and_refuse_other_types():
    for kind, (_, properties) in KINDS.items():
        text = sparql(kind, 10, 20)
        assert all(f'(wdt:{p} "{a}")' in text for a, p in properties.items())
        assert text.count("{") == text.count("}")
    message = "dataset.fetch=river: choose from player, movie, city, song"
    assert message_of(lambda: sparql("river", 1, 1), ConfigError) == message
    assert to_entities(ANSWER, "movie", "here")[0] == EXPECTED


@pytest.mark.parametrize("setting", ["n_fetched", "timeout"])
def test_a_query_for_nothing_is_refused_when_the_config_is_built(setting):
    assert message_of(lambda: WikidataConfig(**{setting: 0}), ConfigError) == (
        f"dataset.{setting}=0 is too small; it must be at least 1"
    )
