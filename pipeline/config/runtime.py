"""The schema of the section `runtime`: the machines that a run uses."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.config.address import parse_address
from pipeline.config.base import PositiveInt, StrictModel


def _address(text: str) -> str:
    parse_address(text)
    return text


Address = Annotated[str, AfterValidator(_address)]
"""host:port"""


class RuntimeConfig(StrictModel):
    """The machine."""

    strategy: Literal["auto", "single", "mirrored", "multi_worker"] = "auto"
    """single: one device; mirrored: MirroredStrategy over all GPUs of the machine; multi_worker:
    MultiWorkerMirroredStrategy over the GPUs of all processes that TF_CONFIG names; auto: what there is, TF_CONFIG
    before several GPUs before one device.
    """
    sync_batch_norm: bool = True
    """Over several replicas, normalise by the statistics of the whole micro-batch. false: each replica by its own share
    of it, which spares the replicas waiting for each other in every layer; the moving statistics are then the replicas'
    mean.
    """
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it (compute capability 8.0), else float32. Weights are float32 either way."""
    xla: Literal["auto", True, False] = "auto"
    """auto: on one GPU where the run is long enough to repay the compilation, by what both took there before or by
    estimate; off on the CPU, which it slows down, and above one replica, as it fails on several logical CPU devices
    (for several GPUs say true). A run's config.yaml has the choice, and a resume keeps to it."""
    num_workers: PositiveInt | None = None
    """Images prepared in parallel; null takes the number of CPU cores. The result does not depend on it."""
    data_service: Annotated[tuple[Address, ...], Field(min_length=1)] | None = None
    """Servers that prepare the training pictures, [host1:5050, host2:5050], each started by python -m pipeline serve,
    for machines whose processors cannot feed their GPUs; null prepares them here. The batches are the same. They come
    by TensorFlow's own operations alone, from files that the servers see under the same path: augment.backend native,
    data.source folder, csv or digits.
    """
