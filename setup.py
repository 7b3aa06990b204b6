"""Build steps that pyproject.toml cannot say: the C extension and the generated protobuf modules."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPyWithProto(build_py):
    """Generates pyvolume/pb from proto/*.proto before the Python files are collected."""

    def run(self):
        runpy.run_path(str(Path(__file__).parent / "proto" / "generate.py"), run_name="__main__")
        super().run()


setup(
    cffi_modules=["build_ffi.py:ffibuilder"],
    cmdclass={"build_py": BuildPyWithProto},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
