"""What frozen features are worth: every evaluator, complete, for tools.evaluate and for recipes.

    python -m lmim_jax.tools.evaluate --workdir=RUN --evaluators=knn,linear,fewshot --baselines
    python -m lmim_jax.tools.evaluate --config=configs/evaluate.py --workdir=RUN --evaluators=knn --feature=cls

A recipe takes a section into training: config.evaluators.linear = evaluate.get_config().linear (with `every` set).

Every section has `type`, a file in lmim_jax/evaluators/; `every`, epochs between evaluations while training (0: at the
end only); and `params`, the weights to evaluate: online | target.

`feature` says what stands for an image: names of the method's features, joined by "+" to put them side by side:
patches and cls (after the final norm), patches_prenorm and cls_prenorm (before it), block07/tokens (behind a block);
pixels and histogram need no encoder. Tokens are averaged over patches; block07/tokens:cls takes the CLS token of that
block instead, block07/tokens:both the two side by side.
"""

from ml_collections import ConfigDict

from configs import vit_b


def get_config(part="evaluators"):
    """Sections by title; with `part` "data", the knobs of images, of which --data.KEY=VALUE replaces the run's."""
    if part == "data":
        return vit_b.data()
    config = ConfigDict()

    # -- on features of the whole training and test split, computed once

    config.knn = dict(
        type="knn",  # nearest neighbours by cosine similarity
        every=0.0,
        params="online",
        batch_size=256,  # images at a time
        feature="patches_prenorm",
        k=(10, 20, 100, 200),  # each is a figure
        temperature=0.07,  # a neighbour votes with weight exp(cosine / temperature)
        baselines=False,  # also with raw pixels and colour histograms; here --baselines does that, for all evaluators
    )
    config.linear = dict(
        type="linear",  # logistic regression, solved exactly
        every=0.0,
        params="online",
        batch_size=256,
        feature="patches_prenorm",
        l2=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),  # weight decays to choose from: l2 / 2 x the squared weights
        held_out=0.1,  # share of the training images on which it is chosen
        iterations=300,  # of L-BFGS, at most
        seed=0,  # of the choice of held-out images
    )
    config.fewshot = dict(
        type="fewshot",  # logistic regression with few labels
        every=0.0,
        params="online",
        batch_size=256,
        feature="patches_prenorm",
        shots=(1, 2, 4, 8, 16),  # labelled images of each class
        percent=(1, 10),  # shares of the labels, equal in all classes
        draws=10,  # random choices of the labelled images: mean and standard deviation over these
        prior=1.0,  # standard deviation that weights are expected to have: l2 is 1 / (prior^2 x labelled images)
        iterations=300,
        seed=0,  # of the draws
    )
    return config
