"""What of each tensor a rank writes and reads, told to torch.distributed.checkpoint by place alone.

A tensor is a box in the whole one (`parallel.placement`); a box that several ranks hold is written once. So any layout
reads what any other wrote, without a conversion and without communication.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.parallel.placement import Placed


def placed(tensor: Tensor | Placed) -> Placed:
    """A tensor that isn't said to be a part is whole."""
    return tensor if isinstance(tensor, Placed) else Placed.whole(tensor)


class BoxSavePlanner(DefaultSavePlanner):
    """Writes boxes, none of which may be empty; tensors only.

    read: gives the box of a name when it is written; then those of `parts` say no more than shapes and types.
    """

    def __init__(self, parts: Mapping[str, Placed], read: Callable[[str], Tensor] | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read or (lambda name: self._parts[name].view)
        self._parts = {name: part for name, part in parts.items() if part.view.numel()}

    def create_local_plan(self) -> SavePlan:
        """Every box of this rank; torch leaves out those that another rank writes."""
        self.plan = SavePlan([_write_item(name, part) for name, part in self._parts.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box itself."""
        return self._read(index.fqn).detach()


class BoxLoadPlanner(DefaultLoadPlanner):
    """Fills boxes from those of the checkpoint that they meet."""

    def __init__(self, parts: Mapping[str, Placed]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = {name: part for name, part in parts.items() if part.view.numel()}

    def create_local_plan(self) -> LoadPlan:
        """The parts of stored boxes that lie in this rank's."""
        stored = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for name, part in self._parts.items()
                for item in create_read_items_for_chunk_list(name, stored[name], [_box(part)])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box itself."""
        return self._parts[index.fqn].view.detach()


def _box(part: Placed) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(part.offset), sizes=part.view.shape)


def _write_item(name: str, part: Placed) -> WriteItem:
    # Torch's own properties would hold the layout of the run, such as pinned memory: the same state, the same index.
    properties = replace(TensorProperties.create_from_tensor(part.view), pin_memory=False, requires_grad=False)
    return WriteItem(
        index=MetadataIndex(name, torch.Size(part.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=_box(part), properties=properties, size=torch.Size(part.shape)),
    )
