"""Every command of README, of the studies' READMEs and of --help is run, or it is said why not."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

import saexp
from tests import readme_commands as known
from tests.readme_commands import ELSEWHERE, NOT_HERE, PAGES, ROOT, RUN, SMALL, plain
from tests.unit.reports.left import command

TABLES = {"RUN": RUN, "ELSEWHERE": ELSEWHERE, "NOT_HERE": NOT_HERE}
PLACES = {plain(typed): name for name, table in TABLES.items() for typed in table}
OURS = "python -m saexp"


def named() -> dict[str, list[str]]:
    """Page -> its commands."""
    found = {page: known.commands((ROOT / page).read_text("utf-8")) for page in PAGES}
    found["conf/config.yaml"] = known.of_help((ROOT / "conf/config.yaml").read_text("utf-8"))
    return found


@pytest.mark.parametrize("page", named())
def test_every_command_has_its_place(page: str) -> None:
    lost = [c for c in named()[page] if c not in PLACES]
    assert not lost, f"{page} names commands that no test knows; add them to readme_commands.py"


def test_every_place_is_of_a_command_that_is_named_and_of_one_only() -> None:
    everywhere = {c for listed in named().values() for c in listed}
    assert sum(map(len, TABLES.values())) == len(PLACES)
    stale = [c for c in PLACES if c not in everywhere]
    assert not stale, "no page names these any more; take them out of readme_commands.py"


def test_no_command_hides_in_a_block_that_is_not_read() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        n_read = sum(c.count(OURS) for c in known.commands(text))
        comments = re.findall(rf"#.*{OURS}|`{OURS}[^`]*`", text)
        assert text.count(OURS) == n_read + len(comments), page


def test_a_command_that_is_new_is_noticed() -> None:
    text = (
        "Words.\n\n    python -m saexp new=1   # why\n    python -m saexp \\\n      b=2\n\nMore.\n"
    )
    assert known.commands(text) == [f"{OURS} new=1", f"{OURS} b=2"]
    assert known.commands("```bash\nmake all\n```\n") == ["make all"]
    assert known.commands("```\nits output\n```\n\nand `python -m saexp` in a line\n") == []
    assert f"{OURS} new=1" not in PLACES


@pytest.mark.parametrize("where", sorted(set(ELSEWHERE.values())))
def test_the_tests_that_are_pointed_to_exist(where: str) -> None:
    file, _, name = where.partition("::")
    text = (ROOT / file).read_text("utf-8")
    assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE)


@pytest.mark.parametrize("typed", [c for c in (*ELSEWHERE, *NOT_HERE) if c.startswith(OURS)])
def test_what_is_not_run_here_composes(typed: str) -> None:
    """Keys and options of the first and last cell; launchers belong to Hydra, so they are not."""
    words = [w for w in shlex.split(typed)[3:] if w != "-m" and "hydra" not in w.split("=")[0]]
    parsed = OverridesParser.create().parse_overrides(words)
    cells = BasicSweeper.split_arguments(parsed, None)[0]
    for cell in (cells[0], cells[-1]):
        saexp.compose(cell)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("typed", RUN)
def test_it_runs(typed: str, cache: Path, tmp_path: Path) -> None:
    """As typed, then the words that make it small; it leaves a page, and no failed cell."""
    words = [*shlex.split(typed)[3:], *shlex.split(RUN[typed]), f"cache_dir={cache}"]
    said = command(tmp_path, *words, "hydra.run.dir=run")
    assert said.code == 0, said.err[-2000:]
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
    found = [
        content
        for page in PAGES
        for kind, content in known.blocks((ROOT / page).read_text("utf-8"))
        # A package for test_your_own: what it registers must not reach other tests.
        if kind == "python" and "@saexp.register" not in content
    ]
    assert found
    for content in found:
        space: dict[str, Any] = {}
        exec(compile(content, "README.md", "exec"), space)
        result = space.get("result")
        assert result is None or (result.path / "report.html").is_file()
