"""What all tests share. Tests use one thread and tiny sizes."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import fsspec
import hypothesis
import pytest
import torch
import torch.distributed

from genhead.background import BackgroundConfig
from genhead.generator import GenHeadConfig
from head3d.networks.superresolution import SuperResolutionConfig
from head3d.rendering import RaySampling

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)  # the same on every machine, however slow
hypothesis.settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu` is skipped without a CUDA device, and one that is skipped without a CUDA device is marked `gpu`."""
    for item in items:
        if any("CUDA" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture
def parity() -> Path:
    """The folder of reference numbers of the published networks, which lies beside the repository where it is available."""
    folder = ROOT.parent / "shared" / "parity"
    if not folder.is_dir():
        pytest.skip(f"the published networks' reference numbers are not in {folder}")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on a free port of this machine, known to this process and to those that it starts."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT_URL": address,
            "ACCESS_KEY_ID": "test",
            "SECRET_ACCESS_KEY": "test",
            "DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        yield address
    server.stop()


_BUCKETS = itertools.count()


@pytest.fixture
def bucket(s3_server: str) -> str:
    """The URL of an empty bucket of the S3 server."""
    url = f"s3://bucket-{next(_BUCKETS)}"
    fsspec.filesystem("s3").mkdir(url)
    return url


@pytest.fixture(scope="session")
def tiny_genhead() -> Callable[[int], GenHeadConfig]:
    """`tiny_genhead(side)`: a generator of a few thousand weights for pictures of `side` px, rendered at half of that.

    Planes have 4 channels, rendered features 6, so that a mix-up of the two shows.
    """

    def build(side: int) -> GenHeadConfig:
        rays, features, width = side // 2, 6, {"channel_base": 8 * side, "channel_max": 8}
        return GenHeadConfig(
            z_dim=8,
            w_dim=8,
            plane_resolution=rays,
            plane_channels=4,
            feature_channels=features,
            decoder_hidden=8,
            **width,
            render_resolution=rays,
            image_resolution=side,
            mask_resolution=32,
            sampling=RaySampling(depth_samples=4, importance_samples=3),
            background=BackgroundConfig(resolution=rays, channels=features, z_dim=8, w_dim=8, mapping_layers=1, **width),
            superresolution=SuperResolutionConfig(input_resolution=rays, feature_channels=features, channels=(8,), w_dim=8),
        )

    return build


@pytest.fixture
def hostile() -> Callable[..., object]:
    """`hostile(function, *arguments)`: an object whose pickle asks to call the function."""

    class Hostile:
        def __init__(self, *call: object) -> None:
            self.call = call[0], call[1:]

        def __reduce__(self) -> tuple:
            return self.call

    return Hostile


@pytest.fixture
def two_processes() -> Callable[[Sequence[str]], list[str]]:
    """`two_processes(arguments)`: run Python with `arguments` as the two processes of a group; what each printed, if both end well.

    They meet as under torchrun, in a store that this process holds, so no port is chosen before it is taken; they speak through the
    loopback interface, whatever this machine's name stands for.
    """

    def printed_by(process: subprocess.Popen) -> str:
        printed, errors = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, printed, errors)
        return printed

    def run(arguments: Sequence[str]) -> list[str]:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = os.environ | {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": next(name for _, name in socket.if_nameindex() if name.startswith("lo")),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        processes = [
            subprocess.Popen([sys.executable, *arguments], env=environment | {"RANK": rank}, cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in "01"
        ]  # fmt: skip
        with ThreadPoolExecutor(2) as readers:  # the pipes of both are emptied all the time
            endings = [readers.submit(printed_by, process) for process in processes]
            try:
                _, running = wait(endings, timeout=900, return_when=FIRST_EXCEPTION)
                wait(running, timeout=10)  # the other one may be just saying why
            finally:
                for process in processes:
                    process.kill()  # one waits for ever when the other has failed
        errors = [ending.exception() for ending in endings]
        assert errors == [None, None], "\n".join(f"process {rank}: {error}\n{error.stderr}" for rank, error in enumerate(errors) if error)
        return [ending.result() for ending in endings]

    return run
