"""The recipes: what to train and how, by name (`--config=vit_b`) or by path (`--config=configs/vit_b.py`).

`vit_b` explains every option; the other recipes are its differences. Installed, this folder is `lmim_jax.configs`.
"""
