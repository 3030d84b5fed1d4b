"""Promotion of a chosen model version behind the approval of a human."""

from __future__ import annotations

from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Param, get_current_context, task

from operators import promotion

DOC = """
### Promote a model version

Names a version, shows its figures beside those of the version that is served now, waits until
somebody approves (*Required actions* in this run), then points the alias at it. The endpoint
switches within seconds. Rejecting moves nothing. `sailyard rollback` undoes a promotion.
"""

PARAMS = {
    "version": Param(
        "",
        type="string",
        description="tiny:3, tiny (its newest) or a checkpoint's digest; empty: the newest of all.",
    ),
    "alias": Param(
        "production",
        type="string",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$",
        description="Name that the endpoint serves.",
    ),
    "reason": Param("", type="string", description="Kept with the promotion."),
}


@task
def review() -> dict[str, str]:
    params = get_current_context()["params"]
    return promotion.review(params["version"], params["alias"])


@task
def promote(reviewed: Any, answer: Any) -> str:
    """``reviewed`` is what ``review`` returned, ``answer`` what the human chose."""
    params = get_current_context()["params"]
    user = (answer.get("responded_by_user") or {}).get("name") or "airflow"
    return promotion.promote(reviewed["version"], params["alias"], user, params["reason"])


with DAG(
    "promote",
    schedule=None,
    catchup=False,
    params=PARAMS,
    doc_md=DOC,
    description="Point an alias at a model version, once a human has approved it.",
    tags=["sailyard"],
) as dag:
    reviewed = review()
    approve = ApprovalOperator(
        task_id="approve",
        subject="Promote {{ ti.xcom_pull(task_ids='review')['version'] }} to {{ params.alias }}?",
        body="{{ ti.xcom_pull(task_ids='review')['text'] }}",
    )
    reviewed >> approve
    promote(reviewed, approve.output)
