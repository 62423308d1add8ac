import dense_backend
import own_process
import processes
import pytest
import support
import torch

from flashpair import dispatch


def pytest_collection_finish(session):
    """Files that run again in a process of their own begin now, if that was asked for."""
    for item in session.items:
        environment = getattr(getattr(item, "module", None), "OWN_PROCESS", None)
        if environment and item.name == "test_in_a_process_of_its_own" and not session.config.option.collectonly:
            own_process.start(item.module.__file__, **environment)


def pytest_sessionfinish(session, exitstatus):
    own_process.stop()


@pytest.fixture(autouse=True)
def _clean():
    torch.manual_seed(0)
    dense_backend.calls.clear()
    yield


@pytest.fixture(scope="session", autouse=True)
def _dense_backend():
    """The dense twin of a fused backend stands in the table, after all others, so it only runs when forced."""
    table = dispatch.TABLE
    dispatch.TABLE = (*table, support.DENSE)
    yield
    dispatch.TABLE = table


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
