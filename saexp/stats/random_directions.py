"""Random directions as controls, seeded by what they are compared with."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def derived_seed(seed: int, *of: object) -> int:
    """A seed for one purpose: it depends on all of `of`, a layer or a stream among them."""
    digest = hashlib.sha256(repr((seed, *of)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_directions(n: int, d: int, seed: int, *of: object) -> Float[Tensor, "n d"]:
    """Unit vectors, uniform on the sphere; unrelated where `seed` or anything in `of` differs.

    `of` holds what the directions belong to, such as the stream's name, so that controls of two
    layers share nothing. Drawn on the CPU in float32: equal on every device, and the first rows
    are the same for any `n`.

    >>> random_directions(2, 64, 0, "layer_1.resid_post").norm(dim=-1)
    tensor([1., 1.])
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, d, *of))
    rows = [torch.randn(d, generator=generator) for _ in range(n)]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1) if n else torch.empty(0, d)
