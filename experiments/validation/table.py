"""The table of docs/how-far-to-trust-the-numbers.md, written from the measured CSVs.

python experiments/validation/table.py            # write it between its markers
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "how-far-to-trust-the-numbers.md"
BEGIN = "<!-- begin: experiments/validation/table.py -->"
END = "<!-- end: experiments/validation/table.py -->"
LEAST_COVERAGE = 0.92
Row = dict[str, Any]
Pair = tuple[Row | None, Row | None]


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), encoding="utf-8")


def with_table(page: str) -> str:
    """The page with the present table between its markers."""
    return between(page, BEGIN, END, markdown())


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with a text between two markers, instead of the one that is there."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def markdown(folder: Path = FOLDER / "measured") -> str:
    """All tables: error rates, biases, coverages."""
    before, after = (read(folder / f"{name}.csv") for name in ("before", "after"))
    names = list(dict.fromkeys([*after, *before]))
    pairs: dict[str, Pair] = {n: (before.get(n), after.get(n)) for n in names}

    def kind(name: str) -> str:
        row = next(r for r in pairs[name] if r is not None)
        return str(row["kind"])

    of = {k: {n: p for n, p in pairs.items() if kind(n) == k} for k in ("error rate", "bias")}
    versions = [str(next(iter(t.values()))["version"]) for t in (before, after)]
    return "\n\n".join(
        [
            "\n".join(_error_rates(of["error rate"], versions)),
            "\n".join(_biases(of["bias"], versions)),
            "\n".join(_coverages({n: p for n, p in pairs.items() if kind(n) == "coverage"})),
        ]
    )


def read(file: Path) -> dict[str, Row]:
    """Measured scenarios by name."""
    rows: list[Row] = pd.read_csv(file, dtype={"version": str}).to_dict("records")  # type: ignore[assignment]
    return {str(row["scenario"]): row for row in rows}


def too_often(row: Row) -> bool:
    """Whether an error rate is above nominal by more than two Monte Carlo standard errors."""
    nominal = float(row["nominal"])
    return float(row["value"]) > nominal + 2 * (nominal * (1 - nominal) / row["n_runs"]) ** 0.5


def too_rarely(row: Row) -> bool:
    """Whether a coverage is below 0.92 by more than two Monte Carlo standard errors."""
    n_intervals = row["n_runs"] * (1 - row["no_interval"])
    if n_intervals < 1:
        return False
    error = (LEAST_COVERAGE * (1 - LEAST_COVERAGE) / n_intervals) ** 0.5
    return float(row["value"]) < LEAST_COVERAGE - 2 * error


def _error_rates(pairs: dict[str, Pair], versions: list[str]) -> list[str]:
    lines = [
        f"| Share of null runs with a finding (nominal at most 0.05) | {versions[0]} | "
        f"{versions[1]} | runs |",
        "|---|---|---|---|",
    ]
    for name, pair in pairs.items():
        cells = [_number(row, None if row is None else too_often(row)) for row in pair]
        lines.append(f"| {name} | {' | '.join(cells)} | {_runs(pair)} |")
    return lines


def _biases(pairs: dict[str, Pair], versions: list[str]) -> list[str]:
    lines = [
        f"| Mean of the number reported less the true one | {versions[0]} | {versions[1]} | runs |",
        "|---|---|---|---|",
    ]
    for name, pair in pairs.items():
        cells = ["" if row is None else f"{float(row['value']):+.3f}" for row in pair]
        lines.append(f"| {name} | {' | '.join(cells)} | {_runs(pair)} |")
    return lines


def _coverages(pairs: dict[str, Pair]) -> list[str]:
    """One line per quantity and n with a column per true value, then those of one true value."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, pair in pairs.items():
        what, at = name.split("; ")
        n = re.findall(r"n=(\d+)", at)[0]
        value = (re.findall(r"value=([\d.]+)", at) or [""])[0]
        cells.setdefault((what, n), {})[value] = " → ".join(map(_coverage, pair))
    order = list(dict.fromkeys(what for what, _ in cells))
    sizes = sorted({n for _, n in cells}, key=int)
    values = ["0.5", "0.8", "0.97", "0.99"]
    lines = [
        f"| Coverage of 95 % intervals | n | {' | '.join(f'true value {v}' for v in values)} |",
        "|---|---|---|---|---|---|",
    ]
    others = [
        f"| Coverage of 95 % intervals | {' | '.join(f'n = {n}' for n in sizes)} |",
        "|---" * 4 + "|",
    ]
    for what in order:
        by_size = {n: cells[what, n] for n in sizes if (what, n) in cells}
        if all("" in by_value for by_value in by_size.values()):
            others.append(f"| {what} | {' | '.join(v[''] for v in by_size.values())} |")
            continue
        for n, by_value in by_size.items():
            lines.append(f"| {what} | {n} | {' | '.join(by_value.get(v, '') for v in values)} |")
    return [*lines, "", *others]


def _coverage(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["no_interval"] == 1:
        return "none"
    text = _number(row, too_rarely(row))
    return f"{text} ({row['no_interval']:.0%} none)" if row["no_interval"] >= 0.01 else text


def _number(row: Row | None, wrong: bool | None) -> str:
    if row is None:
        return "–"
    text = f"{float(row['value']):.2f}"
    return f"**{text}**" if wrong else text


def _runs(pair: Pair) -> str:
    return str(int(next(r for r in reversed(pair) if r is not None)["n_runs"]))


if __name__ == "__main__":
    main()
