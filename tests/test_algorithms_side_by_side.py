"""Independent computations at once: results in order, errors and gradients as in plain calls."""

import os
import threading

import pytest
import torch

from compressor.algorithms.side_by_side import at_once, shared_threads, side_by_side


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_and_two_run_at_once():
    meet = threading.Barrier(2, timeout=30)

    def piece(index):
        meet.wait()  # a lone piece would wait in vain
        return index, torch.get_num_threads()

    found = list(side_by_side(lambda i=i: piece(i) for i in range(6)))
    assert found == [(i, 1) for i in range(6)]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("grad", [False, True])
def test_pieces_see_the_caller_s_gradient_mode(grad):
    with torch.set_grad_enabled(grad):
        assert list(side_by_side([torch.is_grad_enabled] * 3)) == [grad] * 3


@pytest.mark.usefixtures("two_threads")
def test_what_a_piece_raises_is_raised_and_threads_are_given_back():
    def fail():
        raise FloatingPointError("inside")

    with pytest.raises(FloatingPointError, match="inside"):
        list(side_by_side([lambda: 1, fail]))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_one_piece_more_is_taken_than_run_at_once():
    taken = []

    def pieces():
        for index in range(6):
            taken.append(index)
            yield lambda: 0

    found = side_by_side(pieces())
    next(found)
    assert taken == [0, 1, 2]
    found.close()  # whoever stops early waits for what runs, and has all threads again
    assert taken == [0, 1, 2]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_pieces_inside_a_piece_are_computed_one_after_another():
    def piece():
        return at_once(), list(side_by_side([torch.get_num_threads] * 3))

    assert list(side_by_side([piece] * 2)) == [(1, [1, 1, 1])] * 2


@pytest.mark.usefixtures("two_threads")
def test_a_thread_pinned_to_one_core_computes_alone(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert at_once() == 1
    assert list(side_by_side([torch.get_num_threads])) == [2]


@pytest.mark.usefixtures("two_threads")
def test_threads_are_shared_for_a_while():
    with shared_threads(2):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
