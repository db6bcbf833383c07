"""Checks beside those that schemathesis has."""

import schemathesis

# Failures of the server that a client can bring about; any other is a finding.
MEANT = {"not_built", "boot_failed"}


@schemathesis.check
def failures_are_meant(ctx, response, case):
    """A status of 5xx comes with a code that says it is no accident."""
    if response.status_code < 500 or "problem" not in response.headers.get("content-type", [""])[0]:
        return
    code = response.json().get("code")
    assert code in MEANT, f"{response.status_code} with code {code}: {response.text}"
