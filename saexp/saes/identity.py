"""What an SAE is known by in the keys of caches."""

from typing import Any

from saexp.digests import code_digest, digest_of


def sae_identity(sae: Any) -> str | None:
    """Digest of all that decides what an SAE makes of its input.

    Weights and config by their files' content, every setting as it is now (an estimated factor, the
    dtype, the streams), and the code of its class. None for weights without a fingerprint, such as
    those of an SAE made in memory: nothing computed with it may be cached.
    """
    code, weights = code_digest(type(sae)), sae.metadata.get("fingerprint")
    if not weights or code is None:
        return None
    settings = {
        name: repr(value)
        for name, value in vars(sae).items()
        if not name.startswith("_") and isinstance(value, str | int | float | None)
    }
    streams = [str(sae.hookpoint), str(getattr(sae, "hookpoint_out", None))]
    config = sae.metadata.get("config_fingerprint")
    return digest_of(weights, config, settings, streams, str(sae.W_dec.dtype), code)
