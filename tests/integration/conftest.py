import pytest

from tests.helpers.command_line import save_photo
from tests.helpers.tiny import SIZE, tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path):
    return save_photo(tmp_path / "photo.png", SIZE, SIZE)
