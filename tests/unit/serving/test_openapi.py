"""The description of the API holds for what the server answers."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tests.serving import NoWorker, serve

CHECKS = (
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
)


@pytest.fixture(scope="module")
def api(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("data"), worker=NoWorker) as live:
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case):
    if case.path.endswith("/sync") or case.path == "/v1/videos/sync":
        case.headers = {**(case.headers or {}), "Content-Type": "text/plain"}  # it would wait
    case.call_and_validate(checks=CHECKS)
