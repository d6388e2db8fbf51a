"""Python before 3.11.4 pickles an enum member as `getattr(Kind, name)`: read, but `getattr` reaches no further."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from trireme_trainer.checkpoint.dcp import _MetadataUnpickler


class Call:
    """Pickles as a call of getattr, as an older Python would write it."""

    def __init__(self, target: Any, name: str) -> None:
        self.arguments = (target, name)

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, self.arguments


def load(value: object) -> Any:
    return _MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()


@pytest.mark.parametrize("member", list(_MEM_FORMAT_ENCODING))
def test_members_are_read(member: _MEM_FORMAT_ENCODING) -> None:
    assert load(Call(_MEM_FORMAT_ENCODING, member.name)) is member
    assert load(member) is member


@pytest.mark.parametrize(
    ("target", "name"),
    [(_MEM_FORMAT_ENCODING, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (Metadata, "__init__")],
)
def test_nothing_else_is(target: Any, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="no place in a checkpoint"):
        load(Call(target, name))
