"""dashboard.html: rendered from dashboard.json alone, self-contained, small, quick to open."""

import json
import re
from pathlib import Path

import pytest

from saexp.errors import StoreError
from saexp.reports.latents import read_dashboard, write_dashboard
from tests.unit.reports.cards import card, written
from tests.unit.reports.left import body_of
from tests.unit.reports.written import NASTY, run


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
