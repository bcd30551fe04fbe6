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
    from lmim_jax import checkpoint, runs
    from lmim_jax.errors import UserError

    method = runs.open_run(run).method
    params, teacher = checkpoint.weights(run, method)
    if target and "encoder" not in teacher:
        raise UserError(f"{run}: its method has no target encoder")
    return method, {**params, **teacher} if target else params
