import logging
import warnings

from swifti2v.cli.failures import configure_logging, silence_libraries


def test_slow_work_is_a_plain_line_and_warnings_are_marked(capsys):
    configure_logging(debug=False)

    logging.getLogger("swifti2v.progress").info("downloading org/repo from the Hub")
    logging.getLogger("swifti2v.models").warning("careful")
    logging.getLogger("swifti2v.models").info("a detail")

    lines = capsys.readouterr().err.splitlines()
    assert lines == ["downloading org/repo from the Hub", "WARNING: careful"]


def test_libraries_say_nothing_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own take what is logged
    logging.captureWarnings(capture=False)  # what an earlier command in this process began
    silence_libraries()

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("torchao: skipping import of cpp extensions", stacklevel=1)
    logging.getLogger("torchao").warning("skipping import of cpp extensions")

    assert capsys.readouterr().err == ""
