"""The table of an SAE's self-check: what it does on neutral text beside what is said of it."""

from typing import Any

from saexp.reports.saved import SavedRun

HEAD = ["at", "quantity", "here", "said to be", "allowed", "verdict"]


def fit_rows(run: SavedRun) -> list[list[Any]]:
    """Rows of check.parquet for reading; none where the run did not look."""
    table = run.table("check")
    if table is None:
        return []
    shown = []
    for row in table.to_dict("records"):
        other = row["verdict"] == "other reading"
        known = row["expected"] == row["expected"]
        said = row["expected"] if known else ("" if other else "unknown")
        words = [row["tolerance"], row["verdict"]]
        shown.append([row["hookpoint"], row["quantity"], row["here"], said, *words])
    return shown
