"""Train: python main.py --config=vit_b --workdir=DIR, the same as `lmim train`."""

import sys

from lmim_jax.cli.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
