"""Latent Masked Image Modeling in JAX: pretrains Vision Transformers without labels."""


def load(run, target=False):
    """Open a run in a notebook: its method and its newest weights; or a folder that `tools.export --format=flax` made.

    Args:
      run: the --workdir of a run, or the exported folder, whose weights were chosen when it was made.
      target: the teacher's encoder instead of the online one.

    Returns:
      (method, params); `method.features(params, images)` gives features, see methods/base.py.

    Raises:
      UserError: no run, no checkpoint, or no target encoder there.
    """
    from lmim_jax.train import saved

    model = saved.open_model(run)
    which = model.choose("target" if target else model.exported or "online")
    return model.method, model.weights(which)
