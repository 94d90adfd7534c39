"""``swifti2v ui`` where a server runs already: its page is opened, and no second server starts."""

import socket
import sys

from tests.helpers.command_line import succeed, swifti2v


def test_the_page_of_a_running_server_is_opened(tmp_path, monkeypatch):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(opened)!r}, 'w').write(sys.argv[1])\n"
    )
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        result = succeed(swifti2v("ui", "--port", port, "--data-dir", tmp_path / "data"))
    address = f"http://127.0.0.1:{port}/"
    assert address in result.stderr
    assert opened.read_text() == address
    assert not (tmp_path / "data").exists()
