"""Pages of the documentation that are generated while mkdocs builds the site.

| page | source |
|---|---|
| reference/config.md | the config dataclasses (`config_reference`) |
| reference/cli.md | the output of `python -m saexp --help` |
| reference/api.md | `saexp.__all__`, rendered by mkdocstrings |
| studies/*.md | experiments/*/README.md |
| notebooks/*.md | docs/notebooks/*.ipynb, with their outputs |
| changelog.md | CHANGELOG.md |
| gallery/plotly.min.js | plotly's library, which the gallery's pages share |

A comment with the path of a CSV file in a page is replaced by the file's table.
"""

import ast
import csv
import html
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from config_reference import config_page  # noqa: E402
from gallery_pages import LIBRARY  # noqa: E402

API_TYPES = (
    "saexp.results.Result",
    "saexp.api.model.InteractiveModel",
    "saexp.models.loading.LanguageModel",
    "saexp.models.Hookpoint",
    "saexp.saes.SparseAutoencoder",
    "saexp.saes.SAE",
    "saexp.latents.Latents",
    "saexp.activations.ActivationStore",
    "saexp.pipeline.Session",
    "saexp.analysis.Analyzer",
    "saexp.analysis.AnalysisInputs",
    "saexp.data.Example",
    "saexp.data.ExampleSet",
    "saexp.config.run.RunConfig",
)
"""Types that the public functions take and return, and that plugins use."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_CSV = re.compile(r"<!-- (\S+\.csv) -->")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Add a section with the notebooks after the guides."""
    notebooks = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
    if notebooks:
        section = [{_title(n): f"notebooks/{n.stem}.md"} for n in notebooks]
        after = next(i for i, item in enumerate(config.nav) if "Guides" in item)
        config.nav.insert(after + 1, {"Notebooks": section})
    return config


def _title(notebook: Path) -> str:
    return notebook.stem.replace("_", " ").capitalize()


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]
    from plotly.offline import get_plotlyjs

    library = {f"gallery/{LIBRARY}": get_plotlyjs()}
    for path, content in (generated_pages() | library).items():
        files.append(File.generated(config, path, content=content))
    return files


def generated_pages() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    pages = {
        "reference/config.md": config_page(ROOT),
        "reference/cli.md": cli_page(),
        "reference/api.md": api_page(),
        "changelog.md": moved(ROOT / "CHANGELOG.md", "changelog.md"),
    }
    for readme in sorted((ROOT / "experiments").glob("*/README.md")):
        path = f"studies/{readme.parent.name}.md"
        pages[path] = moved(readme, path)
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        pages[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    return pages


def cli_page() -> str:
    """`--help` as it is printed."""
    command = [sys.executable, "-m", "saexp", "--help"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return (
        "# Command line\n\n"
        "`python -m saexp` and `saexp` are the same command. It exits with 0, or with 1 after one "
        "line on stderr for anything that you can fix. The output of `python -m saexp --help`:\n\n"
        f"```text\n{done.stdout.strip()}\n```\n\n"
        "Every key and its default: [configuration](config.md).\n\n"
        "## Completion in the shell\n\n"
        'In bash, `eval "$(saexp -sc install=bash)"` completes groups, options and keys after '
        "`saexp` (`install=zsh` and `install=fish` likewise); in `~/.bashrc` it does so in every "
        "shell. `-sc uninstall=bash` undoes it. `python -m saexp` is not completed.\n\n"
        "## Leaving out a group\n\n"
        "`~intervention` and `~tracker` mean `intervention=none` and `tracker=none`. The other "
        "groups have no option `none`: a run needs one of their options.\n"
    )


def public_names() -> list[str]:
    """`saexp.__all__`, read from the source."""
    tree = ast.parse((ROOT / "saexp/__init__.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("saexp/__init__.py has no __all__")


def api_page() -> str:
    """Directives for mkdocstrings: the public names, then the types that they use."""
    functions = [n for n in public_names() if not n[0].isupper()]
    types = [path for path in API_TYPES if _exists(path)]
    lines = [
        "# Python API",
        "",
        "What `import saexp` offers. The import is fast: a name's module is loaded on first use. "
        "Examples are in [Python and notebooks](../guides/python.md).",
        "",
        "## Functions",
        "",
        *(f"::: saexp.{name}\n" for name in functions),
        "## Types",
        "",
        *(f"::: {path}\n" for path in types),
    ]
    return "\n".join(lines)


def _exists(path: str) -> bool:
    """Whether a module of saexp defines this class."""
    module, _, name = path.rpartition(".")
    base = ROOT / module.replace(".", "/")
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return file.is_file() and f"\nclass {name}" in file.read_text("utf-8")


def moved(source: Path, path: str) -> str:
    """A Markdown file of the repository as page `path`, its links adapted."""
    return with_page_links(source.read_text("utf-8"), source, path)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Adapt the links of pages that are files in docs/."""
    source = ROOT / "docs" / page.file.src_uri
    markdown = _CSV.sub(lambda match: table_of(ROOT / match[1]), markdown)
    return with_page_links(markdown, source, page.file.src_uri) if source.is_file() else markdown


def with_page_links(text: str, source: Path, path: str) -> str:
    """The text of a file as page `path`: relative links lead to the pages that files become.

    Links to files that become no page are replaced by the path of the file.
    """

    def adapted(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        file, _, anchor = target.partition("#")
        linked = (source.parent / file).resolve()
        page = page_of(linked)
        if page is None:
            return f"{label} (`{linked.relative_to(ROOT).as_posix()}`)"
        relative = posixpath.relpath(page, posixpath.dirname(path) or ".")
        return f"{image}[{label}]({relative}{'#' + anchor if anchor else ''})"

    parts = _FENCE.split(text)
    parts[::2] = [_LINK.sub(adapted, part) for part in parts[::2]]
    return "".join(parts)


def table_of(file: Path) -> str:
    """A CSV file as a Markdown table; nothing where it does not exist."""
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8", newline="") as lines:
        head, *rows = csv.reader(lines)
    titles = [title.replace("_", " ") for title in head]
    table = [titles, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def page_of(file: Path) -> str | None:
    """The page below docs/ that a file of the repository becomes; None for other files."""
    name = file.relative_to(ROOT).as_posix()
    if name == "CHANGELOG.md":
        return "changelog.md"
    if match := re.fullmatch(r"experiments/(\w+)/README\.md", name):
        return f"studies/{match[1]}.md"
    if match := re.fullmatch(r"docs/(.*)\.ipynb", name):
        return f"{match[1]}.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else None


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: cells, and the outputs that are saved in the file."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell["outputs"] if (shown := _output(output))]
    note = f"*The notebook is `docs/notebooks/{path.name}`.*"
    title, *rest = parts
    return "\n\n".join([title, note, *rest]) + "\n"


def _output(output: dict[str, Any]) -> str:
    """One output of a cell: an image, HTML, or text."""
    data = {kind: "".join(value) if isinstance(value, list) else value
            for kind, value in output.get("data", {}).items()}  # fmt: skip
    if "image/svg+xml" in data:
        return f"<div>{data['image/svg+xml']}</div>"
    if "image/png" in data:
        return f'<img alt="output" src="data:image/png;base64,{data["image/png"].strip()}">'
    if "text/html" in data:
        compact = "\n".join(line for line in data["text/html"].splitlines() if line.strip())
        return f"<div>{compact}</div>"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"<pre><code>{html.escape(text.rstrip())}</code></pre>" if text.strip() else ""
