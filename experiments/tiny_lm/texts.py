"""Write fresh documents of the tiny world, one a line: what its SAEs are trained on.

python experiments/tiny_lm/texts.py --out build/texts.txt
"""

import argparse
from pathlib import Path

import numpy as np
from corpus import document
from tokenizer import make_world

N_DOCUMENTS = 16_000

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world, _ = make_world(0)
    rng = np.random.default_rng(args.seed + 500)
    texts = [document(world, rng, statements=0.5).text for _ in range(N_DOCUMENTS)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(texts) + "\n", encoding="utf-8")
