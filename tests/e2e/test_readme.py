"""Every command of README, of the studies' READMEs and of --help is run, or the reason is given."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import saexp
from tests import readme_commands as known
from tests.readme_commands import DOCS, ELSEWHERE, NOT_HERE, PAGES, ROOT, RUN, SAEXP, SMALL
from tests.unit.reports.run_outputs import command

TABLES = {"RUN": RUN, "ELSEWHERE": ELSEWHERE, "NOT_HERE": NOT_HERE}
HELP = "conf/config.yaml"


def commands_of(page: str) -> list[str]:
    """The commands of a page, or of `--help`."""
    text = (ROOT / page).read_text("utf-8")
    if page == HELP:
        return known.of_help(text)
    return known.fenced_commands(text) if page in DOCS else known.commands(text)


@pytest.mark.parametrize("page", [*PAGES, HELP])
def test_every_command_is_in_a_table(page: str) -> None:
    missing = [c for c in commands_of(page) if c not in known.in_tables()]
    assert not missing, f"add these commands of {page} to readme_commands.py"


def test_tables_hold_commands_that_a_page_shows_each_once() -> None:
    shown = {c for page in (*PAGES, *DOCS, HELP) for c in commands_of(page)}
    assert sum(map(len, TABLES.values())) == len(known.in_tables())
    stale = [c for c in known.in_tables() if c not in shown]
    assert not stale, "no page shows these commands; remove them from readme_commands.py"


def test_no_command_hides_in_a_block_that_is_not_read() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        n_read = sum(c.count(SAEXP) for c in known.commands(text))
        comments = re.findall(rf"#.*{SAEXP}|`{SAEXP}[^`]*`", text)
        assert text.count(SAEXP) == n_read + len(comments), page


def test_commands_are_recognized_in_every_kind_of_block() -> None:
    text = (
        "Words.\n\n    python -m saexp new=1   # why\n    python -m saexp \\\n      b=2\n\nMore.\n"
    )
    assert known.commands(text) == [f"{SAEXP} new=1", f"{SAEXP} b=2"]
    assert known.commands("```bash\nmake all\n```\n") == ["make all"]
    assert known.commands("```\nits output\n```\n\nand `python -m saexp` in a line\n") == []
    assert f"{SAEXP} new=1" not in known.in_tables()


@pytest.mark.parametrize("where", sorted(set(ELSEWHERE.values())))
def test_the_tests_that_are_pointed_to_exist(where: str) -> None:
    file, _, name = where.partition("::")
    text = (ROOT / file).read_text("utf-8")
    assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE)


@pytest.mark.parametrize("typed", [c for c in (*ELSEWHERE, *NOT_HERE) if c.startswith(SAEXP)])
def test_commands_that_are_not_run_here_compose(typed: str) -> None:
    for overrides in known.composed_overrides(typed):
        saexp.compose(overrides)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("typed", RUN)
def test_a_command_runs(typed: str, cache: Path, tmp_path: Path) -> None:
    """As typed, then overrides that make it small; it leaves a page, and no failed cell."""
    words = [*shlex.split(typed)[3:], *shlex.split(RUN[typed]), f"cache_dir={cache}"]
    result = command(tmp_path, *words, "hydra.run.dir=run")
    assert result.code == 0, result.err[-2000:]
    assert not list(tmp_path.rglob("error.txt"))
    if not {"task=cache", "task=collect"} & set(words):
        pages = [tmp_path / "run" / name for name in ("report.html", "dashboard.html")]
        assert any(page.is_file() for page in pages)


def test_python_blocks_run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkout, as they are; `compose` adds the words that make them small."""
    compose = saexp.compose
    small = [*shlex.split(SMALL), f"cache_dir={cache}"]
    monkeypatch.setattr(saexp, "compose", lambda words=(): compose([*words, *small]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saexp").symlink_to(ROOT / "saexp")
    snippets = [
        (page, content)
        for page in (*PAGES, *DOCS)
        # tests/unit/test_guide.py runs the code of this guide.
        if page != "docs/guides/coming-from-saelens.md"
        for kind, content in known.blocks((ROOT / page).read_text("utf-8"))
        # A package for test_your_own: what it registers must not reach other tests.
        if kind == "python" and "@saexp.register" not in content
    ]
    assert snippets
    for page, content in snippets:
        space: dict[str, Any] = {}
        exec(compile(content, page, "exec"), space)
        result = space.get("result")
        assert result is None or result.path.is_dir()
