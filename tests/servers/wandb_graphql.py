"""The W&B server's answer to each GraphQL call. Part of tests/servers/wandb.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml

from tests.servers import wandb_artifacts
from tests.servers.wandb_state import ENTITY, PROJECT, Run, State, Sweep, merge_json

Variables = dict[str, Any]
Answer = dict[str, Any]


def answer(state: State, name: str, body: dict[str, Any], url: str) -> tuple[int, Any]:
    """Status and content of the answer to a GraphQL operation."""
    variables = body.get("variables") or {}
    if name in ("CreateRunFiles", "CreateArtifactFiles", "CreateArtifactManifest"):
        variables["url"] = url
    handler = _HANDLERS.get(name)
    if handler is None:
        return 200, {"errors": [{"message": f"the test server does not know {name}"}]}
    try:
        return 200, {"data": handler(state, variables)}
    except LookupError as error:
        return 404, {"errors": [{"message": str(error.args[0])}]}
    except FileExistsError as error:
        return 409, {"errors": [{"message": str(error)}]}
    except PermissionError as error:
        return 403, {"errors": [{"message": str(error)}]}


def file_stream(state: State, run_id: str, content: dict[str, Any]) -> tuple[int, Any]:
    """Rows, summary and the end of a run."""
    run = state.runs.get(run_id)
    if run is None:
        return 404, {"error": "no such run"}
    for name, chunk in (content.get("files") or {}).items():
        lines = chunk["content"]
        if name == "wandb-history.jsonl":
            run.rows[chunk["offset"] :] = [json.loads(line) for line in lines]
        elif name == "wandb-summary.json":
            run.summary = json.loads(lines[-1])
    if content.get("complete"):
        run.exit_code = content["exitcode"]
        run.state = "finished" if run.exit_code == 0 else "failed"
    else:
        run.state = "running"
    return 200, {"stopped": run.asked_to_stop}


def _viewer(_state: State, _: Variables) -> Answer:
    teams = {"edges": [{"node": {"name": ENTITY}}]}
    return {"viewer": {"id": "VXNlcg==", "entity": ENTITY, "username": "ann", "name": "Ann",
                       "email": "ann@example.org", "flags": "{}", "teams": teams,
                       "admin": False, "apiKeys": {"edges": []}}}  # fmt: skip


def _default_entity(_state: State, _: Variables) -> Answer:
    return {"viewer": {"id": "VXNlcg==", "entity": ENTITY}}


def _run(state: State, variables: Variables) -> Answer:
    run = state.runs.get(variables["name"])
    if run is None or variables["project"] != run.project:
        return {"project": {"run": None}}
    return {"project": {"run": {
        "projectId": "1", "id": run.name, "name": run.name, "displayName": run.display_name,
        "tags": run.tags, "sweepName": run.sweep, "state": run.state, "group": run.group,
        "config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary),
        "systemMetrics": "{}", "historyLineCount": len(run.rows), "historyKeys": None,
        "user": {"name": "Ann", "username": "ann"}, "jobType": None, "commit": None,
        "readOnly": False, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": None,
        "description": None, "notes": None,
    }}}  # fmt: skip


def _server_features(_state: State, _: Variables) -> Answer:
    return {"serverInfo": {"features": []}}


def _resume_status(state: State, variables: Variables) -> Answer:
    run = state.runs.get(variables["name"])
    bucket = None
    if run is not None and run.state != "pending":
        bucket = {
            "id": run.name,
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.display_name,
            "logLineCount": 0,
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": run.tags,
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }
    entity = {"id": "e", "name": ENTITY}
    return {"model": {"id": "p", "name": PROJECT, "entity": entity, "bucket": bucket}}


def _upsert_bucket(state: State, variables: Variables) -> Answer:
    entity = variables.get("entity") or ENTITY
    if entity not in state.entities:
        raise PermissionError(f"entity {entity} not found during upsertBucket")
    project = variables.get("project") or "uncategorized"
    name = variables.get("name") or variables["id"]
    inserted = name not in state.runs
    if name in state.deleted or (inserted and "*" in state.deleted and "-again" not in name):
        raise FileExistsError(f"run {name} was previously created and deleted; try a new run name")
    run = state.runs.setdefault(name, Run(name, project, entity))
    if variables.get("name"):
        run.starts += 1
        run.state = "running"
        run.sweep = variables.get("sweep") or run.sweep
    run.group = variables.get("groupName") or run.group
    run.display_name = variables.get("displayName") or run.display_name or name
    if variables.get("tags") is not None:
        run.tags = variables["tags"]
    run.config = merge_json(run.config, variables.get("config"))
    run.summary = merge_json(run.summary, variables.get("summaryMetrics"))
    bucket = {
        "id": run.name,
        "name": run.name,
        "displayName": run.display_name,
        "description": None,
        "config": json.dumps(run.config),
        "sweepName": run.sweep,
        "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}},
        "historyLineCount": len(run.rows),
    }
    return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}


def _upsert_sweep(state: State, variables: Variables) -> Answer:
    entity = variables.get("entityName") or ENTITY
    if entity not in state.entities:
        raise PermissionError(f"entity {entity} not found")
    sweep = state.add_sweep(variables["config"])
    sweep.project, sweep.entity = variables.get("projectName") or "uncategorized", entity
    project = {"id": "p", "name": sweep.project, "entity": {"id": "e", "name": sweep.entity}}
    found = {"name": sweep.name, "project": project}
    return {"upsertSweep": {"sweep": found, "configValidationWarnings": []}}


def _find(state: State, variables: Variables) -> Sweep | None:
    sweep = state.sweeps.get(variables.get("name") or variables.get("sweep") or "")
    entity, project = variables.get("entity"), variables.get("project")
    if sweep is None or entity not in (None, sweep.entity) or project not in (None, sweep.project):
        return None
    return sweep


def _get_sweep(state: State, variables: Variables) -> Answer:
    if variables.get("entity") not in (None, *state.entities):
        return {"project": None}
    sweep = _find(state, variables)
    if sweep is None:
        return {"project": {"sweep": None}}
    found = {
        "__typename": "Sweep",
        "id": sweep.name,
        "name": sweep.name,
        "displayName": None,
        "method": sweep.config.get("method"),
        "state": sweep.state,
        "description": None,
        "bestLoss": None,
        "config": yaml.safe_dump(sweep.config),
        "createdAt": "2026-01-01T00:00:00",
        "updatedAt": None,
        "runCount": sweep.num_drawn,
        "runCountExpected": None,
    }
    return {"project": {"sweep": found}}


def _create_agent(state: State, variables: Variables) -> Answer:
    variables = {"sweep": variables["sweep"], "entity": variables.get("entityName"),
                 "project": variables.get("projectName")}  # fmt: skip
    sweep = _find(state, variables)
    if sweep is None:
        raise LookupError(f"sweep {variables['sweep']} not found")
    agent = f"agent{len(state.agents)}"
    state.agents[agent] = sweep
    return {"createAgent": {"agent": {"id": agent}}}


def _heartbeat(state: State, variables: Variables) -> Answer:
    agent, running = variables["id"], json.loads(variables["runState"] or "{}")
    sweep = state.agents[agent]
    if sweep.name not in state.sweeps:
        raise LookupError(f"sweep {sweep.name} not found")
    commands: list[Any] = []
    to_stop = [r for r in running if state.runs[r].asked_to_stop and r not in state.told_to_stop]
    if to_stop:
        state.told_to_stop.add(to_stop[0])
        commands = [{"type": "stop", "run_id": to_stop[0]}]
    elif sweep.state in ("CANCELED", "FINISHED"):
        commands = [{"type": "exit"}]
    elif sweep.state == "RUNNING" and not running:
        offered = state.offer(sweep)
        if offered is None:
            sweep.state = "FINISHED"
        commands = [offered or {"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}


def _create_run_files(_state: State, variables: Variables) -> Answer:
    base = f"{variables['url']}/storage/{variables['run']}"
    files = [{"name": name, "uploadUrl": f"{base}/{name}"} for name in variables["files"]]
    return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}


_HANDLERS: dict[str, Callable[[State, Variables], Answer]] = {
    "Viewer": _viewer,
    "GetDefaultEntity": _default_entity,
    "Run": _run,
    "ServerFeaturesQuery": _server_features,
    "RunResumeStatus": _resume_status,
    "UpsertBucket": _upsert_bucket,
    "UpsertSweep": _upsert_sweep,
    "GetSweep": _get_sweep,
    "GetSweepLegacy": _get_sweep,
    "CreateAgent": _create_agent,
    "Heartbeat": _heartbeat,
    "CreateRunFiles": _create_run_files,
    "CreateArtifact": wandb_artifacts.create_artifact,
    "CreateArtifactManifest": wandb_artifacts.create_manifest,
    "CreateArtifactFiles": wandb_artifacts.create_artifact_files,
    "CommitArtifact": wandb_artifacts.commit_artifact,
    "FetchArtifactDigestAlgorithm": wandb_artifacts.no_artifact_type,
    "ArtifactType": wandb_artifacts.no_artifact_type,
}
