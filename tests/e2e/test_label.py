"""task=label on real small models: labels, files, splits, resuming, chat, memorised texts."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.config import DatasetConfig, LabelConfig
from saexp.data import Example
from saexp.data.tables import read_rows, to_examples
from saexp.data.tokenization import tokenize
from saexp.errors import ConfigError, DataError
from saexp.interventions import generation
from saexp.models.loading import LanguageModel
from saexp.tasks import label as module
from saexp.tasks.label_files import Answers, answers, cut_answers
from tests.chat_tokenizers import base_tokenizers, chat_tokenizers, with_tokenizer
from tests.random_models import random_hf, random_lm, tokenizer
from tests.shipped_texts import FEW_NEUTRAL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def labelled(cache: Path, folder: Path, *words: str):
    words = ("task=label", "dataset.n_examples=4", "tracker=none", f"cache_dir={cache}", *words)
    return saexp.run(saexp.compose([*words, "task.n_samples=4"]), folder)


@pytest.fixture(scope="module")
def own(cache, tmp_path_factory):
    return labelled(cache, tmp_path_factory.mktemp("own"))


def entity_rows(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "entities.jsonl").read_text("utf-8").splitlines()]


def test_the_shipped_model_knows_what_it_was_trained_on(own):
    table = own.tables["labels"]
    assert len(table) == 4 * 2 * 4
    by = table.groupby("given_group")["greedy_label"].value_counts()
    assert by["known"].to_dict() == {"correct": 16}
    assert by["unknown"]["refusal"] >= 12
    assert "correct" not in by["unknown"]
    groups = pd.Series([r["group"] for r in entity_rows(own.path)])
    given_groups = table.drop_duplicates("entity")["given_group"].to_list()
    assert groups.to_list() == given_groups
    assert own.metrics["label/n_known"] == own.metrics["label/n_unknown"] == 16
    assert own.metrics["label/greedy_accuracy"] == 1.0
    assert any("16 questions whose answer in the data is a refusal" in n for n in own.notes)
    assert any("min_known=2" in n for n in own.notes)


def test_the_files_are_read_by_dataset_jsonl(own, cache):
    about = json.loads((own.path / "provenance.json").read_text("utf-8"))["labels"]
    stored = Path(about["path"])
    assert stored.parent == cache / "labels" and stored.name == about["key"]
    for name in ("entities.jsonl", "labels.parquet"):
        assert (stored / name).read_bytes() == (own.path / name).read_bytes()
    cfg = saexp.compose(["dataset=jsonl", f'dataset.path="{stored / "entities.jsonl"}"'])
    got = saexp.build("dataset", cfg.dataset)
    assert set(got.groups) == {"known", "unknown"}
    assert [e.split for e in got.examples] == [r["split"] for r in entity_rows(own.path)]
    assert all(e.text[slice(*e.spans[0])] == e.entity for e in got.examples)
    assert all(e.entity in e.prompt for e in got.examples)


def test_splits_are_of_entities_seeded_and_alike_in_each_group(cache, tmp_path, own):
    other = labelled(cache, tmp_path / "other", "dataset.seed=1")
    splits = [[r["split"] for r in entity_rows(r.path)] for r in (own, other)]
    assert splits[0] != splits[1]
    table = pd.DataFrame(entity_rows(own.path))
    counts = table.groupby(["group", "entity_type"])["split"].value_counts().unstack()
    assert (counts["train"] == 2).all() and (counts["test"] == 2).all()


def test_nothing_is_generated_twice_and_a_killed_run_goes_on(tmp_path, monkeypatch, own):
    real, batches = generation._generate_batch, []

    def dying(*args):
        batches.append(len(args[1]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(*args)

    words = ["task.batch_tokens=1500"]
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_generate_batch", dying)
        with pytest.raises(KeyboardInterrupt):
            labelled(tmp_path / "cache", tmp_path / "killed", *words)
    n_generated = sum(batches[:2])
    batches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            generation, "_generate_batch", lambda *a: batches.append(len(a[1])) or real(*a)
        )
        again = labelled(tmp_path / "cache", tmp_path / "again", *words)
        assert sum(batches) == 4 * 2 * 4 * 5 - n_generated
        batches.clear()
        labelled(tmp_path / "cache", tmp_path / "third", "task.min_correct=2")
        assert batches == []
    pd.testing.assert_frame_equal(again.tables["labels"], own.tables["labels"])


def test_answers_are_what_the_model_gives_by_a_plain_loop(tmp_path):
    model = random_lm("llama")
    prompts = [(5, 6, 7, 8), (9, 10), (5, 6, 7, 8)]
    settings = {"n_samples": 300, "temperature": 1.0, "max_new_tokens": 3, "batch_tokens": 4096}
    got = answers(model, prompts, tmp_path, seed=0, **settings)
    for ids, answer in zip(prompts, got, strict=True):
        tokens = list(ids)
        for _ in range(3):
            with torch.inference_mode():
                following = int(model.hf(torch.tensor([tokens])).logits[0, -1].argmax())
            if following in model.eos_ids:
                break
            tokens.append(following)
        assert list(answer.greedy) == tokens[len(ids) :]
    assert got[0] == got[2]
    with torch.inference_mode():
        logits = model.hf(torch.tensor([prompts[0]])).logits[0, -1].double()
    expected = logits.softmax(-1).numpy()
    firsts = [s[0] for s in got[0].samples if s]
    rates = np.bincount(firsts, minlength=len(expected)) / len(got[0].samples)
    assert abs(rates - expected).max() < 4 * np.sqrt(expected.max() / 300)
    assert len(set(got[0].samples)) > 100
    other = answers(model, prompts[:1], tmp_path, seed=1, **settings)
    assert other[0].greedy == got[0].greedy
    assert other[0].samples != got[0].samples


WORDS = {
    "player": ("Fenlet Baszad", {"birthplace": "Oslo, Norway", "birth_year": 1990}),
    "city": ("Marta", {"country": "Norway", "coordinates": [60.0, 10.0], "mayor": "x"}),
}


@pytest.fixture()
def attributed(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {
            "text": f"The {kind} {name}",
            "entity": name,
            "entity_type": kind,
            "attributes": [{"attribute_type": a, "attribute_value": v} for a, v in facts.items()],
        }
        for kind, (name, facts) in WORDS.items()
    ]
    rows.append({"text": "The city Uvo", "entity": "Uvo", "entity_type": "city"})
    file.write_text("\n".join(map(json.dumps, rows)))
    return ["dataset=jsonl", f'dataset.path="{file}"']


def test_attributes_are_asked_by_template(cache, tmp_path, attributed):
    run = labelled(cache, tmp_path / "run", *attributed)
    table = run.tables["labels"]
    assert table[["entity", "attribute"]].to_numpy().tolist() == [
        ["Fenlet Baszad", "birthplace"],
        ["Fenlet Baszad", "birth_year"],
        ["Marta", "country"],
        ["Marta", "coordinates"],
        ["Uvo", "country"],
        ["Uvo", "coordinates"],
    ]
    assert table["prompt"][0] == (
        "In which city was the player Fenlet Baszad born? "
        "The player Fenlet Baszad was born in the city of"
    )
    assert table["truths"].map(list).tolist()[0] == ["Oslo, Norway", "Oslo"]
    assert table["truths"].map(len).tolist() == [2, 1, 1, 1, 0, 0]
    assert any(n.startswith("1 not asked: no template for city mayor; ") for n in run.notes)
    plain = labelled(cache, tmp_path / "plain", *attributed, "task.form=question")
    assert plain.tables["labels"]["prompt"][0] == "In which city was the player Fenlet Baszad born?"
    assert [r["prompt"] for r in entity_rows(plain.path)][-1].endswith("?")


def test_custom_templates_and_rules(cache, tmp_path, attributed):
    words = [
        '+task.templates.city.mayor=["Who governs {entity}?","{entity} is governed by"]',
        "+task.rules.city.mayor.kind=name",
    ]
    run = labelled(cache, tmp_path / "run", *attributed, *words)
    asked = run.tables["labels"]
    of_mayor = asked[asked["attribute"] == "mayor"]
    assert of_mayor["prompt"].tolist()[0] == "Who governs Marta? Marta is governed by"


def test_chat_prompts_have_one_bos_and_the_answer_may_be_begun():
    model = LanguageModel.wrap(random_lm("llama").hf, tokenizer(chat=True))
    model.cfg.chat = True
    facts = {"attributes": {"country": "Norway"}}
    example = Example(
        id="1", text="The city Marta", entity="Marta", entity_type="city", extra=facts
    )
    questions, _ = module.questions([example])
    question = "In which country is the city of Marta?"
    for form, begun in (("auto", ""), ("begun", "The city of Marta is in the country of")):
        asked, ids, skips = module._prompts(questions, model, LabelConfig(form=form), 200)
        assert skips == []
        assert [(text, read.text) for _, text, read in asked] == [
            (question, model.chat_text(question) + begun)
        ]
        assert ids[0].count(model.tokenizer.bos_token_id) == 1
        assert ids[0][0] == model.tokenizer.bos_token_id


@pytest.mark.parametrize("of", list(chat_tokenizers()))
@pytest.mark.parametrize("form", ["auto", "begun"])
def test_chat_prompts_are_the_template_s_ids_with_the_answer_begun(of, form):
    """Whatever BOS the tokenizer adds to a text, and without the EOS it appends."""
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    facts = {"attributes": {"country": "Norway"}}
    questions, _ = module.questions(
        [Example(id="1", text="Marta", entity="Marta", entity_type="city", extra=facts)]
    )
    [(_, text, read)], [ids], _ = module._prompts(questions, model, LabelConfig(form=form), 400)
    messages = [{"role": "user", "content": text}]
    templated = model.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    begun = "The city of Marta is in the country of" if form == "begun" else ""
    assert read.text == templated + begun
    assert list(ids) == list(model.tokenizer(read.text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("of", list(base_tokenizers()))
def test_base_prompts_have_no_eos_behind_them(of):
    model = with_tokenizer(base_tokenizers()[of])
    facts = {"attributes": {"country": "Norway"}}
    questions, _ = module.questions(
        [Example(id="1", text="Marta", entity="Marta", entity_type="city", extra=facts)]
    )
    [(_, text, _)], [ids], _ = module._prompts(questions, model, LabelConfig(form="question"), 400)
    own = list(model.tokenizer(text)["input_ids"])
    assert list(ids) == (own[:-1] if "eos" in of else own)


def test_prompts_that_are_too_long_are_counted(cache, tmp_path, attributed):
    run = labelled(cache, tmp_path / "run", *attributed, "dataset.max_length=40")
    skips = run.tables["skips"]
    assert skips["example_id"].tolist() == ["city/Marta/coordinates", "city/Uvo/coordinates"]
    assert set(skips["reason"]) == {"prompt longer than dataset.max_length"}
    n = len(run.tables["labels"]) + 2
    skipped = f"2 of {n} questions were skipped: prompt longer than dataset.max_length (2)"
    assert skipped in run.notes
    with pytest.raises(DataError, match="every prompt is longer than dataset.max_length=4"):
        labelled(cache, tmp_path / "none", *attributed, "dataset.max_length=4")


def test_answers_cut_at_the_limit_are_counted(cache, tmp_path, own):
    # The tiny model ends every answer itself.
    assert own.metrics["label/greedy_cut_fraction"] == 0
    assert not any("reached task.max_new_tokens" in n for n in own.notes)
    cut = labelled(cache, tmp_path, "task.max_new_tokens=2")
    lengths = [len(x) for x in own.tables["labels"]["greedy"]]
    assert min(lengths) > 2
    assert cut.metrics["label/greedy_cut_fraction"] == 1
    assert cut.metrics["label/sample_cut_fraction"] == 1
    n_wrong = int((cut.tables["labels"]["greedy_label"] == "error").sum())
    assert [n for n in cut.notes if n.startswith("32 of 32 greedy answers reached")] == [
        "32 of 32 greedy answers reached task.max_new_tokens=2 and were judged as far as they go; "
        f"{n_wrong} of them count as incorrect: a larger number may change that"
    ]


def test_an_answer_judged_up_to_its_line_end_is_not_cut():
    table = pd.DataFrame(
        {"greedy": ["one\n", "one two"], "samples": [["a\nb"], ["c"]], "greedy_label": "error"}
    )
    cases = [Answers((1, 2), ((1, 2),)), Answers((1, 2), ((1,),))]
    options = LabelConfig(name="label", max_new_tokens=2)
    whole = cut_answers(cases, table, options, to_line=False)
    assert whole.metrics["label/greedy_cut_fraction"] == 1
    assert whole.metrics["label/sample_cut_fraction"] == 0.5
    lines = cut_answers(cases, table, options, to_line=True)
    assert lines.metrics["label/greedy_cut_fraction"] == 0.5
    assert lines.metrics["label/sample_cut_fraction"] == 0


def test_the_page_says_what_was_found(own):
    page = (own.path / "report.html").read_text("utf-8")
    for text in ("knows 16 of 32 entities, does not know 16", "Answers by attribute", "fig-counts"):
        assert text in page
    about = json.loads((own.path / "provenance.json").read_text("utf-8"))
    assert about["finding"][0].startswith("tiny knows 16 of 32 entities")
    assert not any("  " in sentence for sentence in about["finding"])


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("+task.n_sample=3", "no key 'task.n_sample'; did you mean task.n_samples"),
        ("task.max_new_tokens=0", "max_new_tokens=0 is not a whole number of at least 1"),
        ("task.batch_tokens=null", "task.batch_tokens needs a value"),
        ("task.temperature=0", "temperature=0.0 is not a number above 0"),
        ("task.form=quest", "task.form=quest is not known; did you mean question?"),
        ("task.cut_at_line=maybe", "cut_at_line=maybe is not true or false"),
        ("task.min_correct=9", "min_correct=9 is more than task.n_samples=4"),
        ("task.rules=3", "task.rules takes names with values; type task.rules."),
        ("+task.rules.movie.genre.kind=x", "rules.movie.genre.kind=x: type one of"),
        ("+task.templates.city.a=3", "templates.city.a: write a question, or [question"),
        ("+task.templates.city.a=x", "templates.city.a: every text needs {entity}"),
        ('+task.templates.city.a=["x","{entity}"]', "templates.city.a: every text needs"),
        ("task.max_unknown=2", "0 <= max_unknown < min_known"),
    ],
)
def test_options_that_are_none_are_one_line(cache, tmp_path, word, part):
    with pytest.raises(ConfigError) as caught:
        labelled(cache, tmp_path, word)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_prompts_where_there_are_attributes(cache, tmp_path, attributed):
    with pytest.raises(DataError, match="but the data set has attributes to ask for"):
        labelled(cache, tmp_path, *attributed, "task.form=own")


# --- right and wrong answers


def answer_rows(folder: Path, name: str = "answers") -> list[dict]:
    return [json.loads(x) for x in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def worded(cache, tmp_path_factory):
    """The shipped model's facts asked in two ways that it was not trained on."""
    file = ROOT / "experiments/entity_recognition/facts.jsonl"
    words = [
        f'dataset.path="{file}"',
        "dataset.n_examples=12",
        f"cache_dir={cache}",
        "tracker=none",
    ]
    return {
        way: saexp.run(
            saexp.compose([f"experiment=uncertainty_{way}", *words]),
            tmp_path_factory.mktemp(way),
        )
        for way in ("words", "statements")
    }


def test_the_facts_are_those_of_the_shipped_entities():
    file = ROOT / "experiments/entity_recognition/facts.jsonl"
    facts = {
        (r["entity_type"], r["entity"]): set(r["attributes"].values())
        for r in map(json.loads, file.read_text("utf-8").splitlines())
    }
    shipped = saexp.build("dataset", saexp.compose([]).dataset).examples
    known = [e for e in shipped if e.group == "known"]
    assert len(known) == len(facts)
    assert all(e.answers[0].strip(" .") in facts[e.entity_type, e.entity] for e in known)


@pytest.mark.parametrize("way", ["words", "statements"])
def test_every_question_is_a_row_by_what_was_answered(worded, way):
    run, of = worded[way], {"correct": "correct", "error": "incorrect", "refusal": "refused"}
    table, rows = run.tables["labels"], answer_rows(run.path, "answers_all")
    assert [r["group"] for r in rows] == table["greedy_label"].map(of).tolist()
    assert [r["text"] for r in rows] == [r["prompt"] for r in rows] == table["prompt"].tolist()
    assert all(r["text"].startswith("The old man walked") for r in rows)
    right = [r["greedy"].strip().startswith(r["answer"][0]) for r in rows]
    assert (
        np.mean([a == (r["group"] == "correct") for a, r in zip(right, rows, strict=True)]) > 0.97
    )
    assert 0.4 < np.mean(right) < 0.9
    one = answer_rows(run.path)
    assert len(one) == len({r["entity"] for r in one}) == 48
    assert all(r in rows for r in one)
    for group in ("correct", "incorrect", "refused"):
        assert run.metrics[f"label/n_{group}"] == sum(r["group"] == group for r in one)
    assert any(f"{run.metrics['label/n_incorrect']} wrong" in x for x in finding(run))


def finding(run) -> list[str]:
    return json.loads((run.path / "provenance.json").read_text("utf-8"))["finding"]


def test_question_and_split_do_not_depend_on_the_answers(worded):
    first, second = (answer_rows(worded[way].path) for way in ("words", "statements"))
    assert [r["group"] for r in first] != [r["group"] for r in second]
    for name in ("id", "split", "attribute"):
        assert [r[name] for r in first] == [r[name] for r in second]
    split_of = {r["entity"]: r["split"] for r in first}
    every = answer_rows(worded["words"].path, "answers_all")
    assert all(r["split"] == split_of[r["entity"]] for r in every)
    counts = pd.DataFrame(first).groupby("entity_type")["split"].value_counts().unstack()
    assert (counts["train"] == 6).all()


def test_answers_are_contrasted_where_they_begin(worded, cache, tmp_path):
    file = worded["words"].path / "answers.jsonl"
    words = ["experiment=uncertainty", f'dataset.path="{file}"', f"cache_dir={cache}"]
    small = [
        "tracker=none",
        "analyzer.n_bootstrap=10",
        "analyzer.n_background=200",
        FEW_NEUTRAL,
        "layer=2",
    ]
    run = saexp.run(saexp.compose([*words, *small]), tmp_path)
    rows = run.tables["rows"]
    assert set(rows["group"]) == {"correct", "incorrect"}
    assert set(rows["token"]) == {":"}
    assert len(rows) == len([r for r in answer_rows(file.parent) if r["group"] != "refused"])
    assert (rows["unit"].value_counts() == 1).all()


def test_own_prompts_have_rows_too(own):
    rows = answer_rows(own.path)
    assert {r["group"] for r in rows} == {"correct"}
    assert len(rows) == own.metrics["label/n_correct"] == 16
    assert own.metrics["label/n_incorrect"] == own.metrics["label/n_refused"] == 0


def test_in_chat_the_text_is_what_the_model_reads(cache, tmp_path):
    hf = random_hf("llama")
    hf.save_pretrained(tmp_path / "model")
    tokenizer(chat=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "mine.jsonl"
    facts = {"country": "Norway", "population": 5}
    row = {"text": "The city Uvo", "entity": "Uvo", "entity_type": "city", "attributes": facts}
    file.write_text(json.dumps(row))
    words = ["task=label", "model=hf", f'model.name="{tmp_path / "model"}"', "model.chat=true"]
    words += ["dataset=jsonl", f'dataset.path="{file}"', f"cache_dir={cache}", "device=cpu"]
    words += ["task.n_samples=0", "task.max_new_tokens=2", "task.before=So"]
    run = saexp.run(saexp.compose(words), tmp_path / "run")
    rows = answer_rows(run.path, "answers_all")
    assert len(rows) == 2 and len(answer_rows(run.path)) == 1
    read = tokenizer(chat=True)
    for row in rows:
        assert row["prompt"].startswith("So")
        assert row["text"] == f"<bos>user: {row['prompt']}\nmodel:"
        assert "span" not in row
        (tokens,) = tokenize([row["text"]], read, 200)
        assert tokens.ids.count(read.bos_token_id) == 1
        assert read.decode(tokens.ids[-1:]) == ":"


@pytest.mark.parametrize(
    ("entity", "form"), [("model", "question"), ("user", "begun"), ("Uvo", "question")]
)
def test_in_chat_the_entity_s_mention_is_not_the_template_s(cache, tmp_path, entity, form):
    random_hf("llama").save_pretrained(tmp_path / "model")
    tokenizer(chat=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "mine.jsonl"
    row = {"text": f"The city {entity}", "entity": entity, "entity_type": "city"}
    file.write_text(json.dumps({**row, "attributes": {"country": "Norway"}}))
    words = ["task=label", "model=hf", f'model.name="{tmp_path / "model"}"', "model.chat=true"]
    words += ["dataset=jsonl", f'dataset.path="{file}"', f"cache_dir={cache}", "device=cpu"]
    words += ["task.n_samples=0", "task.max_new_tokens=2"]
    run = saexp.run(saexp.compose([*words, f"task.form={form}"]), tmp_path / "run")
    rows = read_rows(str(run.path / "answers.jsonl"), "jsonl")
    ((read,), _) = to_examples(rows, DatasetConfig(name="jsonl"), "answers.jsonl")
    before, _, after = read.text.rpartition(entity if form == "begun" else f"city of {entity}?")
    start = len(before) if form == "begun" else len(before) + len("city of ")
    assert read.entity == entity
    assert read.spans[-1] == (start, start + len(entity))
    assert after


def test_an_attribute_by_another_name_is_asked_in_its_own_words(cache, tmp_path):
    """Files say team, the rules teams: the template typed for either is the one used."""
    file = tmp_path / "mine.jsonl"
    facts = {"team": "Hawks"}
    row = {"text": "The player Uvo", "entity": "Uvo", "entity_type": "player", "attributes": facts}
    file.write_text(json.dumps(row))
    words = ["dataset=jsonl", f'dataset.path="{file}"']
    run = labelled(cache, tmp_path, *words, "+task.templates.player.team='Whose is {entity}'")
    assert run.tables["labels"]["prompt"].tolist() == ["Whose is Uvo"]


# --- memorised texts
