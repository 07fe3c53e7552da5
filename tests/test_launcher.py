"""What the driver is handed at a launch: here it is one of this file's own, so no GPU is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from turboquant_rs.ops.cuda import launcher
from turboquant_rs.ops.cuda.launcher import Call, Kernel

EARLY = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h."""

FUNCTION, STREAM = 0x7F0000001000, 0x7F0000002000


class Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: a union of 64 bytes behind its name."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("_", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


@dataclass
class Driver:
    """Notes its launches, of a kernel with so many arguments of 8 bytes."""

    arguments: int = 3
    code: int = 0

    def __post_init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.POINTER(Config),
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)),
            ctypes.c_void_p,
        )
        self.cuLaunchKernelEx = kind(self._launch)

    def _launch(self, config: Any, function: int, arguments: Any, extra: int | None) -> int:
        assert function == FUNCTION and extra is None
        told = config.contents
        early = [(told.attributes[i].id, told.attributes[i].value) for i in range(told.count)]
        words = [arguments[i][0] for i in range(self.arguments)]
        self.seen.append(
            {"sizes": tuple(told.sizes), "stream": told.stream, "attributes": early, "arguments": words}
        )
        return self.code

    def cuGetErrorString(self, code: int, text: Any) -> None:
        text._obj.value = b"no such stream"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(launcher, "_driver", lambda: made)
    monkeypatch.setattr(launcher, "_launch_address", launcher._launch_address.__wrapped__)
    monkeypatch.setattr(launcher, "raw_stream", lambda device: STREAM)
    monkeypatch.setattr(launcher, "_current_device", lambda: 0)
    monkeypatch.setattr(launcher, "_on", lambda device: None)
    monkeypatch.setattr(Kernel, "load", lambda self, device: SimpleNamespace(ptr=FUNCTION))
    return made


@pytest.mark.parametrize("early", (False, True))
def test_the_driver_gets_sizes_stream_arguments_and_whether_the_kernel_may_start_early(
    driver: Driver, early: bool
) -> None:
    call = Call(Kernel("any.cu", "any"), 0, (5, 2), (32,), 1024, early)
    call(FUNCTION, -(2**63), 2**63 - 1)
    assert driver.seen == [
        {
            "sizes": (5, 2, 1, 32, 1, 1, 1024),
            "stream": STREAM,
            "attributes": [(EARLY, 1)] if early else [],
            "arguments": [FUNCTION, -(2**63), 2**63 - 1],
        }
    ]


def test_what_the_driver_refuses_is_an_error_in_its_words(driver: Driver) -> None:
    driver.code = 400
    with pytest.raises(RuntimeError, match=r"refused to launch Kernel\('any.cu'.*error 400.*no such stream"):
        Call(Kernel("any.cu", "any"), 0, (1,), (32,))(1, 2, 3)


def test_a_kernel_gets_at_most_128_arguments_each_of_64_bits(driver: Driver) -> None:
    call, driver.arguments = Call(Kernel("any.cu", "any"), 0, (1,), (32,)), 128
    call(*range(128))
    assert driver.seen[0]["arguments"] == list(range(128))
    with pytest.raises(ValueError, match=r"129 arguments of a kernel are too many; it has at most 128"):
        call(*range(129))
    with pytest.raises(OverflowError):
        call(2**63)
    with pytest.raises(TypeError):
        call(1.5)  # type: ignore[arg-type]  # a float is what has to be refused
    assert len(driver.seen) == 1
