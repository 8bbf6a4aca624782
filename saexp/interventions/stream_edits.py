"""Operations on a stream, and those of a batch of rows as one function per stream."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saexp.models import Hookpoint
from saexp.models.hooks import EditFunction
from saexp.saes import SparseAutoencoder

RULES = ("always", "active", "at_least")
"""Where a latent is moved to its target: always, only where it is active, or only where it is below
the target."""


class Vector:
    """A tensor that compares and hashes by its values."""

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
    """Steering: x + coefficient * vector, written at the hookpoint."""

    hookpoint: Hookpoint
    vector: Vector
    """`[d]`."""
    coefficient: float


@dataclass(frozen=True)
class Move:
    """x + coefficient * sum_i (targets[i] - a(read[i])) * direction(write[i]).

    a is the latent's activation at that position, so the reconstruction error is kept. Coefficient
    1 moves each latent to its target; target 0 ablates it; coefficient 1 - s with target 0 scales
    it by s. `rule` is one of RULES.
    """

    hookpoint: Hookpoint
    """Stream that the SAE reads; directions of a transcoder are written at its `hookpoint_out`."""
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
    """`[k]`: target components; zeros if empty."""


@dataclass(frozen=True)
class Splice:
    """Replace the activation by the SAE's reconstruction x^: x + coefficient * (x^ - x).

    With `error` the reconstruction error is added back, so that only rounding changes. With the
    unit vector `instead`, `[d]`, the step has the same length but this direction: the control.
    """

    hookpoint: Hookpoint
    coefficient: float
    error: bool = False
    instead: Vector | None = None


@dataclass(frozen=True)
class Patch:
    """Replace the activation by values of another run: x + coefficient * (values - x)."""

    hookpoint: Hookpoint
    values: Vector
    """`[n, d]`, one row per changed prompt token, in order; generated tokens are not patched."""
    coefficient: float
    columns: tuple[int, int] | None = None
    """[start, end) of the stream's columns that are replaced, such as one head of attn_z."""


Op = Add | Move | Project | Splice | Patch


@dataclass(frozen=True)
class Sampling:
    """Sample tokens instead of taking the argmax."""

    temperature: float
    seed: int
    """Different seeds give different samples."""


@dataclass(frozen=True)
class Row:
    """One prompt and the operations on it."""

    ids: tuple[int, ...]
    """Prompt tokens, special ones included."""
    ops: tuple[Op, ...] = ()
    positions: tuple[int, ...] = ()
    """Indices of the prompt tokens that are changed, in order."""
    generated: bool = False
    """Whether generated tokens are changed too."""
    sample: Sampling | None = None
    """None: greedy."""
    about: tuple[Any, ...] = ()
    """Whatever else its result depends on, such as the tokens that are compared."""
    then: "Row | None" = None
    """A row with further operations on the same prompt, which read the streams as changed by the
    operations of this row; both must be active."""

    @cached_property
    def active(self) -> tuple[Op, ...]:
        """Operations that change something; empty where no token is changed."""
        if not self.positions and not self.generated:
            return ()
        return tuple(op for op in self.ops if op.coefficient != 0)

    def followed_by(self, tokens: Sequence[int]) -> "Row":
        """The row with generated tokens appended to its prompt; they are changed if `generated`."""
        start = len(self.ids)
        changed = range(start, start + len(tokens)) if self.generated else ()
        positions = (*self.positions, *changed)
        then = None if self.then is None else self.then.followed_by(tokens)
        return replace(self, ids=(*self.ids, *tokens), positions=positions, then=then)

    @property
    def first_changed(self) -> int:
        """Index of the first changed prompt token; earlier ones are as without the operations."""
        own = min(self.positions) if self.active and self.positions else len(self.ids)
        return own if self.then is None else min(own, self.then.first_changed)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows with equal results; coefficient 0 counts as no operation."""
        if not self.active:
            return (self.ids, self.sample, self.about)
        changed = (self.active, self.positions, self.generated)
        further = () if self.then is None else (self.then.key,)
        return (self.ids, self.sample, self.about, *changed, *further)


SAEs = Mapping[Hookpoint, SparseAutoencoder]
"""SAEs by the hookpoint that they read."""


class _Padded:
    """Per row a list of (read, write, gain, target, rule); padding has gain 0."""

    def __init__(self, n_rows: int) -> None:
        self.entries: list[list[tuple[int, int, float, float, int]]] = [[] for _ in range(n_rows)]

    def __bool__(self) -> bool:
        return any(self.entries)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(read, write, gain, target, rule), each `[b, k]`."""
        k = max(len(e) for e in self.entries)
        padded = [[*e, *[(0, 0, 0.0, 0.0, 0)] * (k - len(e))] for e in self.entries]
        kinds = (torch.long, torch.long, torch.float, torch.float, torch.long)
        return tuple(  # pyright: ignore[reportReturnType]
            torch.tensor([[x[i] for x in row] for row in padded], dtype=kind, device=device)
            for i, kind in enumerate(kinds)
        )


class _Numbered(dict[Any, int]):
    """Numbers of distinct keys in the order in which they were added."""

    def number(self, thing: Any) -> int:
        return self.setdefault(thing, len(self))


class StreamProgram:
    """All operations of a batch on one stream."""

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self.device, self.n_rows = device, n_rows
        self.added: list[tuple[int, Add]] = []
        self.moves, self.projections = _Padded(n_rows), _Padded(n_rows)
        self.sae: SparseAutoencoder | None = None
        self.reading, self.writing = _Numbered(), _Numbered()
        self.basis: list[Tensor] = []
        self.basis_numbers: dict[str, int] = {}
        self.splices: dict[int, Splice] = {}
        self.patches: dict[int, Patch] = {}
        self.tensors: dict[str, Any] = {}
        self._selected: Tensor | None = None
        """Rows that were selected before the tensors were built."""

    def add(self, row: int, op: Any, sae: SparseAutoencoder | None) -> None:
        """Add one operation of one row."""
        if isinstance(op, Add):
            self.added.append((row, op))
        elif isinstance(op, Move):
            self.sae = sae
            rule = RULES.index(op.rule)
            for read, write, target in zip(op.read, op.write, op.targets, strict=True):
                columns = (self.reading.number(read), self.writing.number(write))
                self.moves.entries[row].append((*columns, op.coefficient, target, rule))
        elif isinstance(op, Project):
            start = self.basis_numbers.get(op.basis.digest)
            if start is None:
                start = sum(map(len, self.basis))
                self.basis_numbers[op.basis.digest] = start
                self.basis.append(op.basis.values)
            targets = op.targets or (0.0,) * len(op.basis.values)
            self.projections.entries[row] += [
                (start + i, start + i, op.coefficient, t, 0) for i, t in enumerate(targets)
            ]
        elif isinstance(op, Splice):
            if sae is not None and not op.error:
                sae.check_reconstructs()
            self.sae = sae
            self.splices[row] = op
        else:
            self.patches[row] = op

    def build(self, d: int) -> None:
        """Turn the operations into tensors, once."""
        tensors, device = self.tensors, self.device
        if self.added:
            rows = torch.tensor([row for row, _ in self.added])
            gains = torch.tensor([op.coefficient for _, op in self.added])
            steps = torch.stack([op.vector.values for _, op in self.added]) * gains[:, None]
            tensors["added"] = torch.zeros(self.n_rows, d).index_add_(0, rows, steps).to(device)
        if self.moves:
            assert self.sae is not None
            tensors["moves"] = self.moves.tensors(device)
            tensors["directions"] = self.sae.directions(list(self.writing)).float().to(device)
        if self.projections:
            tensors["projections"] = self.projections.tensors(device)
            tensors["basis"] = torch.cat(self.basis).to(device)
        if self.splices:
            gain, instead = torch.zeros(self.n_rows), torch.zeros(self.n_rows, d)
            for row, op in self.splices.items():
                gain[row] = op.coefficient
                if op.instead is not None:
                    instead[row] = op.instead.values
            error = torch.tensor(
                [r in self.splices and self.splices[r].error for r in range(self.n_rows)]
            )
            tensors["splices"] = (gain.to(device), instead.to(device), error.to(device))
        if self._selected is not None:
            self._select(self._selected)

    def keep(self, chosen: Tensor) -> None:
        """Continue with these rows only. Patches apply to the prompt, so they end with it.

        Where only generated tokens are changed, rows can end before the tensors are built.
        """
        if self.tensors:
            self._select(chosen)
        else:
            self._selected = chosen if self._selected is None else self._selected[chosen]

    def _select(self, chosen: Tensor) -> None:
        for name in ("added",):
            if name in self.tensors:
                self.tensors[name] = self.tensors[name][chosen]
        for name in ("moves", "projections", "splices"):
            if name in self.tensors:
                self.tensors[name] = tuple(t[chosen] for t in self.tensors[name])

    def change(
        self, old: Float[Tensor, "n d"], source: Float[Tensor, "n d_in"], row_of: Tensor
    ) -> Float[Tensor, "n d"]:
        """New values at `n` positions of the rows `row_of`; `source` is the SAE's input there.

        All operations of a row read the unchanged values, and their changes add up.
        """
        tensors, new = self.tensors, old
        if "added" in tensors:
            new = new + tensors["added"][row_of]
        if "moves" in tensors:
            new = new + self._moved(source, row_of)
        if "projections" in tensors:
            read, write, gain, target, _ = (t[row_of] for t in tensors["projections"])
            component = (old @ tensors["basis"].T).gather(1, read)
            steps = torch.zeros(len(old), len(tensors["basis"]), device=old.device)
            steps.scatter_add_(1, write, gain * (target - component))
            new = new + steps @ tensors["basis"]
        if "splices" in tensors:
            new = self._spliced(old, new, source, row_of)
        return new

    def _moved(self, source: Float[Tensor, "n d_in"], row_of: Tensor) -> Float[Tensor, "n d"]:
        assert self.sae is not None
        read, write, gain, target, rule = (t[row_of] for t in self.tensors["moves"])
        acts = self.sae.encode_latents(source, list(self.reading)).float().gather(1, read)
        gap = target - acts
        gap = torch.where((rule == 1) & (acts <= 0), 0.0, gap)
        gap = torch.where(rule == 2, gap.clamp(min=0), gap)
        directions = self.tensors["directions"]
        steps = torch.zeros(len(source), len(directions), device=source.device)
        steps.scatter_add_(1, write, gain * gap)
        return (steps @ directions) * self.sae.row_scale(source)

    def _spliced(self, old: Tensor, new: Tensor, source: Tensor, row_of: Tensor) -> Tensor:
        assert self.sae is not None
        gain, instead, error = (t[row_of] for t in self.tensors["splices"])
        spliced = (gain != 0).nonzero()[:, 0]
        x = source[spliced]
        reconstruction = self.sae.decode(self.sae.encode(x), x).float().to(old.device)
        before = old[spliced]
        step = (reconstruction - before).norm(dim=-1, keepdim=True) * instead[spliced]
        reconstruction = torch.where(
            instead[spliced].any(-1, keepdim=True), before + step, reconstruction
        )
        reconstruction = torch.where(
            error[spliced, None], reconstruction + (before - reconstruction), reconstruction
        )
        new = new.clone()
        new[spliced] = (
            new[spliced] - before + torch.lerp(before, reconstruction, gain[spliced, None])
        )
        return new

    def patched(self, new: Tensor, row_of: Tensor) -> Tensor:
        """Apply patches; `new` holds the positions of all rows in order."""
        new = new.clone()
        for row, op in self.patches.items():
            # Generated tokens that were appended to a row come after those of its prompt.
            positions = (row_of == row).nonzero()[: len(op.values.values), 0]
            start, end = op.columns or (0, new.shape[1])
            values = op.values.values.to(new.device)[:, start:end]
            old = new[positions]
            old[:, start:end] = torch.lerp(old[:, start:end], values, op.coefficient)
            new[positions] = old
        return new


class BatchEdit:
    """Operations of a batch of rows, left-padded to `width` prompt tokens."""

    def __init__(self, rows: Sequence[Row], width: int, saes: SAEs, device: torch.device) -> None:
        self.at_prompt = torch.zeros(len(rows), width, dtype=torch.bool)
        self.at_generated = torch.zeros(len(rows), dtype=torch.bool)
        changed: tuple[list[int], list[int]] = ([], [])
        self.programs: dict[Hookpoint, StreamProgram] = {}
        self.sources: dict[Hookpoint, Hookpoint] = {}
        for i, row in enumerate(rows):
            active = row.active
            if not active:
                continue
            start = width - len(row.ids)
            changed[0].extend([i] * len(row.positions))
            changed[1].extend([start + p for p in row.positions])
            if row.generated:
                self.at_generated[i] = True
            for op in active:
                sae = saes.get(op.hookpoint)
                at = op.hookpoint
                if isinstance(op, Move | Splice) and sae is not None and sae.hookpoint_out:
                    at = sae.hookpoint_out
                    self.sources[at] = op.hookpoint
                if at not in self.programs:
                    self.programs[at] = StreamProgram(len(rows), device)
                self.programs[at].add(i, op, sae)
        self.at_prompt[changed] = True
        self.at_prompt = self.at_prompt.to(device)
        self.at_generated = self.at_generated.to(device)
        self.then: BatchEdit | None = None
        if any(row.then for row in rows):
            further = [row.then or Row(row.ids) for row in rows]
            self.then = BatchEdit(further, width, saes, device)

    @property
    def streams(self) -> list[Hookpoint]:
        """Streams that are read or changed."""
        own = [h.stored for h in (*self.programs, *self.sources.values())]
        return own if self.then is None else [*own, *self.then.streams]

    def n_untouched(self, n_layers: int) -> int:
        """Number of blocks, from the first one, below all streams that are read or changed."""
        lowest = (
            0 if h.stream == "embed" else h.layer + (h.stream == "resid_post") for h in self.streams
        )
        return min(lowest, default=n_layers)

    def keep(self, chosen: Tensor) -> None:
        """Continue with these rows only (after the prompt)."""
        self.at_prompt, self.at_generated = self.at_prompt[chosen], self.at_generated[chosen]
        for program in self.programs.values():
            program.keep(chosen)
        if self.then is not None:
            self.then.keep(chosen)

    def functions(self, window: int | None) -> dict[Hookpoint, EditFunction]:
        """Edits for a pass over the last `window` tokens of the prompts, or, for None, over one
        generated token.

        A stream in which nothing changes has no function, so it stays bit-equal.
        """
        functions = self._own_functions(window)
        further = {} if self.then is None else self.then.functions(window)
        for at, function in further.items():
            functions[at] = _composed(functions[at], function) if at in functions else function
        return functions

    def _own_functions(self, window: int | None) -> dict[Hookpoint, EditFunction]:
        mask = self.at_generated[:, None]
        if window is not None:
            mask = self.at_prompt[:, self.at_prompt.shape[1] - window :]
        if not self.programs or not bool(mask.any()):
            return {}
        functions: dict[Hookpoint, EditFunction] = {}
        row_of, token_of = mask.nonzero(as_tuple=True)
        where = (row_of, token_of)
        seen: dict[Hookpoint, Tensor] = {}
        for at, program in self.programs.items():
            source = self.sources.get(at)
            if source is not None:
                functions[source] = _remember(seen, source)
            functions[at] = _writer(program, where, seen, source, prompt=window is not None)
        return functions


def _composed(first: EditFunction, second: EditFunction) -> EditFunction:
    return lambda stream: second(first(stream))


def _remember(seen: dict[Hookpoint, Tensor], at: Hookpoint) -> EditFunction:
    def read(stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        seen[at] = stream
        return stream

    return read


def _writer(
    program: StreamProgram,
    where: tuple[Tensor, Tensor],
    seen: dict[Hookpoint, Tensor],
    source: Hookpoint | None,
    *,
    prompt: bool,
) -> EditFunction:
    def write(stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        row_of, token_of = (w.to(stream.device) for w in where)
        if not program.tensors:
            program.build(stream.shape[-1])
        old = stream[row_of, token_of].float()
        read = old if source is None else seen.pop(source)[row_of, token_of].float()
        values = program.change(old, read, row_of)
        if prompt and program.patches:
            values = program.patched(values, row_of)
        new = stream.clone()
        new[row_of, token_of] = values.to(stream.dtype)
        return new

    return write
