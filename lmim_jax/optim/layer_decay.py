"""Layer-wise learning rates for fine-tuning: the deeper below the head, the smaller."""

import re

import jax
import optax

from lmim_jax.optim.adamw import match_rules


def learning_rate_factors(trained, decay):
    """(regex on the path, factor of the learning rate) for {"encoder": ..., and anything above it}.

    Of L blocks, block i has decay^(L - i), all below them (patch and position embeddings, CLS) decay^(L + 1), all above
    them 1. Blocks have parameters of their own, whether or not they are run as a loop (models/stack.py).

    Source: BEiT; MAE, `util/lr_decay.py`.
    """
    blocks = [name for name in trained["encoder"] if re.fullmatch(r"block\d+", name)]
    depth = len(blocks)
    return (
        *((f"encoder/{name}/.*", decay ** (depth - i)) for i, name in enumerate(sorted(blocks))),
        ("encoder/norm/.*", 1.0),
        ("encoder/.*", decay ** (depth + 1)),
        (".*", 1.0),
    )


# Biases, scales of norms, position vectors and CLS are spared.
DECAYED = ((".*(bias|scale|positions|cls_token)", False), (".*", True))


def adamw(rate, trained, *, b1, b2, eps, weight_decay, decay):
    """AdamW with `learning_rate_factors`; the weight decay follows the learning rate of its layer, as in torch."""
    factors = match_rules(learning_rate_factors(trained, decay), trained, "layer_decay")
    scaled = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, factors)
    )
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=match_rules(DECAYED, trained, "weight_decay")),
        scaled,
        optax.scale_by_learning_rate(rate),
    )
