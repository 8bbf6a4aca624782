"""Operations on a stream, row by row; each is a value that can be compared."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from saexp.models.hookpoints import Hookpoint

RULES = ("always", "active", "at_least")
"""When a latent is moved to its target: always, only where it fires, or only where it is below."""


class Vector:
    """Numbers that are equal, and hash alike, where all of them are."""

    __slots__ = ("digest", "values")

    def __init__(self, values: Float[Tensor, "..."]) -> None:
        self.values = values.detach().float().cpu().contiguous()
        content = self.values.numpy().tobytes()
        shape = repr(tuple(self.values.shape)).encode()
        self.digest = hashlib.sha256(shape + content).hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vector) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Vector({self.digest})"


@dataclass(frozen=True)
class Add:
    """x + coefficient * vector, at the hookpoint that is written."""

    hookpoint: Hookpoint
    vector: Vector
    """`[d]`."""
    coefficient: float


@dataclass(frozen=True)
class Move:
    """x + coefficient * sum_i (targets[i] - a(read[i])) * direction(write[i]).

    a is a latent's own value at that position, so the reconstruction error is kept; coefficient 1
    puts each latent at its target. Target 0 is ablation; coefficient 1 - s with target 0 scales by
    s. `rule` says where: see RULES.
    """

    hookpoint: Hookpoint
    """What the SAE reads; a transcoder's directions are written at its `hookpoint_out`."""
    read: tuple[int, ...]
    write: tuple[int, ...]
    targets: tuple[float, ...]
    coefficient: float
    rule: str = "always"


@dataclass(frozen=True)
class Project:
    """x + coefficient * (target - B x) B for orthonormal rows B: coefficient 1 removes B's span."""

    hookpoint: Hookpoint
    basis: Vector
    """`[k, d]`, orthonormal rows."""
    coefficient: float
    targets: tuple[float, ...] = ()
    """`[k]`: components wanted; zeros where not given."""


@dataclass(frozen=True)
class Splice:
    """The SAE's reconstruction in place of the activation: x + coefficient * (x^ - x).

    With `error` what is missed is added back and nothing changes but rounding. With `instead`, a
    unit vector `[d]`, a step of the same length is taken that way instead: the control.
    """

    hookpoint: Hookpoint
    coefficient: float
    error: bool = False
    instead: Vector | None = None


@dataclass(frozen=True)
class Patch:
    """Values from another run in place of the activation: x + coefficient * (values - x)."""

    hookpoint: Hookpoint
    values: Vector
    """`[n, d]`, one per changed prompt token of the row, in order; none for generated tokens."""
    coefficient: float
    columns: tuple[int, int] | None = None
    """[start, end) of the stream that is replaced, such as one head's part of attn_z."""


Op = Add | Move | Project | Splice | Patch


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest one."""

    temperature: float
    seed: int
    """Rows that differ in it are different samples."""


@dataclass(frozen=True)
class Row:
    """One prompt, and what is done to it."""

    ids: tuple[int, ...]
    """Prompt tokens, special ones included."""
    ops: tuple[Op, ...] = ()
    positions: tuple[int, ...] = ()
    """Prompt tokens that are changed, absolute and in order."""
    generated: bool = False
    """Whether generated tokens are changed too."""
    sample: Sampling | None = None
    """None: greedy."""
    about: tuple[Any, ...] = ()
    """What else its reading depends on, such as the tokens compared."""
    then: "Row | None" = None
    """Further changes of the same prompt, which read the streams as the changes of this row leave
    them; both are active."""

    @cached_property
    def active(self) -> tuple[Op, ...]:
        """Operations that do something; none where no token is changed."""
        if not self.positions and not self.generated:
            return ()
        return tuple(op for op in self.ops if op.coefficient != 0)

    def followed_by(self, tokens: Sequence[int]) -> "Row":
        """With generated tokens as the end of its prompt, changed where generated ones are."""
        start = len(self.ids)
        changed = range(start, start + len(tokens)) if self.generated else ()
        positions = (*self.positions, *changed)
        then = None if self.then is None else self.then.followed_by(tokens)
        return replace(self, ids=(*self.ids, *tokens), positions=positions, then=then)

    @property
    def first_changed(self) -> int:
        """Index of the first changed prompt token; all before it are as without the operations."""
        own = min(self.positions) if self.active and self.positions else len(self.ids)
        return own if self.then is None else min(own, self.then.first_changed)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Rows with one key have one result: no operation and coefficient 0 are the same."""
        if not self.active:
            return (self.ids, self.sample, self.about)
        changed = (self.active, self.positions, self.generated)
        further = () if self.then is None else (self.then.key,)
        return (self.ids, self.sample, self.about, *changed, *further)
