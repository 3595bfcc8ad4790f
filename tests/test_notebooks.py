"""The notebooks run from a clean kernel, with their outputs as expected."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


# The kernel's client library closes its event loop and sockets late.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.slow
def test_quickstart_trains_and_searches():
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(NOTEBOOKS))
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    accuracies = {
        line.split("  ")[0].strip(): float(line.rsplit(maxsplit=1)[-1].rstrip("%"))
        for line in printed.splitlines()
        if line.endswith("%")
    }
    assert len(accuracies) == 8
    assert accuracies["4-bit level"] > 90
    assert accuracies["uniform 6/6"] > 90
