"""Processes that train together agree; one alone needs nothing."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from head3d.run.distributed import StopSignal, any_process, average_gradients, mean_scalars, start, stop

PROGRAM = """
import torch
from head3d.run.distributed import *
me = start("cpu")
weight, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
weight.grad = torch.tensor([1.0, 2.0]) * (me.rank + 1)
if me.rank == 0:
    other.grad = torch.ones(3)  # the other process has none
idle = torch.nn.Parameter(torch.zeros(1))
mean = torch.tensor([2.0, 4.0]) * me.rank
average_tensors([mean])
assert mean.tolist() == [1, 2]
average_gradients([weight, other, idle])
assert idle.grad is None
assert weight.grad.tolist() == [1.5, 3.0] and other.grad.tolist() == [0.5] * 3
assert mean_scalars({"a": me.rank, "b": torch.tensor(3.0)}, me.device) == {"a": 0.5, "b": 3.0}
assert any_process(me.rank == 1, me.device) and not any_process(False, me.device)
stop()
print(me.rank, me.world_size, me.is_main)
"""


def test_two_processes_agree_on_gradients_averages_and_numbers(two_processes):
    assert two_processes(["-c", PROGRAM]) == ["0 2 True\n", "1 2 False\n"]


def test_what_the_process_says_that_fails_is_seen_however_much_both_say(two_processes):
    program = "import os, sys; sys.stderr.write('x' * 200_000); sys.exit('why it fails' if os.environ['RANK'] == '1' else 0)"
    with pytest.raises(AssertionError, match=r"process 1: .* exit status 1(.|\n)*why it fails"):
        two_processes(["-c", program])


def test_one_process_alone_leaves_everything_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    me = start("cpu")
    assert me == (0, 1, torch.device("cpu"), True)
    parameter = torch.nn.Parameter(torch.ones(2))
    average_gradients([parameter])
    stop()
    assert parameter.grad is None
    assert mean_scalars({"a": 1, "b": torch.tensor(2.5, requires_grad=True)}, me.device) == {"a": 1.0, "b": 2.5}
    assert mean_scalars({}, me.device) == {}
    assert any_process(True, me.device) and not any_process(False, me.device)


def test_sigterm_is_a_wish_inside_and_what_it_was_outside():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stopping:
        assert not stopping.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.requested
    assert signal.getsignal(signal.SIGTERM) == before
