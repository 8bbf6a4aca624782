"""Where an SAE's files are, from its config. No torch here."""

from pathlib import Path

from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.saes.catalogue import n_latents

ASSETS = Path(__file__).parent.parent / "assets"


def fill(cfg: SAEConfig) -> Path:
    """`sae.path` with `{assets}`, `{model_name}`, `{layer}` and `{width}` filled in.

    Raises SAEError where it is not set, and for other names in braces.
    """
    if not cfg.path:
        raise SAEError("sae.path is not set; type sae.path=<folder with the SAE's files>")
    width = n_latents(cfg.width)
    names = {"assets": ASSETS, "model_name": cfg.model_name, "layer": cfg.layer, "width": width}
    try:
        return Path(cfg.path.format(**names))
    except (KeyError, ValueError, IndexError) as error:
        raise SAEError(
            f"sae.path={cfg.path}: {{…}} may hold {', '.join(names)} alone; write a brace twice"
        ) from error
