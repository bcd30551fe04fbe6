"""What exporting needs of a trained model."""

from typing import Any, Protocol

from lmim_jax.methods.base import Method, Params
from lmim_jax.utils import buckets


class TrainedModel(Protocol):
    """A trained model; `train.runs.Run` is one."""

    @property
    def folder(self) -> buckets.Path:
        """Folder of the run, with its summary and evaluations."""

    @property
    def config(self) -> Any:
        """The ConfigDict that it was trained with."""

    @property
    def method(self) -> Method:
        """The method, without schedules."""

    @property
    def params(self) -> Params:
        """The online weights."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the run that it was restricted to; (): all."""

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
