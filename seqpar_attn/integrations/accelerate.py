"""accelerate's device mesh with a dimension for this package's attention.

    from accelerate import Accelerator
    from seqpar_attn.integrations.accelerate import SequenceParallelConfig, sequence_mesh

    accelerator = Accelerator(parallelism_config=SequenceParallelConfig(cp_size=4, dp_shard_size=2))
    enable(model, sequence_mesh(accelerator))

Of accelerate's dimensions only ``cp`` can be used honestly: its data loaders give all ranks of ``cp`` the same batch,
and FSDP2 shards parameters and averages gradients over ``dp_shard`` and ``cp`` together. ``sp`` hands everything to
DeepSpeed (accelerate then makes no mesh at all), and ``tp`` ranks are left out of the averages. But accelerate takes
``cp`` for torch's own context parallelism: it drops attention masks, refuses models with sliding windows, and refuses
CPUs. So here is a configuration with the same mesh that asks for none of that.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.device_mesh import DeviceMesh


class SequenceParallelConfig(ParallelismConfig):
    """A ``ParallelismConfig`` whose ``cp_size`` ranks split sequences by this package rather than by torch.

    Arguments and mesh are its parent's: sizes of the dimensions ``dp_replicate, dp_shard, cp``; their product is the
    number of processes. Works with DDP (its gradients are averaged over all of them), with FSDP2 and without a GPU.

    Raises:
        ValueError: another parallelism besides, or, when an Accelerator is made, sizes that do not multiply to the
            number of processes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sp_size > 1 or self.tp_size > 1:
            raise ValueError(
                "expected cp_size for the ranks that split a sequence, and sp_size = tp_size = 1, got "
                f"sp_size={self.sp_size}, tp_size={self.tp_size}"
            )

    # "Is torch's context parallelism on?" is what accelerate and transformers ask by this.
    @property
    def cp_enabled(self) -> bool:
        return False

    def _with_cp(self, names: list[str]) -> list[str]:
        return [*names, "cp"] if self.cp_size > 1 else names

    @property
    def non_dp_dim_names(self) -> list[str]:
        return self._with_cp([])

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        return self._with_cp(["dp_shard"] if self.dp_shard_enabled else [])

    @property
    def dp_cp_dim_names(self) -> list[str]:
        return self._with_cp(list(self.dp_dim_names))

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        self._check_size(dist.get_world_size() if dist.is_initialized() else 1)
        return super().build_device_mesh(device_type)

    def _validate_accelerator(self, accelerator: Any) -> None:
        """What accelerate calls when it has made the mesh. Its own version refuses a mesh without a GPU."""
        self._check_size(accelerator.num_processes)

    def _check_size(self, processes: int) -> None:
        if self.total_size != processes:
            raise ValueError(
                f"expected dp_replicate_size x dp_shard_size x cp_size to be the number of processes, {processes}, "
                f"got {self.dp_replicate_size} x {self.dp_shard_size} x {self.cp_size}"
            )


def sequence_mesh(accelerator: Any) -> DeviceMesh | None:
    """The ranks that share this process's sequences: dimension ``cp`` of the accelerator's mesh; what ``enable``,
    ``shard_batch`` and every ``group=`` of this package take. None if every process has its sequences to itself.

    Raises:
        ValueError: accelerate's ``sp_size`` is in use, which belongs to DeepSpeed.
    """
    config = accelerator.parallelism_config
    if config is not None and config.sp_size > 1:
        raise ValueError(f"expected cp_size for the ranks that split a sequence, got sp_size={config.sp_size}")
    mesh = accelerator.torch_device_mesh
    names = () if mesh is None else mesh.mesh_dim_names
    return mesh["cp"] if "cp" in (names or ()) else None
