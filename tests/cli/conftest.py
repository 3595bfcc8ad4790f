"""Runs of the programs that the tests of this folder share."""

import pytest
from helpers.programs import Programs, programs


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Programs:
    return programs(tmp_path_factory.getbasetemp())
