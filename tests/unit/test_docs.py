"""The documentation: links, navigation, generated pages, and commands that compose."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import saexp
from saexp.config import RunConfig
from tests.readme_commands import (
    DOCS,
    PAGES,
    ROOT,
    SAEXP,
    composed_overrides,
    fenced_commands,
    in_tables,
)

sys.path.insert(0, str(ROOT / "docs"))
import config_reference  # noqa: E402
import hooks  # noqa: E402

LINKING = (*PAGES, *DOCS, "CHANGELOG.md", "CONTRIBUTING.md", "tests/README.md")
GENERATED = {"changelog.md", "reference/api.md", "reference/cli.md", "reference/config.md"}


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if path in {ROOT / "docs" / page for page in GENERATED}:
            continue
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def nav_pages(entry: object) -> list[str]:
    """The pages of an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in nav_pages(part)]  # type: ignore[union-attr]


def test_the_navigation_has_every_page_once() -> None:
    nav = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    written = {page.removeprefix("docs/") for page in DOCS}
    studies = {f"studies/{p.parent.name}.md" for p in ROOT.glob("experiments/*/README.md")}
    assert sorted(nav) == sorted(written | studies | GENERATED)


@pytest.mark.parametrize("page", DOCS)
def test_commands_of_the_documentation_compose(page: str) -> None:
    """Those that test_readme.py neither runs nor composes."""
    for typed in fenced_commands((ROOT / page).read_text("utf-8")):
        if typed in in_tables():
            continue
        assert typed.startswith(SAEXP), f"add this command to readme_commands.py: {typed}"
        for overrides in composed_overrides(typed):
            saexp.compose(overrides)


def test_the_reference_describes_every_setting() -> None:
    page = config_reference.config_page(ROOT)
    for field in dataclasses.fields(RunConfig):
        if not dataclasses.is_dataclass(field.type):
            assert f"| `{field.name}` |" in page
            continue
        for setting in dataclasses.fields(field.type):
            assert f"| `{field.name}.{setting.name}` |" in page


def test_defaults_are_shown_as_they_are_typed() -> None:
    page = config_reference.config_page(ROOT)
    assert "| `model.chat` | `bool` | `false` |" in page
    assert "| `sae.path` | `str | None` | `null` |" in page
    assert "| `intervention.outcomes` | `list[str]` | `[refusal]` |" in page
    assert "| `dataset.split` | `dict[str, float]` | `{train: 0.5,val: 0.1,test: 0.4}` |" in page


def test_every_setting_has_a_docstring_and_every_option_a_comment() -> None:
    for described in config_reference.config_classes(ROOT).values():
        if described.name.endswith("Config"):
            undocumented = [f.name for f in described.fields if not f.doc]
            assert not undocumented, f"{described.name}: write a docstring under these fields"
    for group in (ROOT / "conf").iterdir():
        if group.is_dir():
            undescribed = [
                name for name, doc in config_reference.options(ROOT, group.name).items() if not doc
            ]
            assert not undescribed, f"conf/{group.name}: begin these files with a comment"


def test_the_changelog_lists_every_renamed_metric_and_column() -> None:
    renamed = json.loads((ROOT / "experiments/validation/renamed.json").read_text("utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    rows = [
        f"| {kind.removesuffix('s')} | `{before}` | `{after}` |"
        for kind, names in renamed.items()
        for before, after in names.items()
    ]
    missing = [row for row in rows if row not in changes]
    assert not missing, "add these rows to the table of renamed names:\n" + "\n".join(missing)


def test_public_names_and_moved_links_of_generated_pages() -> None:
    assert hooks.public_names() == saexp.__all__
    page = hooks.moved(ROOT / "experiments/validation/README.md", "studies/validation.md")
    assert "](../how-far-to-trust-the-numbers.md)" in page
    assert "../../docs" not in page


def test_a_csv_file_becomes_a_table(tmp_path: Path) -> None:
    file = tmp_path / "gains.csv"
    assert hooks.table_of(file) == ""
    file.write_text("mechanism,cpu_seconds\nprefixes,1.5\n", encoding="utf-8")
    assert hooks.table_of(file) == "| mechanism | cpu seconds |\n| --- | --- |\n| prefixes | 1.5 |"


def test_a_notebook_page_has_code_and_saved_outputs(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text"]},
        {
            "cell_type": "code",
            "source": ["1 < 2"],
            "outputs": [
                {"data": {"text/plain": ["True <b>"]}},
                {"data": {"text/html": "<p>table</p>", "text/plain": "table"}},
                {"data": {"image/png": "AAAA"}},
                {"text": ["printed\n"]},
            ],
        },
    ]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    page = hooks.notebook_page(path)
    assert page.startswith("# Title\nText\n\n")
    assert "```python\n1 < 2\n```" in page
    assert "True &lt;b&gt;" in page and "<div><p>table</p></div>" in page
    assert 'src="data:image/png;base64,AAAA"' in page and "printed" in page


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/caches.md"])
def test_modules_that_the_documentation_mentions_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    files = set(re.findall(r"`(?:saexp/)?([a-z_]+/[a-z_/]+\.py)`", text))
    assert files
    folders = (ROOT / "saexp", ROOT)
    missing = [f for f in sorted(files) if not any((at / f).is_file() for at in folders)]
    assert not missing
