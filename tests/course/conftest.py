"""An open exercise has no solution in this repository: its tests wait for one, elsewhere."""

import pytest

from support.tools import Unfinished


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except Unfinished as e:
        pytest.skip(str(e))
