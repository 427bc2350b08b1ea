"""Random generators are pure functions of their keys."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from head3d.run.seeding import normal, numpy_generator, torch_generator, uniform


def test_the_stream_of_given_keys_never_changes():
    # recorded once: data made with one version must be made again by the next
    assert numpy_generator(0, "identity", 3).integers(0, 1 << 32, 3).tolist() == [1406759424, 4239900028, 2246969774]
    assert torch.randint(0, 1 << 32, (3,), generator=torch_generator(0, "noise")).tolist() == [51920099, 2522441046, 4270804497]


def test_another_process_with_another_hash_seed_draws_the_same(root):
    program = "from head3d.run.seeding import numpy_generator; print(numpy_generator('a', 7).integers(1 << 60))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(root)}
    drawn = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
    assert int(drawn) == numpy_generator("a", 7).integers(1 << 60)


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), (2,)), ((1,), ("1",)), ((1, 2), (12,)), (("a", "b"), ("ab",)), ((1, 2), (2, 1)), ((0,), (0, 0)), ((-1,), (1,))],
)
def test_different_keys_give_different_streams(one, other):
    assert numpy_generator(*one).random() != numpy_generator(*other).random()
    assert torch.rand(1, generator=torch_generator(*one)) != torch.rand(1, generator=torch_generator(*other))


def test_nothing_global_is_read_or_moved():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.rand(4, generator=torch_generator(1))
    numpy_generator(1).random()
    assert torch.equal(before, torch.get_rng_state())


def test_numpy_integers_are_keys_like_python_integers():
    assert numpy_generator(np.int64(7)).random() == numpy_generator(7).random()


@pytest.mark.parametrize("key", [1.0, True, None, b"a", (1,)])
def test_other_keys_are_refused(key):
    with pytest.raises(TypeError, match="integers and strings"):
        numpy_generator(key)


def test_a_stream_that_belongs_to_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one key"):
        torch_generator()


@pytest.mark.parametrize("draw", [uniform, normal])
def test_with_a_generator_for_each_sample_a_sample_draws_the_same_in_any_batch(draw):
    like = torch.zeros(1, dtype=torch.float64)
    whole = draw((3, 2, 5), [torch_generator("sample", number) for number in range(3)], like)
    alone = draw((2, 2, 5), [torch_generator("sample", number) for number in (2, 0)], like)
    assert whole.dtype == torch.float64 and torch.equal(alone, whole[[2, 0]])
    assert not torch.equal(whole[0], whole[1])


def test_one_generator_draws_a_whole_batch_as_torch_does():
    drawn = normal((3, 4), torch_generator("batch"), torch.zeros(1))
    assert torch.equal(drawn, torch.randn(3, 4, generator=torch_generator("batch")))
