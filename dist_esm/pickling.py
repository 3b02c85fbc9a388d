"""`torch.save` with the bytes that it has always written, in half the time."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2


class _Pickler(pickle.Pickler):
    """What torch pickles with, without a new storage object for each view of a storage and a question about each of its numbers."""

    def __init_subclass__(cls) -> None:
        ask = cls.persistent_id
        cls.persistent_id = lambda self, found: ask(self, found) if type(found) is torch.storage.TypedStorage else None  # type: ignore[method-assign]

    def __init__(self, file: IO[bytes], protocol: int) -> None:
        super().__init__(file, protocol)
        self._storages: dict[int, torch.storage.TypedStorage] = {}

    def reducer_override(self, found: Any) -> Any:
        """A plain tensor as every checkpoint of torch has it."""
        if type(found) is not Tensor or found.requires_grad:
            return NotImplemented
        key = found.untyped_storage()._cdata
        if key not in self._storages:
            self._storages[key] = found.__reduce_ex__(2)[1][0]  # type: ignore[no-untyped-call]
        return _rebuild_tensor_v2, (self._storages[key], found.storage_offset(), tuple(found.shape), found.stride(), False, OrderedDict())


_PICKLE = SimpleNamespace(__name__="pickle", Pickler=_Pickler)


def torch_save(content: dict[str, Any], file: IO[bytes]) -> None:
    """`torch.save`, whose archive writer covers the cause of a failed write with a complaint about its own state.

    Raises
    ------
    OSError
        If the file cannot be written to.
    """
    try:
        torch.save(content, file, pickle_module=_PICKLE)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
