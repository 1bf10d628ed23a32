"""How many cores the kernels leave to others: by what their threads have waited for one."""

import pytest
import torch

from bdh.ops.cpu.runtime import Crowding, _Calm, waited_seconds


class Machine:
    """A clock, and how many of the process's threads wait for a core."""

    def __init__(self):
        self.now, self.waiting, self.waited = 0.0, 0.0, 0.0
        self.crowding = Crowding(lambda: self.now, lambda: self.waited)

    def run(self, seconds, threads=4, leaves_cores=True):
        """Calls of a hundredth of a second each; what the last of them was told."""
        found = 0
        for _ in range(round(seconds * 100)):
            found = self.crowding.busy_cores(threads, leaves_cores=leaves_cores)
            self.now += 0.01
            self.waited += 0.01 * self.waiting
        return found


@pytest.fixture
def machine():
    return Machine()


def test_an_undisturbed_process_keeps_all_cores(machine):
    machine.waiting = 0.2
    assert machine.run(5) == 0


@pytest.mark.parametrize(("waiting", "cores"), [(0.5, 1), (1.0, 2), (20, 3)])
def test_half_a_waiting_thread_is_a_busy_core(machine, waiting, cores):
    """But a thread is always left."""
    machine.waiting = waiting
    assert machine.run(0.25) == cores


def test_who_has_left_the_cores_tries_them_again_later_and_later(machine):
    machine.run(0.3)
    held = []
    for _ in range(3):
        machine.waiting = 0.5
        while machine.run(0.01) == 0:
            pass
        machine.waiting, start = 0, machine.now  # it has left the core
        while machine.run(0.01) == 1:
            pass
        held.append(machine.now - start)
    assert held == pytest.approx([0.6, 1, 2], abs=0.25)
    machine.run(20)
    machine.waiting = 0.5
    machine.run(0.35)
    machine.waiting, start = 0, machine.now
    while machine.run(0.01) == 1:
        pass
    assert machine.now - start == pytest.approx(0.5, abs=0.25)


def test_who_takes_all_threads_nevertheless_does_not_count_more_and_more_cores(machine):
    machine.run(0.3, threads=16, leaves_cores=False)
    machine.waiting = 0.5
    assert machine.run(3, threads=16, leaves_cores=False) == 1


def test_one_thread_is_never_fewer(machine):
    machine.waiting = 0.9
    assert machine.run(1, threads=1) == 0


def test_nothing_is_left_where_nobody_counts():
    crowding = Crowding(waited=lambda: None)
    assert [crowding.busy_cores(4, leaves_cores=True) for _ in range(3)] == [0, 0, 0]


def test_what_has_been_waited_is_that_of_all_threads_there_are():
    """It may shrink: what a thread has waited is not counted any more when it has ended."""
    waited = waited_seconds()
    assert waited is None or 0 <= waited < 1e7


def test_openmp_is_calmed_and_excited_again_and_computes_the_same():
    calm, numbers = _Calm(), torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = numbers @ numbers
    for on in (True, True, False, False, True, False):
        calm.set(on)
        assert torch.equal(numbers @ numbers, expected)
