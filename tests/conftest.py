import dense_backend
import processes
import pytest
import support
import torch

from flashpair import dispatch, recording


@pytest.fixture(autouse=True)
def _clean():
    torch.manual_seed(0)
    dense_backend.calls.clear()
    recording.forget()  # tests change what decides on kernels
    recording.RECORDED = 2
    yield


@pytest.fixture(scope="session", autouse=True)
def _dense_backend():
    """The dense twin of a fused backend stands in the table, after all others, so it only runs when forced."""
    table = dispatch.TABLE
    dispatch.TABLE = (*table, support.DENSE)
    yield
    dispatch.TABLE = table


@pytest.fixture(scope="session", autouse=True)
def products_per_thread():
    """Problems of tests are so small that one thread would do each: the others are to be tested too.

    Gives the number that users have.
    """
    return torch.ops.flashpair_cpu.set_products_per_thread(1) if "cpu" in support.FUSED else None


@pytest.fixture(scope="session")
def pools():
    """Processes that share a group, `pools(size)`; they start on first use and end with the session."""
    started: dict[int, processes.Pool] = {}

    def pool(size: int) -> processes.Pool:
        if size not in started:
            started[size] = processes.Pool(size)
        return started[size]

    yield pool
    for found in started.values():
        found.close()


@pytest.fixture(params=["dense", *support.FUSED])
def backend(request):
    """Every backend behind the operators, forced: the dense twin and the fused ones usable here."""
    with support.forced(request.param):
        yield request.param


@pytest.fixture(params=support.FUSED or [None])
def fused(request):
    """Every fused backend usable here, forced."""
    if request.param is None:
        pytest.skip("no fused backend is usable here: " + str(dispatch.backends()))
    with support.forced(request.param):
        yield request.param
