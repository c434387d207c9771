"""Builds the native libraries of the package: the CPU library with g++, and the CUDA library where nvcc is wanted.

The libraries have a plain C interface and are loaded with ctypes: no Python headers, no torch, and a wheel tagged
py3-none-<platform>. Where a compiler is missing or fails, the installation goes through without that library, prints
why, and leaves the reason beside it in <library>_build_error.txt for ``sne_fast.explain()``.

Environment: SNE_FAST_BUILD=cuda asks for the CUDA library, which is otherwise built where there is a GPU's driver;
SNE_FAST_BUILD=cpu leaves it out; SNE_FAST_SKIP_NATIVE=1 builds neither. csrc/cpu_build.py, csrc/cuda_build.py and
csrc/native_build.py read more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import cpu_build  # noqa: E402
import cuda_build  # noqa: E402
import native_build  # noqa: E402

CPU, CUDA = (
    Extension(library.removesuffix(".so").replace("/", "."), sources=[])
    for library in (native_build.CPU_LIBRARY, native_build.CUDA_LIBRARY)
)
INSTEAD = {
    CPU.name: "ops run on the slower reference backend",
    CUDA.name: "on a GPU the Triton backend serves, where Triton is installed",
}


def cuda_wanted() -> bool:
    """Return whether to build the CUDA library: by SNE_FAST_BUILD, else where there is a GPU's driver."""
    asked = os.environ.get("SNE_FAST_BUILD", "").replace(",", " ").split()
    if unknown := set(asked) - {"cpu", "cuda"}:
        print(f"sne_fast: SNE_FAST_BUILD: {', '.join(sorted(unknown))} is not cpu or cuda", file=sys.stderr)
    if os.environ.get("SNE_FAST_SKIP_NATIVE"):
        return False
    return "cuda" in asked if asked else cuda_build.gpu_driver()


class BuildLibraries(build_ext):
    """build_ext for the two libraries; a failure is a message, not the end of the installation."""

    def finalize_options(self) -> None:
        # The same folder for builds in place, editable ones and wheels, so that each compiles only what has changed.
        self.build_temp = self.build_temp or str(native_build.BUILD_FOLDER)
        super().finalize_options()
        self.into_source = bool(self.inplace)  # which run() sets to false while it builds

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        target, name = Path(self.get_ext_fullpath(ext.name)), "CPU" if ext is CPU else "CUDA"
        error_file = target.with_name(f"{target.stem}_build_error.txt")
        error_file.unlink(missing_ok=True)
        folder = Path(self.build_temp) / name.lower()
        try:
            if ext is CUDA:
                if cuda_wanted():
                    architectures = cuda_build.build(target, folder)
                    print(f"sne_fast: the CUDA library was built for {' '.join(architectures)}", file=sys.stderr)
                else:
                    target.unlink(missing_ok=True)  # an older one would not fit
            elif os.environ.get("SNE_FAST_SKIP_NATIVE"):
                raise RuntimeError("SNE_FAST_SKIP_NATIVE was set")
            else:
                cpu_build.build(target, folder)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            error_file.write_text(f"{error}\n", encoding="utf-8")
            print(f"sne_fast: the {name} library was not built: {error}", file=sys.stderr)
            print(f"sne_fast: installing without it; {INSTEAD[ext.name]}.", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        # A build in place or an editable one wrote straight into the package already, see get_ext_fullpath.
        pass

    def get_ext_fullpath(self, ext_name: str) -> str:
        base = ROOT if self.into_source or getattr(self, "editable_mode", False) else Path(self.build_lib)
        return str(base / self.get_ext_filename(ext_name))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The library needs a platform but no particular Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        ext_modules=[CPU, CUDA],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    )
