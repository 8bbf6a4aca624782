"""Copy a run's page into the gallery: `python docs/gallery_pages.py PAGE NAME`.

A page has plotly's library in it, 4.6 MB. In the gallery it refers to one copy beside it, which the
build of the documentation writes (`hooks.py`). Raises ValueError for a page with another version of
it, and for one that names an absolute path, which would be of the machine that made it.
"""

import re
import sys
from pathlib import Path

from plotly.offline import get_plotlyjs

LIBRARY = "plotly.min.js"
GALLERY = Path(__file__).resolve().parent / "gallery"


def without_library(page: str) -> str:
    """The page with a reference to plotly's library instead of its text."""
    text = f"<script>{get_plotlyjs()}</script>"
    if text not in page and "Plotly." in page:
        raise ValueError("the page has another version of plotly's library")
    page = page.replace(text, f'<script src="{LIBRARY}"></script>')
    paths = re.findall(r"(?<![\w.:/<])/(?:home|root|tmp|work|Users|mnt|opt)/[\w./-]+", page)
    if paths:
        raise ValueError(f"the page names {paths[0]}; run it in a clone with relative paths")
    return page


if __name__ == "__main__":
    source, name = sys.argv[1:]
    page = without_library(Path(source).read_text("utf-8"))
    (GALLERY / name).write_text(page, encoding="utf-8")
