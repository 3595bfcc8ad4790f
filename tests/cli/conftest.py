"""Runs of the programs that the tests of this folder share."""

import pytest
from helpers.programs import Programs, programs


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Programs:
    base = tmp_path_factory.getbasetemp()
    return programs(base if worker_id == "master" else base.parent)  # each worker has a folder
