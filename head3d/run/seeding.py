"""Random generators as pure functions of what they are for: no global state, no dependence on process, order or Python's own hash."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Draws = torch.Generator | Sequence[torch.Generator]  # one stream for a whole batch, or one for each of its samples


def numpy_generator(*keys: int | str) -> np.random.Generator:
    """The generator that belongs to `keys`, for example `numpy_generator(seed, "identity", 17)`.

    The same keys give the same stream in every process and Python version; different keys give independent streams
    (SHA-256 of the keys seeds a NumPy SeedSequence). Everything that is recorded and re-made later draws from here.
    """
    return np.random.default_rng(_seed_sequence(keys))


def torch_generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """As `numpy_generator`, for torch, on `device`.

    Torch's CPU engine uses 32 bits of a seed, so among some ten thousands of key sets two may share a stream: good for training noise,
    while recipes draw from `numpy_generator`.
    """
    seed = int(_seed_sequence(keys).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(seed)


def uniform(shape: Sequence[int], draws: Draws, like: Tensor) -> Tensor:
    """U(0, 1) of `shape` [B, ...], with the device and number format of `like`; with B generators, sample b draws from draws[b] alone."""
    return _draw(torch.rand, shape, draws, like)


def normal(shape: Sequence[int], draws: Draws, like: Tensor) -> Tensor:
    """N(0, 1), otherwise as `uniform`."""
    return _draw(torch.randn, shape, draws, like)


def _draw(kind: Callable[..., Tensor], shape: Sequence[int], draws: Draws, like: Tensor) -> Tensor:
    if isinstance(draws, torch.Generator):
        return kind(tuple(shape), generator=draws, device=draws.device, dtype=like.dtype).to(like.device)
    assert len(draws) == shape[0], f"expected a generator for each of {shape[0]} samples, got {len(draws)}"
    return torch.stack([kind(tuple(shape[1:]), generator=one, device=one.device, dtype=like.dtype) for one in draws]).to(like.device)


def _seed_sequence(keys: tuple[int | str, ...]) -> np.random.SeedSequence:
    if not keys:
        raise ValueError("a generator needs at least one key; a stream that belongs to nothing cannot be made again")
    digest = hashlib.sha256()
    for key in keys:
        if isinstance(key, str):
            text = key.encode()
            tag = b"s"
        elif isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            text = str(int(key)).encode()
            tag = b"i"
        else:
            raise TypeError(f"a generator's keys are integers and strings, got {key!r} of type {type(key).__name__}")
        digest.update(tag + len(text).to_bytes(8, "little") + text)
    return np.random.SeedSequence(np.frombuffer(digest.digest(), dtype="<u4").tolist())


@contextlib.contextmanager
def weights_drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Within the context, layers initialise themselves from `generator` (a CPU generator).

    Torch's layers know only the global generator; here it takes the state of `generator` and gets its own back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield
