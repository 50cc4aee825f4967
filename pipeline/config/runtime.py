"""The section `runtime`: devices, precision and processes."""

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
    """Devices, precision and processes."""

    strategy: Literal["auto", "single", "mirrored", "multi_worker"] = "auto"
    """single: one device; mirrored: MirroredStrategy over all GPUs of the machine; multi_worker:
    MultiWorkerMirroredStrategy over the GPUs of all processes in TF_CONFIG; auto: multi_worker if TF_CONFIG is set,
    else mirrored if there are several GPUs, else single."""
    sync_batch_norm: bool = True
    """true: normalize by the statistics of the micro-batch of all replicas. false: each replica uses its own images,
    which avoids a synchronization in every layer; the moving statistics are then the mean of the replicas."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that support it (compute capability 8.0), else float32. Weights are always float32."""
    xla: Literal["auto", True, False] = "auto"
    """auto: on if the run has one GPU and enough steps to repay the compilation, by an estimate; off on the CPU, which
    XLA slows down, and for several replicas, since it fails on several logical CPU devices (set true for several GPUs).
    The run's config.yaml holds the choice, and a resume keeps it."""
    num_workers: PositiveInt | None = None
    """Images prepared in parallel; null: the number of CPU cores. The results do not depend on it."""
    data_service: Annotated[tuple[Address, ...], Field(min_length=1)] | None = None
    """Servers that prepare the training images, [host1:5050, host2:5050], each started by `python -m pipeline
    data-server`, for machines whose CPUs cannot feed their GPUs; null: this machine prepares them. The batches are the
    same. It needs augment.backend native and data.source folder, csv or digits, with files under the same path on every
    server."""
