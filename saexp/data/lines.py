"""Reading the user's text files: encoding, byte order mark and ends of lines, in one place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from saexp.errors import DataError


@contextmanager
def open_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    r"""A UTF-8 file, opened for reading without its byte order mark.

    Iterating gives lines as Python's universal newlines do: only "\n", "\r\n" and "\r" end one,
    not the other characters at which `str.splitlines` cuts (U+2028, NEL, form feed and so on).
    `newline` is that of `open`. Raises DataError, with the position of the first byte that does not
    fit, where the file is not UTF-8.
    """
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as opened:
            yield opened
    except UnicodeDecodeError as error:
        # The error's own position counts from the beginning of a block of the file.
        raise DataError(f"{file}: is not UTF-8 text (byte {_first_bad_byte(file)})") from error


def _first_bad_byte(file: Path) -> int:
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def text_lines(file: Path) -> list[str]:
    """Lines of a text file without their ends; white space and blank lines as they are."""
    with open_text(file) as lines:
        return [line.removesuffix("\n") for line in lines]
