"""Where the YAML options are: inside the package in a wheel, beside it in a checkout."""

from pathlib import Path


def conf_folder() -> Path:
    """Absolute path of `conf/`."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
