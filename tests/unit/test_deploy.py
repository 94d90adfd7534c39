"""Files of ``deploy/``: their commands are ``swifti2v serve``'s, and they keep what they promise."""

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from swifti2v import __version__
from swifti2v.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCUMENT = DEPLOY.parent / "docs" / "deploy.md"
WORKER_SECONDS = 30
"""Seconds that the server gives its worker to stop."""


def read(name: str) -> str:
    return (DEPLOY / name).read_text("utf-8")


def read_unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(read("swifti2v.service"))
    return parser["Service"]


def read_services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(read("compose.yaml"))["services"]
    return services


def read_deployment() -> dict[str, Any]:
    documents = list(yaml.safe_load_all(read("kubernetes.yaml")))
    assert [d["kind"] for d in documents] == ["PersistentVolumeClaim", "Service", "Deployment"]
    pod: dict[str, Any] = documents[-1]["spec"]["template"]["spec"]
    return pod


def stages() -> dict[str, str]:
    """Instructions of each stage of the Dockerfile by its name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", read("Dockerfile"), flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def commands() -> Iterator[list[str]]:
    """Words of every ``serve`` in files, comments and the document."""
    (command,) = re.findall(r"^CMD (.*)$", stages()["base"], flags=re.MULTILINE)
    yield json.loads(command)
    for service in read_services().values():
        yield service["command"]
    yield shlex.split(read_unit()["ExecStart"])[1:]
    pod = read_deployment()
    yield pod["containers"][0]["args"]
    yield shlex.split(pod["initContainers"][0]["args"][0].partition("swifti2v ")[2])
    for text in (read("compose.yaml"), DOCUMENT.read_text("utf-8")):
        found = re.findall(r"run --rm cpu (serve .*?)\s+#", text)
        assert found
        yield from map(shlex.split, found)


def serve_context(words: list[str]) -> Any:
    """Options as the command line reads them; an unknown one raises."""
    command: Any = typer.main.get_command(app)
    assert words[0] == "serve"
    return command.commands["serve"].make_context("serve", words[1:])


def test_every_command_is_one_that_serve_takes():
    for words in commands():
        data_dir = serve_context(words).params["data_dir"]
        assert data_dir.parts[:2] in [("/", "data"), ("/", "var")], words


def test_an_unknown_option_is_found():
    with pytest.raises(Exception, match="No such option"):
        serve_context(["serve", "--bind", "0.0.0.0"])


def test_everybody_waits_for_the_worker_to_stop():
    waits = [
        int(read_unit()["TimeoutStopSec"]),
        read_deployment()["terminationGracePeriodSeconds"],
        *(int(s["stop_grace_period"].removesuffix("s")) for s in read_services().values()),
    ]
    assert min(waits) > WORKER_SECONDS


def test_images_are_pinned_and_not_run_by_root():
    base = re.search(r"^ARG PYTHON=(\S+)$", read("Dockerfile"), flags=re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"3\.\d+\.\d+-\S+", base[1])
    for target in ("cpu", "cuda"):
        assert "USER 10001:10001" in stages()[target].splitlines()
    assert "HEALTHCHECK" in stages()["base"]
    assert read_deployment()["securityContext"]["runAsUser"] == 10001
    assert read_deployment()["securityContext"]["runAsNonRoot"] is True


def test_images_have_the_version_of_the_package():
    images = [s["image"] for s in read_services().values()]
    pod = read_deployment()
    images += [part["image"] for part in (*pod["containers"], *pod["initContainers"])]
    images += re.findall(r"swifti2v:[\w.-]+", DOCUMENT.read_text("utf-8"))
    assert {image.rpartition("-")[0] for image in images} == {f"swifti2v:{__version__}"}


def test_probes_ask_for_what_the_server_tells():
    (server,) = read_deployment()["containers"]
    names = ("startupProbe", "livenessProbe", "readinessProbe")
    paths = [server[name]["httpGet"]["path"] for name in names]
    assert paths == ["/health", "/health", "/ready"]


def test_the_unit_keeps_its_state_where_it_may_write():
    unit = read_unit()
    assert unit["DynamicUser"] == "yes"
    assert unit["ProtectSystem"] == "strict"
    data_dir = serve_context(shlex.split(unit["ExecStart"])[1:]).params["data_dir"]
    assert data_dir.is_relative_to(Path("/var/lib") / unit["StateDirectory"])
