"""Shares of placebo trials that would have been reported as findings."""

from saexp.stats.proportions import wilson


def claim_share(name: str, n_claims: int, n: int) -> dict[str, float | int | None]:
    """Metric `name`, n_claims / n, with `_n` and its Wilson interval; null where n is 0."""
    low, high = wilson(n_claims, n)
    values = (n_claims / n, float(low), float(high)) if n else (None, None, None)
    names = (name, f"{name}_ci_low", f"{name}_ci_high")
    return {f"{name}_n": n, **dict(zip(names, values, strict=True))}
