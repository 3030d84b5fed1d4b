"""The smoke test that a pinned server puts its own version to before it calls itself ready.

Kubernetes sends a pod no request until it is ready, and takes no older pod away before: so nobody
ever talks to a version that failed, and none that works is given up for it.
"""

from __future__ import annotations

import logging

from openai import OpenAI

from sailyard.runs import stage_result
from sailyard.samples import Sample
from sailyard.yard import Yard
from serving.probe import SmokeFailed, ask, quiet_client
from serving.settings import ServingSettings
from serving.smoke import check_refusals, pick
from serving.versions import Served

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 120.0
HELDOUT = "curation.heldout"


def prove(url: str, served: Served, settings: ServingSettings, yard: Yard | None = None) -> None:
    """Ask the server at ``url`` held-out questions of its version's own run, whole and streamed.

    Raises:
        SmokeFailed: A reply is malformed, stream and whole differ, or an http image is not refused.
    """
    samples = questions(served.digest, yard or Yard())
    key = settings.api_key.get_secret_value() if settings.api_key else "none"
    quiet_client()
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_SECONDS)
    for sample in samples:
        whole = ask(client, served.name, sample, "whole")
        streamed = ask(client, served.name, sample, "streamed")
        if (whole.content, whole.reasoning) != (streamed.content, streamed.reasoning):
            raise SmokeFailed(
                f"{sample.id} streamed gives {streamed.content!r}, whole {whole.content!r}"
            )
    check_refusals(client, served.name)
    log.info("%s answered %d questions, each whole and streamed", served.name, len(samples))


def questions(digest: str, yard: Yard) -> list[Sample]:
    """One held-out question a skill; of a checkpoint that no run of ours made, a plain one."""
    run = yard.registry.version(digest).run_id
    made = stage_result(run, HELDOUT, yard) if run else None
    if made is not None and made.finished:
        return pick(yard.artifacts.fetch(made.outputs["heldout"]), 1)
    turn = {"role": "user", "content": "What is 2 + 3?"}
    return [Sample(id="plain", source="smoke", task="plain", messages=[turn])]
