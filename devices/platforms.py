"""Memory and processor figures of macOS and Windows, by the standard library alone (ctypes).

On Linux `machine` reads ``/proc`` instead. A call that fails gives 0 or an empty name.
"""

from __future__ import annotations

import ctypes
import sys

if sys.platform == "darwin":
    _SYSTEM = ctypes.CDLL(None)
    _VM_INFO64 = 4  # HOST_VM_INFO64 of <mach/host_info.h>
    # The leading 32-bit words of vm_statistics64: free, active, inactive, wired, then nine 64-bit counters,
    # then purgeable. 64 words hold every known revision of the structure.
    _FREE, _INACTIVE, _PURGEABLE = 0, 2, 22
    _WORDS = 64
    _TASK_BASIC_INFO = 20  # MACH_TASK_BASIC_INFO
    _TASK_WORDS = 12  # virtual, resident, resident_max: 64 bit each; times, policy, suspend count

    def _sysctl(name: str, size: int) -> bytes:
        buffer, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
        failed = _SYSTEM.sysctlbyname(name.encode(), buffer, ctypes.byref(length), None, ctypes.c_size_t(0))
        return b"" if failed else buffer.raw[: length.value]

    def cpu_name() -> str:
        return _sysctl("machdep.cpu.brand_string", 256).rstrip(b"\0").decode("utf-8", "replace")

    def memory_total() -> int:
        return int.from_bytes(_sysctl("hw.memsize", 8), sys.byteorder)

    def memory_available() -> int:
        """Pages that are free (or speculative) or that the system gives up: inactive and purgeable ones."""
        words = (ctypes.c_uint32 * _WORDS)()
        count = ctypes.c_uint32(_WORDS)
        if _SYSTEM.host_statistics64(_SYSTEM.mach_host_self(), _VM_INFO64, words, ctypes.byref(count)):
            return memory_total() // 2
        page = int.from_bytes(_sysctl("hw.pagesize", 8), sys.byteorder)
        return int(words[_FREE] + words[_INACTIVE] + words[_PURGEABLE]) * page

    def resident_bytes() -> int:
        words = (ctypes.c_uint32 * _TASK_WORDS)()
        count = ctypes.c_uint32(_TASK_WORDS)
        task = ctypes.c_uint32.in_dll(_SYSTEM, "mach_task_self_")
        if _SYSTEM.task_info(task, _TASK_BASIC_INFO, words, ctypes.byref(count)):
            return 0
        return int.from_bytes(bytes(words)[8:16], sys.byteorder)

    def peak_resident_bytes() -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes here, kilobytes elsewhere

elif sys.platform == "win32":
    import platform
    import winreg
    from ctypes import wintypes

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX"""

        _fields_ = (
            ("length", wintypes.DWORD),
            ("load", wintypes.DWORD),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    class _ProcessMemory(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS"""

        _fields_ = (
            ("size", wintypes.DWORD),
            ("faults", wintypes.DWORD),
            ("peak_working_set", ctypes.c_size_t),
            ("working_set", ctypes.c_size_t),
            ("rest", ctypes.c_size_t * 6),
        )

    def _memory_status() -> _MemoryStatus:
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status

    def _process_memory() -> _ProcessMemory:
        counters = _ProcessMemory(size=ctypes.sizeof(_ProcessMemory))
        kernel = ctypes.windll.kernel32
        kernel.GetCurrentProcess.restype = wintypes.HANDLE
        kernel.K32GetProcessMemoryInfo.argtypes = (
            wintypes.HANDLE,
            ctypes.POINTER(_ProcessMemory),
            wintypes.DWORD,
        )
        kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size)
        return counters

    def cpu_name() -> str:
        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        except OSError:
            return platform.processor()

    def memory_total() -> int:
        return int(_memory_status().total)

    def memory_available() -> int:
        return int(_memory_status().available)

    def resident_bytes() -> int:
        return int(_process_memory().working_set)

    def peak_resident_bytes() -> int:
        return int(_process_memory().peak_working_set)

else:
    # Only the last one is called; the others let `machine` be imported and checked everywhere.
    def cpu_name() -> str:
        return ""

    def memory_total() -> int:
        return 0

    def memory_available() -> int:
        return 0

    def resident_bytes() -> int:
        return 0

    def peak_resident_bytes() -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
