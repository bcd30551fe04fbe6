"""Latent Masked Image Modeling in JAX: pretrains Vision Transformers without labels."""


def load(run, target=False):
    """Open a run in a notebook: its method and its newest weights.

    Args:
      run: the --workdir of a run.
      target: the teacher's encoder instead of the online one.

    Returns:
      (method, params); `method.features(params, images)` gives features, see methods/base.py.

    Raises:
      UserError: no run, no checkpoint, or no target encoder there.
    """
    import json
    import pathlib

    from lmim_jax import checkpoint
    from lmim_jax.errors import UserError
    from lmim_jax.methods import base

    path = pathlib.Path(run, "config.json")
    if not path.is_file():
        raise UserError(f"{run} is no run: it has no config.json; give the --workdir of one")
    method = base.from_config(json.loads(path.read_text())["method"], total_steps=1, steps_per_epoch=1)
    params, teacher = checkpoint.weights(run, method)
    if target and "encoder" not in teacher:
        raise UserError(f"{run}: its method has no target encoder")
    return method, {**params, **teacher} if target else params
