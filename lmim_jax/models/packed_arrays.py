"""Queries, keys and values as the projections write them, with all heads of a token side by side.

Letters: B batch, T query tokens, S key tokens, A attention heads, K width of a head, D = A K.
"""

from collections.abc import Sequence

from jaxtyping import Array

Places = tuple[tuple[int, int], ...]  # of query, key and value: (array, first column)


def width_of(arrays: Sequence[Array], places: Places) -> int:
    """D: the last array has equally many columns for each of its parts."""
    parts = sum(index == len(arrays) - 1 for index, _ in places)
    return arrays[-1].shape[-1] // parts


def costs(arrays: Sequence[Array], width: int, heads: int, products: int) -> tuple[int, int]:
    """FLOPs and exponentials of a kernel with some products of queries and keys of D = `width`."""
    scores = len(arrays[0]) * arrays[0].shape[1] * arrays[-1].shape[1]
    return 2 * products * scores * width, heads * scores
