"""Threads share stages in pieces: each piece is done once, nobody is missed who does not come, and bits stay."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from numba import njit

from bdh.ops.cpu.pieces import STAGE_WORDS, pieces
from bdh.ops.cpu.runtime import Team, run_by_threads

NUM_PIECES = 7


@njit(nogil=True)
def count_up(progress, done):
    """In each stage every piece must find all of the stage before done."""
    for stage in range(progress.shape[0]):
        for piece in pieces(progress.ctypes.data + stage * 8 * STAGE_WORDS, NUM_PIECES):
            is_right = True
            for other in range(NUM_PIECES):
                is_right &= stage == 0 or done[stage - 1, other] == 1
            done[stage, piece] += 1 if is_right else 100


@pytest.mark.parametrize("is_crowded", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 9])
def test_every_piece_is_done_once_and_stages_follow_each_other(num_threads, is_crowded):
    progress, done = Team(num_threads, is_crowded).new_progress(500), np.zeros((500, NUM_PIECES), np.int64)
    count_up(Team(1).new_progress(1), done[:1].copy())
    threads = [threading.Thread(target=count_up, args=[progress, done]) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (done == 1).all()


def test_a_thread_that_comes_when_all_is_done_finds_nothing_to_do():
    progress, done = Team(2).new_progress(3), np.zeros((3, NUM_PIECES), np.int64)
    for _ in range(3):
        count_up(progress, done)
    assert (done == 1).all()


@njit(nogil=True)
def multiples(number, out, step):
    out[number] = number * step


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8"])
def test_each_thread_gets_its_number_and_functions_are_compiled_for_the_types_of_their_arguments(dtype):
    """By the address of one that was compiled for other types it would write elsewhere."""
    for out in (np.zeros(5, dtype), np.zeros((5, 2), dtype)[:, 0]):
        run_by_threads(5, multiples, out, 3)
        assert out.tolist() == [0, 3, 6, 9, 12]


_PROGRAM = """
import os, sys, threading, numba, torch
from bdh.generate.advance import Advancer, StepInput
from tests.networks import random_network
from bdh.ops.cpu.runtime import calm

torch.manual_seed(0)
model = random_network(n_embd=16, n_head=2, n_layer=2, mlp_internal_dim_multiplier=128)
text = list(range(24))

def read(advancer):
    state = advancer.new_state()
    prompt = advancer.advance([StepInput(state, text)])[0]
    return torch.stack([prompt, *(advancer.advance([StepInput(state, [token])])[0] for token in text)])

for window in ({}, {"window": 9}):
    advancer = Advancer(model, **window)
    torch.set_num_threads(1)
    expected = read(advancer)
    for threads in (2, 3, 4, 1):
        torch.set_num_threads(threads)
        assert torch.equal(read(advancer), expected), threads
    found = []
    together = [threading.Thread(target=lambda: found.append(read(advancer))) for _ in range(3)]
    [thread.start() for thread in together], [thread.join() for thread in together]
    assert all(torch.equal(each, expected) for each in found) and len(found) == 3
    if not window:
        alone = expected
calm.set(True)
if hasattr(os, "fork"):
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        torch.testing.assert_close(read(Advancer(model)), alone, rtol=1e-3, atol=1e-4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("the same", numba.threading_layer())
"""


@pytest.mark.slow
def test_bits_depend_neither_on_threads_nor_on_busy_programs():
    """More threads than cores, several callers at once, and a fork; and the process ends while OpenMP is calmed."""
    busy = subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"])
    try:
        environment = {**os.environ, "NUMBA_NUM_THREADS": "4", "NUMBA_THREADING_LAYER": "omp"}
        run = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    finally:
        busy.kill()
        busy.wait()
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "the same omp"
