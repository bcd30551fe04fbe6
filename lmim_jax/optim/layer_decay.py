"""Layer-wise learning rates for fine-tuning: the further below the head, the smaller."""

import re
from typing import Any

import optax

from lmim_jax.optim.adamw import Rules, match_rules, scale_by

# Biases, scales of norms, position embeddings, CLS and registers have no weight decay.
DECAY_RULES: Rules = ((".*(bias|scale|positions|cls_token|registers)", False), (".*", True))


def learning_rate_factors(params: dict[str, Any], decay: float) -> Rules:
    """Build rules on parameter paths for the factors of the learning rate.

    Of L blocks, block i has decay^(L - i), all below them (patch and position embeddings, CLS)
    decay^(L + 1), all above them 1.

    Args:
      params: {"encoder": ..., and anything above it}.
      decay: ratio of the learning rates of a block and the next.

    Returns:
      Pairs of (regex, factor), see `adamw.match_rules`.

    Source: BEiT; MAE, `util/lr_decay.py`.
    """
    blocks = sorted(name for name in params["encoder"] if re.fullmatch(r"block\d+", name))
    depth = len(blocks)
    rules: list[tuple[str, float]] = []
    for i, name in enumerate(blocks):
        rules.append((f"encoder/{name}/.*", decay ** (depth - i)))
    rules.append(("encoder/norm/.*", 1.0))
    rules.append(("encoder/.*", decay ** (depth + 1)))
    rules.append((".*", 1.0))
    return rules


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    params: dict[str, Any],
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    decay: float,
) -> optax.GradientTransformation:
    """Build AdamW with layer-wise learning rates.

    The weight decay is multiplied by the learning rate of its layer, as in torch.

    Args:
      learning_rate: of the head; number, or function of the step.
      params: {"encoder": ..., and anything above it}.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: see DECAY_RULES for the parameters it applies to.
      decay: ratio of the learning rates of a block and the next.
    """
    factors = match_rules(learning_rate_factors(params, decay), params, "layer_decay")

    def scale_by_layer(updates: Any, _: Any) -> Any:
        return scale_by(factors, updates)

    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(
            weight_decay, mask=match_rules(DECAY_RULES, params, "weight_decay")
        ),
        optax.stateless(scale_by_layer),
        optax.scale_by_learning_rate(learning_rate),
    )
