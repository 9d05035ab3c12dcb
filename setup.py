"""The native extension, and the mapping of the repository root to the package ``satchel``.

One binary is both the Python extension ``satchel.kernels._native`` and the ONNX Runtime custom-op library. The
hot loops are compiled once per instruction set, each file with its own flags, and chosen at run time: the wheel
itself runs on any CPU of the architecture.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NATIVE = Path("kernels") / "native"
X86 = platform.machine().lower() in {"x86_64", "amd64"}
# file name of a variant -> its compiler flags; kernels/native/dispatch.cc chooses among them at run time
VARIANTS: dict[str, list[str]] = {"baseline": []}
if X86:
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    VARIANTS |= {"avx2": AVX2, "avx512": AVX512, "avx512vnni": [*AVX512, "-mavx512vnni"]}
COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type",
          "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


class BuildVariants(build_ext):
    """Compiles ``variant.cc`` once per instruction set, then the rest, and links them into one library."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        extra = os.environ.get("SATCHEL_CXXFLAGS", "").split()
        objects: list[str] = []
        for name, flags in VARIANTS.items():
            objects += self.compiler.compile(
                [str(NATIVE / "variant.cc")],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("SATCHEL_VARIANT", name)],
                extra_postargs=[*COMMON, *flags, *extra],
                depends=[str(p) for p in NATIVE.glob("*.h")],
            )
        ext.extra_compile_args = [*COMMON, *extra]
        ext.extra_link_args = [*ext.extra_link_args, *extra]
        ext.extra_objects = objects
        super().build_extension(ext)


class BuildModules(build_py):
    """Leaves this very file out of the package, whose folder is the repository root."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


FOLDERS = ("runtime", "export", "cache", "kernels", "devices", "cli")
packages = ["satchel"] + [
    f"satchel.{name}" for folder in FOLDERS for name in (folder, *(f"{folder}.{p}" for p in find_packages(folder)))
]

setup(
    packages=packages,
    package_dir={"satchel": "."},
    package_data={
        "satchel": ["py.typed", "docs/samples/*"],  # questions of `satchel eval`
        "satchel.kernels": ["*.pyi"],
        "satchel.export.hub": ["*.json"],
        "satchel.export.calibration": ["shipped/*/*"],
    },
    ext_modules=[
        Pybind11Extension(
            "satchel.kernels._native",
            sorted(str(p) for p in NATIVE.glob("*.cc") if p.name != "variant.cc"),
            depends=[str(p) for p in NATIVE.glob("*.h")],
        )
    ] if NATIVE.exists() else [],
    cmdclass={"build_ext": BuildVariants, "build_py": BuildModules},
)
