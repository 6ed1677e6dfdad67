"""Drives CMake for the native module ``mvp_ext._C``; everything else is in pyproject.toml.

Environment: ``MVP_USE_CUDA=AUTO|ON|OFF``, ``MVP_CUDA_ARCHS="80-real;90-real"``, ``CMAKE_ARGS`` (appended).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build with CMake + ninja, then leave ``_C`` where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            missing = "cmake" if cmake is None else "ninja"
            raise RuntimeError(f"building mvp_ext needs {missing} on the PATH: pip install cmake ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # Tools of an isolated build live in a folder that is gone at the next one, so a build tree that was kept
        # must be told where they are now.
        args = [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        args += [
            f"-D{name}={os.environ[name]}"
            for name in ("MVP_USE_CUDA", "MVP_CUDA_ARCHS")
            if name in os.environ
        ]
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *args], check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 2))
        subprocess.run([cmake, "--build", str(build), "--target", "_C", "-j", jobs], check=True)
        if not target.exists():
            raise RuntimeError(f"CMake built no {target.name} in {target.parent}")


setup(ext_modules=[Extension("mvp_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
