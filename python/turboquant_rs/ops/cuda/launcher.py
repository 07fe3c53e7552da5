"""Kernels of `cuda/`: compiled (`compiler`), loaded by CuPy, launched by the driver through the extension.

    cubin ── load ──► function ── launch
                      (one a device)

Memory is torch's, pointers travel as integers, and every launch goes to the stream that torch has made
current, so it can be captured in a CUDA graph. CuPy is imported by the first launch.
"""

from __future__ import annotations

import copy
import ctypes
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from typing import Any

import torch

import turboquant_rs._core as _core
from turboquant_rs.errors import BackendUnavailable
from turboquant_rs.ops.cuda.compiler import architecture, compile_for, cupy, splice

__all__ = ["Call", "Kernel", "captured", "not_captured", "only_if", "ready", "wait", "write"]

DYNAMIC_SHARED_SIZE = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of cuda.h."""

RELAXED_CAPTURE = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED of cuda.h: other streams may do as they please."""

KEPT_ROWS = 64
"""Rows of x up to which a product keeps its launches: a prompt has any number of them."""

STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a block may have without asking."""


class _Thread(threading.local):
    """What a thread launches with."""

    def __init__(self) -> None:
        # On which it has launched: without that it has no context, whatever device is current.
        self.device: int | None = None
        self.choice: tuple[int, int, bool] | None = None  # of `only_if`
        self.plain: int | None = None  # `device` after a launch, where there is no choice

    def choose(self, choice: tuple[int, int, bool] | None) -> None:
        """What launches depend on from now on."""
        self.choice, self.plain = choice, self.device if choice is None else None


_THREAD = _Thread()
_LOADING = threading.RLock()
_LOADED: list[Any] = []  # never unloaded: graphs may launch it, and unloading would end a capture
_Pointer = ctypes.c_void_p
raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from builds without CUDA
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


_only_one = False  # device: that is the current one; known once something was launched


def here() -> int:
    """The current device."""
    return 0 if _only_one else int(current_device())


@cache
def _driver() -> Any:
    """The driver's library, through which a launch costs less than through CuPy.

    Its functions are given objects of ctypes, which need no conversion at a call.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@cache
def _launch_address() -> int:
    """The address of the driver's function that launches. Raises: BackendUnavailable for one before R520."""
    try:
        function = _driver().cuLaunchKernelEx
    except AttributeError:
        raise BackendUnavailable(
            "the CUDA driver has no cuLaunchKernelEx; install one of R520 (CUDA 11.8) or later, or move the "
            "tensor with .cpu()"
        ) from None
    return ctypes.cast(function, _Pointer).value or 0


def _check(code: int, what: object) -> None:
    """Raises: RuntimeError with the driver's words for its error."""
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown").decode()
        raise RuntimeError(f"the CUDA driver refused {what} (error {code}): {reason}")


def wait(device: int) -> None:
    """Waits for torch's current stream of a device, if this thread has launched anything there."""
    if _THREAD.device != device:
        return
    if here() != device:
        with torch.cuda.device(device):
            wait(device)
        return
    _check(_driver().cuStreamSynchronize(_Pointer(raw_stream(device))), "to wait for a kernel")


def write(address: int, word: int, device: int) -> None:
    """Writes a u32 on torch's current stream of a device."""
    if here() != device:
        with torch.cuda.device(device):
            write(address, word, device)
        return
    _on(device)
    stream = _Pointer(raw_stream(device))
    code = _driver().cuMemsetD32Async(
        ctypes.c_uint64(address), ctypes.c_uint(word), ctypes.c_size_t(1), stream
    )
    _check(code, "to write a number")


def _on(device: int) -> None:
    """Makes the context of the current device that of this thread, if it is not yet."""
    if _THREAD.device != device:
        global _only_one
        _only_one = torch.cuda.device_count() == 1
        cupy().runtime.setDevice(device)
        _THREAD.device = device
        _THREAD.choose(_THREAD.choice)


@contextmanager
def _unwatched() -> Iterator[None]:
    """Within the block, what this thread asks of the driver ends no capture (memory, for one)."""
    mode = ctypes.c_int(RELAXED_CAPTURE)
    _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "to leave a capture")
    try:
        yield
    finally:
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@contextmanager
def not_captured(device: int) -> Iterator[None]:
    """Within the block, work on a device is done at once, even if torch's current stream is captured."""
    with torch.cuda.device(device):
        _on(device)
        with _unwatched(), torch.cuda.stream(_free_stream()):
            yield
            _check(_driver().cuStreamSynchronize(_Pointer(raw_stream(device))), "to wait for a stream")


def _free_stream() -> Any:
    """A stream of the current device that nobody captures. Torch hands out the same ones in turn."""
    make: Any = torch.cuda.Stream
    while True:
        stream = make()
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                return stream


def ready(device: int) -> bool:
    """Whether this thread may queue a launch on a device, and new memory is that device's: it is the current
    one, has a context here, and no number chooses."""
    return _THREAD.plain == device and (_only_one or bool(current_device() == device))


def captured() -> bool:
    """Whether torch's current stream is being captured in a graph; CUDA has been initialized.

    The stream that is there by itself, 0, cannot be, and to ask for its number takes less than to ask that.
    """
    return raw_stream(here()) != 0 and torch.cuda.is_current_stream_capturing()


@contextmanager
def only_if(number: int, choices: int, early: bool = False) -> Iterator[None]:
    """Within the block, a launch of this thread does nothing unless the number in memory chooses it.

    That is asked when the launch runs, not when it is queued; a graph asks again at every replay. Kernels
    that can be chosen include `choice.cuh`.

    Args:
        number: Address of a u32 below 64 on the device.
        choices: The numbers that choose the launches, a bit each.
        early: A kernel is in front of them, and they are brought up while it runs (Hopper and later).
    """
    before = _THREAD.choice
    _THREAD.choose((number, _signed(choices), early))
    try:
        yield
    finally:
        _THREAD.choose(before)


def _signed(word: int) -> int:
    """64 bits in two's complement."""
    return word - 2**64 if word >> 63 else word


class Call:
    """A kernel with its grid on a device: all of a launch that can be said before its arguments are known.

    Args:
        kernel: The kernel; loaded now.
        device: Index of the device whose memory the pointers are of.
        grid: Blocks in x, y, z; none of them 0.
        block: Threads in x, y, z.
        shared: Bytes of dynamic shared memory.
        early: The kernel may start once all blocks of the one before it say so, and waits for the end of that
            by itself (`griddepcontrol`).
    """

    __slots__ = ("_chosen", "_device", "_kernel", "_shape", "queue")

    def __init__(
        self,
        kernel: Kernel,
        device: int,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared: int = 0,
        early: bool = False,
    ) -> None:
        self._shape = (grid, block, shared)
        self._kernel, self._device = kernel, device
        self._chosen: dict[bool, Call] = {}
        sizes = (*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared)
        # Launches it on a stream, for who has asked whether its device is `ready`; the driver's error code.
        self.queue = _core.Launch(_launch_address(), kernel.load(device).ptr, sizes, early).queue

    def __call__(self, *args: int) -> None:
        """Launches it on torch's current stream.

        Args:
            args: Pointers and integers, for parameters of 4 or 8 bytes. The last parameter may be a struct of
                fields of 8 bytes, an argument each.
        """
        device = self._device
        if ready(device):
            code = self.queue(raw_stream(device), args)
            if code:
                self.refuse(code)
            return
        choice = _THREAD.choice
        if choice is not None:
            number, choices, early = choice
            _THREAD.choose(None)
            try:
                self._if_chosen(early)(number, choices, *args)
            finally:
                _THREAD.choose(choice)
            return
        with torch.cuda.device(device):
            _on(device)
            self.refuse(self.queue(raw_stream(device), args))

    def refuse(self, code: int) -> None:
        """Raises: RuntimeError for an error of the driver's, other than 0."""
        _check(code, f"to launch {self._kernel}")

    def _if_chosen(self, early: bool) -> Call:
        """The same launch, of the kernel that asks first."""
        if early not in self._chosen:
            able = early and torch.cuda.get_device_capability(self._device) >= (9, 0)
            self._chosen[early] = Call(self._kernel.chosen, self._device, *self._shape, able)
        return self._chosen[early]


class Kernel:
    """One `extern "C"` function of one source, compiled with one set of macros: made once, launched often.

    Args:
        source: Name of a file in `cuda/`.
        entry: Name of the function.
        defines: Macros; True stands for 1 and False for 0. Those of names that the source does not know are
            harmless.
        options: Further options of NVRTC, after `OPTIONS`: `-fmad=true`, say.
        shared: The most dynamic shared memory a launch will ask for, in bytes.
    """

    def __init__(
        self,
        source: str,
        entry: str,
        defines: Mapping[str, object] | None = None,
        options: Sequence[str] = (),
        shared: int = 0,
    ) -> None:
        self.source, self.entry, self.shared = source, entry, shared
        macros = (f"-D{name}={_macro(value)}" for name, value in (defines or {}).items())
        self.options = (*options, *macros)
        self._functions: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"Kernel({self.source!r}, {self.entry!r}, {self.options})"

    @cached_property
    def chosen(self) -> Kernel:
        """The same function for launches within `only_if`. Raises: RuntimeError for a source without it."""
        if "UNLESS_CHOSEN;" not in splice(self.source):
            raise RuntimeError(f"{self.source} cannot be chosen; it has to ask, as choice.cuh says")
        twin = copy.copy(self)
        twin.options, twin._functions = (*self.options, "-DCHOSEN=1"), {}
        return twin

    def compile(self, arch: str) -> bytes:
        """The cubin for an architecture such as "sm_90a". Needs no GPU. Raises: as `compile_for`."""
        return compile_for(arch, splice(self.source), self.options)

    def load(self, device: int) -> Any:
        """Its function on a device, CuPy's `Function`."""
        function = self._functions.get(device)
        if function is not None:
            return function
        with _LOADING, torch.cuda.device(device):
            if device not in self._functions:
                # Makes the device's context current where there is none yet.
                cupy().runtime.setDevice(device)
                module, cubin = cupy().Module(), self.compile(architecture(device))
                with _unwatched():
                    module.load(cubin)
                    function = module.get_function(self.entry)
                    if self.shared > STATIC_SHARED:
                        cupy().driver.funcSetAttribute(function.ptr, DYNAMIC_SHARED_SIZE, self.shared)
                self._functions[device] = function
                _LOADED.append(function)
        return self._functions[device]

    def __call__(
        self,
        device: int,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[int, ...],
        shared: int = 0,
    ) -> None:
        """Launches it once: `Call` says what the arguments are."""
        _call(self, device, grid, block, shared)(*args)


@lru_cache(maxsize=4096)
def _call(kernel: Kernel, device: int, grid: tuple[int, ...], block: tuple[int, ...], shared: int) -> Call:
    return Call(kernel, device, grid, block, shared)


def _macro(value: object) -> object:
    return int(value) if isinstance(value, bool) else value
