"""Idle OpenMP threads sleep early unless the environment chose something."""

import os
import subprocess
import sys

import pytest

from compressor.idle_threads import COUNT, POLICY, SPINS, sleep_early


def test_the_count_is_set_where_nothing_was_chosen():
    environment: dict[str, str] = {}
    sleep_early(environment)
    assert environment == {COUNT: str(SPINS)}


@pytest.mark.parametrize(("name", "value"), [(POLICY, "active"), (COUNT, "7")])
def test_a_choice_is_kept(name, value):
    environment = {name: value}
    sleep_early(environment)
    assert environment == {name: value}


def test_the_command_asks_for_it_before_torch_is_loaded():
    code = (
        "import os, sys, compressor.cli.app as app\n"
        "print('torch' in sys.modules)\n"
        "app.run_command = lambda words: print(os.environ['GOMP_SPINCOUNT']) or 0\n"
        "app.main([])"
    )
    env = {k: v for k, v in os.environ.items() if k not in (COUNT, POLICY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["False", str(SPINS)], done.stderr
