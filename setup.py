"""Builds csrc into distseg._C, if it can; everything else about the package is in pyproject.toml.

The kernels are compiled for several instruction sets and chosen when they are loaded, so that a wheel runs on any
processor of its architecture. DISTSEG_NO_EXT=1 builds none; where there is no compiler, or it fails, the package
installs without them and says so.
"""

import os
import platform
import sys

from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"DEFAULT": []}
if X86:
    INSTRUCTION_SETS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]


def extension() -> dict:
    if os.environ.get("DISTSEG_NO_EXT") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("distseg: no torch in the build environment (--no-build-isolation): csrc is not built", file=sys.stderr)
        return {}

    flags = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-g0"]
    flags += ["-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]  # of the compiler's and torch's own headers
    if X86:
        flags.append("-DDISTSEG_X86")

    class Build(BuildExtension):
        def build_extension(self, ext) -> None:
            # One object for each instruction set, the portable one first: where objects share an inline function, the
            # linker keeps the first it meets.
            for name, options in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compiler.compile(
                    ["csrc/kernels.cpp", "csrc/labels.cpp"],
                    output_dir=f"{self.build_temp}/{name}",
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*flags, *options, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"],
                    depends=ext.depends,
                )
            super().build_extension(ext)

    ext = CppExtension(
        "distseg._C",
        ["csrc/operators.cpp"],
        depends=["csrc/kernels.h", "csrc/tiles.h", "csrc/kernels.cpp", "csrc/labels.cpp"],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        optional=True,  # a failure is a warning
    )
    return {"ext_modules": [ext], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


setup(**extension())
