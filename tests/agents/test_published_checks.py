"""Programs of others that judge servers: llm-comply by the published schemas, schemathesis by our own description."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.agents.conftest import Beside, environment

pytestmark = pytest.mark.agents

# format -> (the name of a model whose thoughts it tests, what is not served here)
FORMATS = {
    "open-responses": ("gpt-5", {"image-input", "compact-response", "compact-missing-model"}),
    "openai-chat": ("gpt-5", {"chat-image-input"}),
    "anthropic": ("claude-opus-4-8", {"anth-image-input"}),
}
# Open Responses' name for the events of a thought is another than OpenAI's, whose clients are served.
IGNORED = "response.reasoning_text"


@pytest.mark.parametrize("form", FORMATS)
def test_llm_comply(beside: Beside, form: str, tmp_path: Path) -> None:
    model, not_served = FORMATS[form]
    program = environment("checks") / "bin" / "llm-comply"
    asked = ["--format", form, "-u", "{address}/v1", "-k", "none", "-m", model, "--json", "-i", IGNORED]
    done = beside.run([program, *asked], tmp_path)
    results = json.loads(done.output)["results"]
    failed = {result["id"]: result.get("errors") for result in results if result["status"] == "failed"}
    assert failed.keys() <= not_served, failed
    assert sum(result["status"] == "passed" for result in results) >= 7
    assert all(request["status"] < 500 for request in done.requests)


@pytest.mark.timeout(900)
def test_no_request_is_a_server_error(beside: Beside, tmp_path: Path) -> None:
    program = environment("checks") / "bin" / "schemathesis"
    asked = ["--phases", "fuzzing", "--checks", "not_a_server_error", "--max-examples", "50", "--seed", "1"]
    asked += ["--max-time", "600", "--no-shrink", "--continue-on-failure", "--request-timeout", "120"]
    done = beside.run([program, "run", "{address}/openapi.json", *asked], tmp_path, seconds=800)
    # This program counts every 5xx; a request that gave itself too little time (`timeout`) is answered with 504.
    late = [request for request in done.requests if "reached its deadline" in request.get("said", "")]
    broken = [request for request in done.requests if request["status"] >= 500 and request not in late]
    assert not broken and len(done.requests) > 1000, (broken[:3], len(done.requests))
    assert done.code == 0 or late, done.output
