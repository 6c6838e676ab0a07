"""Builds csrc/ into distseg._C. DISTSEG_NO_EXT=1 skips it; the package then runs on its eager reference operators."""

import os
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))


def extension_arguments() -> dict:
    if os.environ.get("DISTSEG_NO_EXT") == "1" or not SOURCES:
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension("distseg._C", SOURCES, extra_compile_args=["-O3", "-std=c++20", "-Wall"])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
