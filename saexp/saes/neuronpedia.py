"""Links to Neuronpedia, made from the id that the catalogue or the SAE's own config gives."""

import json
import re
from collections.abc import Sequence
from urllib.parse import quote

from saexp.errors import SAEError
from saexp.saes.base import SAE

SITE = "https://neuronpedia.org"
EMBEDDED = "embed=true&embedexplanation=true&embedplots=true&embedtest=false"
"""What Neuronpedia shows of a latent inside another page."""


def neuronpedia_id(sae: SAE) -> str | None:
    """`gemma-2-2b/12-gemmascope-res-16k`; None where neither catalogue nor config names one.

    Never made from the model's name: not every SAE of a model is there. Raises SAEError for an id
    that is not `<model>/<source>`.
    """
    found = sae.metadata.get("neuronpedia_id")
    if not found:
        return None
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", str(found)):
        name = sae.metadata.get("name", "the SAE")
        raise SAEError(f"{name}: its Neuronpedia id '{found}' is not of the form <model>/<source>")
    return str(found)


def neuronpedia_url(sae: SAE, latent: int) -> str | None:
    """The latent's page; None for an SAE that has no id. Raises SAEError for no such latent."""
    _check(sae, [latent])
    place = neuronpedia_id(sae)
    return None if place is None else f"{SITE}/{place}/{latent}"


def neuronpedia_list(sae: SAE, latents: Sequence[int], name: str = "saexp") -> str | None:
    """One page with several latents (a quick list), in the order given; None as above.

    Raises SAEError for no such latent, or for none at all.
    """
    if not len(latents):
        raise SAEError("neuronpedia_list needs at least one latent")
    _check(sae, latents)
    place = neuronpedia_id(sae)
    if place is None:
        return None
    model, source = place.split("/")
    features = [{"modelId": model, "layer": source, "index": str(f)} for f in latents]
    return f"{SITE}/quick-list/?name={quote(name)}&features={quote(json.dumps(features))}"


def _check(sae: SAE, latents: Sequence[int]) -> None:
    wrong = next((f for f in latents if not 0 <= f < sae.d_sae), None)
    if wrong is not None:
        name = sae.metadata.get("name", "the SAE")
        raise SAEError(f"latent {wrong}: {name} has latents 0-{sae.d_sae - 1}")
