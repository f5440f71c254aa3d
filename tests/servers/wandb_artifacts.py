"""The W&B server's answers about artifacts. Part of tests/servers/wandb.py."""

from __future__ import annotations

from typing import Any

from tests.servers.wandb_state import State

Variables = dict[str, Any]
Answer = dict[str, Any]


def create_artifact(state: State, variables: Variables) -> Answer:
    given = variables.get("input") or variables
    artifact = {**given, "id": f"artifact{len(state.artifacts)}", "state": "PENDING"}
    same = [a for a in state.artifacts if a.get("digest") == given.get("digest")]
    if same:
        artifact = same[0]
    else:
        state.artifacts.append(artifact)
    found = {"id": artifact["id"], "state": artifact["state"],
             "artifactSequence": {"latestArtifact": None}}  # fmt: skip
    return {"createArtifact": {"artifact": found}}


def create_manifest(_state: State, variables: Variables) -> Answer:
    manifest_id = f"manifest-{variables.get('artifactID') or variables.get('artifactManifestID')}"
    file = {"id": manifest_id, "uploadHeaders": [],
            "uploadUrl": f"{variables.get('url', '')}/storage/{manifest_id}"}  # fmt: skip
    return {"createArtifactManifest": {"artifactManifest": {"id": manifest_id, "file": file}}}


def create_artifact_files(_state: State, variables: Variables) -> Answer:
    edges = []
    for spec in variables["input"]["artifactFiles"]:
        path = f"artifacts/{spec['artifactID']}/{spec['name']}"
        edges.append({"node": {"storagePath": path, "uploadUrl": f"{variables['url']}/{path}",
                               "uploadHeaders": [], "uploadMultipartUrls": None,
                               "artifact": {"id": spec["artifactID"]}}})  # fmt: skip
    return {"createArtifactFiles": {"files": {"edges": edges}}}


def commit_artifact(state: State, variables: Variables) -> Answer:
    (artifact,) = [a for a in state.artifacts if a["id"] == variables["artifactID"]]
    artifact["state"] = "COMMITTED"
    return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}


def no_artifact_type(_state: State, _: Variables) -> Answer:
    return {"project": {"artifactType": None, "artifact": None}}
