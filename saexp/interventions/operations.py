"""Operations on a stream, and those of a batch of rows as one function per stream."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import EditFunction
from saexp.saes.sae import SparseAutoencoder

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


SAEs = Mapping[Hookpoint, SparseAutoencoder]
"""SAEs by the hookpoint that they read."""


class _Padded:
    """Per row a list of (column, gain, target, rule), as tensors `[b, k]`; padding has gain 0."""

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
    """Distinct things in the order they came."""

    def number(self, thing: Any) -> int:
        return self.setdefault(thing, len(self))


class StreamProgram:
    """Everything that a batch does to one stream."""

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
        self._kept: Tensor | None = None
        """Rows that were kept before the tensors were built."""

    def add(self, row: int, op: Any, sae: SparseAutoencoder | None) -> None:
        """Take in one operation of one row."""
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
        """Turn what was taken in into tensors, once."""
        made, device = self.tensors, self.device
        if self.added:
            rows = torch.tensor([row for row, _ in self.added])
            gains = torch.tensor([op.coefficient for _, op in self.added])
            steps = torch.stack([op.vector.values for _, op in self.added]) * gains[:, None]
            made["added"] = torch.zeros(self.n_rows, d).index_add_(0, rows, steps).to(device)
        if self.moves:
            assert self.sae is not None
            made["moves"] = self.moves.tensors(device)
            made["directions"] = self.sae.directions(list(self.writing)).float().to(device)
        if self.projections:
            made["projections"] = self.projections.tensors(device)
            made["basis"] = torch.cat(self.basis).to(device)
        if self.splices:
            gain, instead = torch.zeros(self.n_rows), torch.zeros(self.n_rows, d)
            for row, op in self.splices.items():
                gain[row] = op.coefficient
                if op.instead is not None:
                    instead[row] = op.instead.values
            error = torch.tensor(
                [r in self.splices and self.splices[r].error for r in range(self.n_rows)]
            )
            made["splices"] = (gain.to(device), instead.to(device), error.to(device))
        if self._kept is not None:
            self._select(self._kept)

    def keep(self, chosen: Tensor) -> None:
        """Go on with these rows only; patches are of the prompt and end with it.

        Where only generated tokens are changed, rows can end before anything was built.
        """
        if self.tensors:
            self._select(chosen)
        else:
            self._kept = chosen if self._kept is None else self._kept[chosen]

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
        """New values of `n` positions, `row_of` their rows; `source` is what the SAE reads there.

        All operations of a row read the values before any of them, and their changes add up.
        """
        made, new = self.tensors, old
        if "added" in made:
            new = new + made["added"][row_of]
        if "moves" in made:
            new = new + self._moved(source, row_of)
        if "projections" in made:
            read, write, gain, target, _ = (t[row_of] for t in made["projections"])
            component = (old @ made["basis"].T).gather(1, read)
            steps = torch.zeros(len(old), len(made["basis"]), device=old.device)
            steps.scatter_add_(1, write, gain * (target - component))
            new = new + steps @ made["basis"]
        if "splices" in made:
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
        mine = (gain != 0).nonzero()[:, 0]
        x = source[mine]
        made = self.sae.decode(self.sae.encode(x), x).float().to(old.device)
        before = old[mine]
        step = (made - before).norm(dim=-1, keepdim=True) * instead[mine]
        made = torch.where(instead[mine].any(-1, keepdim=True), before + step, made)
        made = torch.where(error[mine, None], made + (before - made), made)
        new = new.clone()
        new[mine] = new[mine] - before + torch.lerp(before, made, gain[mine, None])
        return new

    def patched(self, new: Tensor, row_of: Tensor) -> Tensor:
        """Put patches in; `new` holds all the rows' positions in order."""
        new = new.clone()
        for row, op in self.patches.items():
            # Generated tokens that a row is continued with come after those of its prompt.
            mine = (row_of == row).nonzero()[: len(op.values.values), 0]
            start, end = op.columns or (0, new.shape[1])
            values = op.values.values.to(new.device)[:, start:end]
            old = new[mine]
            old[:, start:end] = torch.lerp(old[:, start:end], values, op.coefficient)
            new[mine] = old
        return new


class BatchEdit:
    """The rows of a batch, left-padded to `width` prompt tokens."""

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
        """Blocks from the first on in whose streams, and outputs but the last's, nothing is read
        or changed."""
        lowest = (
            0 if h.stream == "embed" else h.layer + (h.stream == "resid_post") for h in self.streams
        )
        return min(lowest, default=n_layers)

    def keep(self, chosen: Tensor) -> None:
        """Go on with these rows only (after the prompt)."""
        self.at_prompt, self.at_generated = self.at_prompt[chosen], self.at_generated[chosen]
        for program in self.programs.values():
            program.keep(chosen)
        if self.then is not None:
            self.then.keep(chosen)

    def functions(self, window: int | None) -> dict[Hookpoint, EditFunction]:
        """Edits of a pass over the prompt's last `window` tokens; None: over one generated token.

        A stream in which nothing is changed has no function, so it keeps every bit.
        """
        made = self._own_functions(window)
        further = {} if self.then is None else self.then.functions(window)
        for at, function in further.items():
            made[at] = _composed(made[at], function) if at in made else function
        return made

    def _own_functions(self, window: int | None) -> dict[Hookpoint, EditFunction]:
        mask = self.at_generated[:, None]
        if window is not None:
            mask = self.at_prompt[:, self.at_prompt.shape[1] - window :]
        if not self.programs or not bool(mask.any()):
            return {}
        made: dict[Hookpoint, EditFunction] = {}
        row_of, token_of = mask.nonzero(as_tuple=True)
        where = (row_of, token_of)
        seen: dict[Hookpoint, Tensor] = {}
        for at, program in self.programs.items():
            source = self.sources.get(at)
            if source is not None:
                made[source] = _remember(seen, source)
            made[at] = _writer(program, where, seen, source, prompt=window is not None)
        return made


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
