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
    chance = "" if _is_above_chance(run.metrics) else ", not above chance"
    return [
        "The surface baseline (tokens and n-grams of the text, no model) has AUROC "
        f"{auroc:.3f}{_interval(run.metrics, _KEY)}{chance}."
    ]


def _is_above_chance(metrics: Metrics) -> bool:
    low = metrics.get(f"{_KEY}_ci_low")
    return low is not None and low > 0.5


def above_surface(metrics: Metrics, group: str) -> str:
    """ " It is 0.526 [0.47, 0.58] above the surface baseline.", or that it is not; "" without.

    Also "" above a baseline that is not above chance itself: how far would say nothing.
    """
    key = f"contrast/best_minus_surface_{group}_test"
    difference, low = metrics.get(key), metrics.get(f"{key}_ci_low")
    if difference is None:
        return ""
    interval = _interval(metrics, key)
    if low is None:
        return f" Its AUROC less the surface baseline's is {difference:+.3f}, without an interval."
    if low > 0 and not _is_above_chance(metrics):
        return ""
    if low > 0:
        return f" Its AUROC is {difference:.3f}{interval} above the surface baseline's."
    return (
        " It is not distinguishable from surface cues: its AUROC less the surface baseline's is "
        f"{difference:+.3f}{interval}."
    )


def _interval(metrics: Metrics, key: str) -> str:
    low, high = metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high")
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
