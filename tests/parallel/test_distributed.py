"""How processes join, and end together; what whole runs do is in test_faults.py."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from mpq_jax.parallel import distributed

HEARTBEAT_TIMEOUT = 20  # seconds; a healthy process on a busy machine is never silent for so long


def test_joining_after_jax_is_in_use_says_what_to_do():
    jax.devices()
    with pytest.raises(RuntimeError, match="(?s)before any JAX calls.*process_count=1.*Join once"):
        distributed.join("localhost:1", 1, 0)


def test_a_process_alone_fails_and_ends_as_usual():
    assert distributed.describe() == "process 0 of 1: 8 of 8 cpu devices"
    with distributed.abort_together():
        pass
    for error in (ValueError("mine"), SystemExit("error: mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, distributed.abort_together():
            raise error
        assert raised.value is error


LONER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
import jax.numpy as jnp
from mpq_jax.parallel import distributed as processes, mesh as sharding

address, index, mode, heartbeat_timeout = sys.argv[1:5]
index, heartbeat_timeout = int(index), int(heartbeat_timeout)

@processes.abort_together()
def main():
    processes.join(address, 2, index, heartbeat_timeout=heartbeat_timeout)
    mesh = sharding.make_mesh()
    batch = sharding.global_batch({"x": jax.device_get(jnp.ones(2))}, mesh)
    for step in range(10**6):
        float(jax.jit(jnp.sum)(batch["x"]))
        if step == 3 and mode == "both exit":
            sys.exit("error: both see it")
        if step == 3 and mode == f"{index} raises":
            raise RuntimeError("only one sees it")
        if step == 3 and mode == f"{index} exits":
            sys.exit("error: only one sees it")
        if step == 3 and mode == "finish":
            return

main()
print("at the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["finish", "both exit", "0 raises", "1 raises", "1 exits"])
def test_a_failed_process_ends_the_others_in_bounded_time(mode):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", LONER, address, str(index), mode, str(HEARTBEAT_TIMEOUT)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=HEARTBEAT_TIMEOUT + 60) for process in running]
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    if mode == "finish":
        assert codes == [0, 0] and all("at the end" in output for output, _ in outputs)
    elif mode == "both exit":
        assert codes == [1, 1] and all("error: both see it" in errors for _, errors in outputs)
    else:
        alone = int(mode[0])
        assert codes[alone] == 1 and codes[1 - alone] != 0
        assert "only one sees it" in outputs[alone][1]
        assert ("Traceback" in outputs[alone][1]) == ("raises" in mode)
