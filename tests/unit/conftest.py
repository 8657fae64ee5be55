"""The package's annotations are checked at run time in every unit test, shapes and dtypes included.

Inside `pytest.raises` they are not: there the function's own check, with its own message, is what is tested.
"""
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import settings
from jaxtyping import config, install_import_hook

if early := [name for name in sys.modules if name.split(".")[0] == "collai"]:
    raise RuntimeError(f"imported before the type checks were installed: {', '.join(early)}")
sys.dont_write_bytecode = True  # or the checked code could end in the cache that plain processes read
install_import_hook("collai", "beartype.beartype")
settings.register_profile("same", derandomize=True, deadline=None)  # every run tries the same examples
settings.load_profile("same")
raises = pytest.raises


@contextmanager
def raises_by_its_own_check(*args: object, **kwargs: object) -> Iterator[pytest.ExceptionInfo]:
    """Stand in for `pytest.raises`, with the run-time type checks off."""
    with raises(*args, **kwargs) as caught:
        config.update("jaxtyping_disable", True)
        try:
            yield caught
        finally:
            config.update("jaxtyping_disable", False)


pytest.raises = raises_by_its_own_check
