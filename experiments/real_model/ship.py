"""Ship the SAEs of a training run in this repository, in float16, for sae=smollm2.

    python experiments/real_model/ship.py --run outputs/runs/<run of task=train>

Encoder and decoder are rounded to float16; biases and thresholds, which decide whether a latent is
active, stay in float32. The files keep SAELens' format, so that sae-lens loads them too. What the
rounding changes is measured on the shipped neutral texts and written to saes/shipped.json, with the
command of the training, whose curves are drawn in saes/training.svg.
"""

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

import saexp
from saexp.digests import read_sha256
from saexp.files import show_bytes, write_folder
from saexp.models.resolution import ASSETS
from saexp.saes import SparseAutoencoder
from saexp.saes.formats.saelens import CONFIG, WEIGHTS

log = logging.getLogger(__name__)

SAES = Path(__file__).parent / "saes"
ROUNDED = ("W_enc", "W_dec")
LARGEST = 10 * 10**6
"""Bytes of a weights file at most."""
SHIPPED = "shipped.json"


def shipped_folder(sae: SparseAutoencoder) -> Path:
    """The folder in which `sae=smollm2` expects an SAE."""
    return SAES / f"layer_{sae.hookpoint.layer}" / f"width_{sae.d_sae}"


def ship(source: Path) -> Path:
    """Write the SAE of a SAELens folder in float16 to its `shipped_folder`."""
    tensors = load_file(source / WEIGHTS)
    rounded = {n: t.half() if n in ROUNDED else t.float() for n, t in tensors.items()}
    if not all(bool(t.isfinite().all()) for t in rounded.values()):
        raise saexp.errors.SAEError(f"{source / WEIGHTS} has values beyond float16")

    def write(folder: Path) -> None:
        save_file(rounded, folder / WEIGHTS)
        shutil.copyfile(source / CONFIG, folder / CONFIG)
        for file in folder.iterdir():
            # safetensors makes its files readable to their owner only.
            file.chmod(0o644)

    folder = shipped_folder(saexp.load_sae(str(source), dtype="float32"))
    if folder.exists():
        shutil.rmtree(folder)
    write_folder(folder, write, option="checkout of saexp")
    size = (folder / WEIGHTS).stat().st_size
    if size > LARGEST:
        raise saexp.errors.SAEError(f"{folder / WEIGHTS} has {size:,} bytes, above {LARGEST:,}")
    log.info("%s: %s", folder, show_bytes(size))
    return folder


@torch.inference_mode()
def compare(exact: Any, rounded: Any, acts: torch.Tensor) -> dict[str, float]:
    """What rounding changes on activation vectors `[n, d_in]`, first tokens left out."""
    latents = [sae.encode(acts) for sae in (exact, rounded)]
    outputs = [
        sae.decode(latent, acts) for sae, latent in zip((exact, rounded), latents, strict=True)
    ]
    active = [latent > 0 for latent in latents]
    total = (acts - acts.mean(0)).square().sum()
    explained = [1 - float((acts - output).square().sum() / total) for output in outputs]
    return {
        "n_vectors": len(acts),
        "l0_float32": float(active[0].sum(-1).float().mean()),
        "l0_float16": float(active[1].sum(-1).float().mean()),
        "active_in_one_only": int((active[0] != active[1]).sum()),
        "active_in_float32": int(active[0].sum()),
        "explained_variance_float32": explained[0],
        "explained_variance_float16": explained[1],
        "reconstruction_difference": float((outputs[0] - outputs[1]).norm() / (outputs[0]).norm()),
    }


_PANELS = {"mse_loss": "squared error (scaled)", "explained_variance": "explained variance"}
_COLOURS = ("#4477aa", "#ee6677", "#228833")


def curves(table: pd.DataFrame) -> str:
    """SVG of the training curves, a panel for each of `_PANELS` and a line for each SAE."""
    parts = []
    for number, (column, title) in enumerate(_PANELS.items()):
        left, top, width, height = 60 + 400 * number, 30, 320, 200
        low, high = 0.0, 1.0 if column == "explained_variance" else float(table[column].max())
        last = float(table["step"].max())
        parts.append(
            f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" '
            f'stroke="#999"/><text x="{left}" y="{top - 8}">{title}</text>'
            f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{high:.3g}</text>'
            f'<text x="{left - 6}" y="{top + height}" text-anchor="end">{low:.3g}</text>'
            f'<text x="{left}" y="{top + height + 18}">0</text>'
            f'<text x="{left + width}" y="{top + height + 18}" text-anchor="end">'
            f"step {last:,.0f}</text>"
        )
        for k, (name, part) in enumerate(table.groupby("sae", sort=False)):
            shares = ((part[column].clip(low, high) - low) / (high - low)).tolist()
            xs = (left + width * part["step"] / last).tolist()
            points = " ".join(
                f"{x:.1f},{top + height * (1 - y):.1f}" for x, y in zip(xs, shares, strict=True)
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{_COLOURS[k]}" '
                'stroke-width="1.5"/>'
            )
            if not number:
                label = str(name).replace("layer_", "block ")
                parts.append(
                    f'<text x="{left + width - 70}" y="{top + 20 + 16 * k}" '
                    f'fill="{_COLOURS[k]}">{label}</text>'
                )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 260" font-size="12" '
        f'font-family="sans-serif"><rect width="800" height="260" fill="white"/>{"".join(parts)}'
        "</svg>\n"
    )


def portable(command: str) -> str:
    """The command with the folders of the README in place of those of one machine."""
    words = [w for w in command.split() if not w.startswith(("hydra.", "cache_dir="))]
    text = "dataset.path=outputs/corpus/corpus.jsonl"
    return " ".join(text if w.startswith("dataset.path=") else w for w in words)


def main(run: Path) -> None:
    """Ship every SAE of a run, and write `SHIPPED`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    lines = (ASSETS / "background.txt").read_text("utf-8").splitlines()
    texts = [line for line in lines if line.strip()][:100]
    model = saexp.load_model("smollm2")
    command = json.loads((run / "provenance.json").read_text("utf-8"))["command"]
    shipped: dict[str, Any] = {"command": portable(command), "saes": {}}
    for source in sorted((run / "sae").iterdir()):
        exact = saexp.load_sae(str(source), dtype="float32", device="cpu")
        folder = ship(source)
        rounded = saexp.load_sae(str(folder), dtype="float32", device="cpu")
        acts = model.activations(texts, layer=exact.hookpoint.layer)
        vectors = torch.cat([text[1:] for text in acts]).float().cpu()
        shipped["saes"][source.name] = {
            "sha256": read_sha256(folder / WEIGHTS),
            **compare(exact, rounded, vectors),
        }
        log.info("%s", shipped["saes"][source.name])
    table = pd.read_parquet(run / "training.parquet")
    (SAES / "training.svg").write_text(curves(table), encoding="utf-8")
    (SAES / SHIPPED).write_text(json.dumps(shipped, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of task=train")
    main(parser.parse_args().run)
