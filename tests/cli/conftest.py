"""Runs of the programs that the tests of this folder share."""

import pytest
from helpers.programs import Programs


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Programs:
    base = tmp_path_factory.getbasetemp()  # each worker has one, in a folder of the session
    directory = (base if worker_id == "master" else base.parent) / "programs"
    directory.mkdir(exist_ok=True)
    return Programs(directory)
