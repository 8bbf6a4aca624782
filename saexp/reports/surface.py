"""The surface baseline in words."""

from collections.abc import Mapping

from saexp.reports.saved import SavedRun

_KEY = "contrast/surface_auroc_test"
Metrics = Mapping[str, float | int | None]


def surface_sentences(run: SavedRun) -> list[str]:
    """What the text alone says; nothing for a run that has no such baseline."""
    auroc = run.metrics.get(_KEY)
    if auroc is None:
        return []
    return [
        "The surface baseline (tokens and n-grams of the text, no model) has AUROC "
        f"{auroc:.3f}{_interval(run.metrics, _KEY)}."
    ]


def above_surface(metrics: Metrics, group: str) -> str:
    """ " It is 0.526 [0.47, 0.58] above the surface baseline.", or that it is not; "" without."""
    key = f"contrast/best_minus_surface_{group}_test"
    difference, low = metrics.get(key), metrics.get(f"{key}_ci_low")
    if difference is None:
        return ""
    interval = _interval(metrics, key)
    if low is None:
        return f" Its AUROC less the surface baseline's is {difference:+.3f}, without an interval."
    if low > 0:
        return f" Its AUROC is {difference:.3f}{interval} above the surface baseline's."
    return (
        " It is not distinguishable from surface cues: its AUROC less the surface baseline's is "
        f"{difference:+.3f}{interval}."
    )


def _interval(metrics: Metrics, key: str) -> str:
    low, high = metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high")
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
