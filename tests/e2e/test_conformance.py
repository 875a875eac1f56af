"""Some hundred of the cases of `make conformance`, against a server in this process."""

from __future__ import annotations

from pathlib import Path

import conformance
import pytest
import tiny_chat


def check(cases: int) -> None:
    with conformance.model() as folder:
        flags = (*conformance.FLAGS, "--state-dir", str(Path(folder) / "state"), "--embedding-model", "none")
        with tiny_chat.serving(folder, *flags) as url:
            found = conformance.all_shares(conformance.shares(url, cases, 1), workers=1)
    assert not found.wrong, "\n".join(f"== {kind}\n{why}" for kind, why in found.wrong.items())
    assert found.cases >= cases and found.statuses[200] > cases / 10 and found.statuses[400] > cases / 10


def test_answers_are_what_the_document_says() -> None:
    check(200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_answers_to_many_more_cases_are_too() -> None:
    check(5000)
