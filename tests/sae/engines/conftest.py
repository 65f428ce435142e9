"""Other versions of Triton."""

import functools
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def triton_of(tmp_path_factory) -> Callable[[str], str]:
    """Where a version of Triton is installed, apart from the environment's own."""

    @functools.cache
    def installed(version: str) -> str:
        folder = tmp_path_factory.mktemp("triton")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        return str(folder)

    return installed
