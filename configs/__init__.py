"""The recipes, found by name (`--config=vit_b`) or by path (`--config=configs/vit_b.py`).

`vit_b` explains every option; the other recipes are its differences. In an installed package this
folder is `lmim_jax.configs`, and recipes import one another by that name everywhere.
"""
