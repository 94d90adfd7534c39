import pytest

from tests.helpers.serving import serve
from tests.helpers.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def live(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("data")) as server:
        yield server
