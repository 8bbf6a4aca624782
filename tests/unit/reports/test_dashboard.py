"""dashboard.html: rendered from dashboard.json alone, self-contained, small, quick to open."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from saexp.errors import StoreError
from saexp.reports.latents import read_dashboard, write_dashboard
from tests.unit.reports.browser import dom, needs_chromium
from tests.unit.reports.left import body_of
from tests.unit.reports.written import NASTY, run, write_json

TIMING = """<script>addEventListener("load", () => {
  document.documentElement.dataset.ms = performance.now();
})</script>"""
"""Milliseconds from the navigation's start; the browser's own start is not the page's."""


def example(value: float, n_tokens: int = 37) -> dict[str, Any]:
    tokens = [f" tok{i}" for i in range(n_tokens)]
    values = [round(value * i / n_tokens, 3) for i in range(n_tokens)]
    tokens[3], values[3:5] = NASTY, [0.0, None]
    about = {"peak": n_tokens - 1, "cut": [True, False], "value": value}
    return {"tokens": tokens, "values": values, **about, "id": "a", "group": None, "split": "test"}


def card(latent: int, **more: Any) -> dict[str, Any]:
    return {
        "latent": latent,
        "n_active": 500 + latent,
        "density": 0.01,
        "active_of_group": [300, 200 + latent],
        "mean_active": 1.5,
        "max": 3.75,
        "histogram": {"width": 0.0625, "counts": [[100 - i for i in range(60)]] * 2},
        "top": [example(3.75 - i / 10) for i in range(10)],
        "quantiles": [
            {"quantile": q, "examples": [example(q), example(q)]}
            for q in (0.9, 0.75, 0.5, 0.25, 0.1)
        ],
        "promoted": [[f" word{i}", 1 - i / 10] for i in range(10)],
        "suppressed": [[f" not{i}", i / 10 - 1] for i in range(10)],
        "similar": [[i, 0.5] for i in range(6)],
        "correlated": [[i, 0.4] for i in range(6)],
        "contrast": None,
        "neuronpedia": None,
        **more,
    }


def content(cards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "how_chosen": "as named",
        "groups": ["known", "unknown"],
        "rows_of_group": [5000, 5000],
        "n_rows": 10000,
        "positions": "all",
        "norm": "as it is",
        "n_sample": 1000,
        "neuronpedia_list": None,
        "embed": "embed=true",
        "latents": cards,
    }


def written(folder: Path, cards: list[dict[str, Any]]) -> Path:
    """A run's folder with these cards; its page."""
    run(folder, causal=False, notes=("a note & <i>",))
    about = json.loads((folder / "provenance.json").read_text("utf-8"))
    write_json(folder / "provenance.json", {**about, "finding": [f"found {NASTY}"]})
    write_json(folder / "dashboard.json", content(cards))
    return write_dashboard(folder)


def test_fifty_latents_are_under_five_megabytes(tmp_path: Path) -> None:
    assert written(tmp_path, [card(i) for i in range(50)]).stat().st_size < 5e6


def test_the_page_holds_the_file_and_loads_nothing(tmp_path: Path) -> None:
    linked = {"neuronpedia": "https://neuronpedia.org/a/b/7"}
    page = written(tmp_path, [card(7, **linked)])
    text = page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    assert json.loads(found[1]) == read_dashboard(tmp_path)
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not [w for w in ("http://", "https://", "src=", "<link", "@import") if w in body]
    assert "plotly" not in text


def test_text_is_never_markup(tmp_path: Path) -> None:
    page = written(tmp_path, [card(7)])
    assert NASTY not in page.read_text("utf-8")
    assert "found &lt;/script&gt;&lt;b&gt;&amp;" in body_of(page)
    assert "<p>a note &amp; &lt;i&gt;</p>" in body_of(page)


def test_a_folder_without_the_file_is_told_so(tmp_path: Path) -> None:
    run(tmp_path, causal=False)
    with pytest.raises(StoreError, match=r"holds no dashboard \(dashboard.json"):
        write_dashboard(tmp_path)


@needs_chromium
@pytest.mark.slow
def test_a_browser_draws_it_from_the_file_in_under_two_seconds(tmp_path: Path) -> None:
    inactive = card(3, n_active=0, density=0.0, mean_active=None, max=0.0, top=[], quantiles=[])
    inactive["histogram"] = {"width": 0.0, "counts": [[], []]}
    cards = [*(card(i) for i in range(49)), inactive | {"latent": 900}]
    page = written(tmp_path, cards)
    timed = tmp_path / "timed.html"
    timed.write_text(page.read_text("utf-8") + TIMING)
    drawn = dom(timed, tmp_path)
    took = re.search(r'data-ms="([\d.]+)"', drawn)
    assert took is not None
    assert float(took[1]) < 2000
    assert drawn.count('<button type="button" value=') == 50
    assert drawn.count('class="card"') == 1
    assert drawn.count('class="text"') == 20
    assert "<rect" in drawn
    assert "<iframe" not in drawn
    assert 'title="not analysed"' in drawn
    last = page.with_name("last.html")
    last.write_text(page.read_text("utf-8").replace("list();\nfromHash();", "go(900);list();"))
    assert "Never active here." in dom(last, tmp_path)


KEYS = """<script>
const event = key => new KeyboardEvent("keydown", { key, bubbles: true });
const press = (key, on = document.body) => on.dispatchEvent(event(key));
const told = [], tell = () => told.push(`${current} of ${matching.length}`);
tell(); press("j"); tell(); press("ArrowRight"); tell(); press("k"); tell();
press("/"); told.push(document.activeElement.id);
here("search").value = "special"; here("search").dispatchEvent(new Event("input")); tell();
press("j", here("search")); tell();
here("search").value = "4"; here("search").dispatchEvent(new Event("input")); tell();
here("search").value = ""; here("search").dispatchEvent(new Event("input"));
here("sort").value = 1; here("sort").dispatchEvent(new Event("change"));
told.push(matching.map(c => c.latent).join(" "));
here("all").click(); told.push(document.querySelectorAll("article").length);
document.body.dataset.said = told.join("; ");
</script>"""


@needs_chromium
@pytest.mark.slow
def test_keys_search_and_order_find_a_latent(tmp_path: Path) -> None:
    odd = card(41, promoted=[["Special", 1.0]])
    page = written(tmp_path, [card(30), odd, card(4), card(12)])
    page.write_text(page.read_text("utf-8") + KEYS)
    said = re.search(r'data-said="([^"]*)"', dom(page, tmp_path))
    assert said is not None
    steps = ["30 of 4", "41 of 4", "4 of 4", "41 of 4", "search", "41 of 1", "41 of 1"]
    # A number finds latents that begin with it, and texts that hold it: "tok4" is in every one.
    assert said[1].split("; ") == [*steps, "41 of 4", "4 12 30 41", "4"]
