"""The records of the wire: each comes back as it was, and looks as the protocol says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.wire import memory_names, names
from ballast.wire.shape import read_record, to_wire

RECORDS = [
    kind
    for module in (names, memory_names)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
]
SCALARS: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=8),
}
for scalar, strategy in SCALARS.items():
    st.register_type_strategy(scalar, strategy)


def test_there_are_records() -> None:
    assert len(RECORDS) > 15


@given(data=st.data())
@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_record_comes_back_as_it_was(kind: type[Any], data: st.DataObject) -> None:
    record = data.draw(st.from_type(kind))
    assert read_record(kind, json.loads(json.dumps(to_wire(record)))) == record


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (
            names.AgentStatus,
            "version protocol features boot-id page-size-bytes limits uptime-ms peers rss-bytes psi pin guard holder",
        ),
        (names.Limits, "lease-ms chunk-bytes line-bytes"),
        (
            memory_names.MemoryStatus,
            "boot-id total-bytes available-bytes free-bytes cached-bytes committed-bytes swap-total-bytes "
            "swap-free-bytes psi level demand-bytes demand balloon blocks kernel-balloon level-source psi-cgroups lru",
        ),
        (memory_names.Stall, "avg10 avg60 avg300 total-us"),
        (memory_names.BlockCounts, "size-bytes online offline movable-online"),
        (memory_names.OnlineResult, "bytes blocks"),
        (memory_names.BlockResult, "phys-index zone result reason online-us"),
        (names.QuiesceBegun, "id consistency lease-ms sync-ms freeze-ms filesystems writers"),
        (names.FilesystemResult, "mountpoint device type state reason freeze-ms"),
        (names.WriterResult, "name state reason ms"),
        (names.QuiesceEnded, "held held-ms thaw-ms reason filesystems writers"),
        (names.QuiesceStatus, "state id lease-left-ms filesystems"),
        (memory_names.Decision, "at-ms change bytes reason numbers"),
        (memory_names.PsiTrigger, "kind stall-us window-us"),
    ],
)
def test_no_field_that_clients_rely_on_is_gone(kind: type[Any], fields: str) -> None:
    present = {field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    assert set(fields.split()) <= present


def test_what_may_be_null_is_null_and_what_may_be_absent_is_absent() -> None:
    status = names.QuiesceStatus("thawed")
    assert to_wire(status) == {"state": "thawed", "filesystems": []}
    balloon, blocks = memory_names.BalloonState(0, 0), memory_names.BlockCounts(1, 2, 3, 4)
    memory = memory_names.MemoryStatus("b", 1, 1, 1, 1, 1, 1, 1, None, "low", 1, {}, balloon, blocks, None)
    assert to_wire(memory)["psi"] is None
    assert to_wire(memory)["kernel-balloon"] is None
