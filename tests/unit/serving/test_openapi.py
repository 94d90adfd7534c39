"""The description of the API holds for what the server answers."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from swifti2v.serving.settings import Limits
from tests.helpers.serving import NoWorker, ok, serve

CHECKS = (
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
)
NUM_EXAMPLES = 8


@pytest.fixture(scope="module")
def live(model, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    with serve(model, data, limits=Limits(sync_seconds=0), worker=NoWorker) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("is_known", [True, False], ids=["known ids", "any id"])
def test_every_answer_is_as_described(live, is_known):
    known = {"/v1/models/{id}": "tiny"}
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr] # an error says so
        has_id = "{id}" in operation.path
        if is_known and not has_id:
            continue
        id = live.submit()["id"]
        ok(live.client.post(f"/v1/videos/{id}/cancel"))

        @given(case=operation.as_strategy())
        @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck])
        def check(case):
            if is_known:
                case.path_parameters = {"id": known.get(case.operation.path, id)}  # noqa: B023
            # No worker runs here: the one answers 503, the other 504.
            needs_worker = case.operation.path in ("/ready", "/v1/videos/sync")
            case.call_and_validate(checks=CHECKS[1:] if needs_worker else CHECKS)

        check()


def test_every_route_is_described_with_its_errors_and_bodies(live):
    document = ok(live.client.get("/openapi.json"))
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"]
            assert "ErrorBody" in str(operation["responses"]["400"]), path
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/json", "multipart/form-data"}
    assert "HTTPValidationError" not in str(document)
