"""Train: python main.py --config=configs/vit_b.py --workdir=DIR [--config.KEY=VALUE ...]; the same as `lmim train`."""

from lmim_jax.cli import train

if __name__ == "__main__":
    train.run()
