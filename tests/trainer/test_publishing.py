"""The upload to the hub, against a stand-in with the signatures of the real client."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest

from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer import TrainResult
from tests.trainer import tiny

NAME = "somebody/aligned"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return api


def publish(root: Path, repository: str | None = NAME, **output: Any) -> TrainResult:
    sections: dict[str, Any] = {"training": {"steps": 1}, "optimizer": {"warmup_steps": 0}}
    return tiny.trained(root, model={"lora": {"rank": 2}}, output={"push_to_hub": repository, **output}, **sections)


@pytest.mark.parametrize("private", [True, False])
def test_model_and_adapter_are_uploaded(workspace: Path, hub: Any, private: bool) -> None:
    files: list[set[str]] = []
    hub.upload_folder.side_effect = lambda **options: files.append(
        {file.name for file in Path(options["folder_path"]).iterdir()}
    )
    publish(workspace, hub_private=private)
    hub.create_repo.assert_called_once_with(NAME, private=private, exist_ok=True, repo_type="model")
    uploads = [call.kwargs for call in hub.upload_folder.call_args_list]
    assert [(call["repo_id"], call["path_in_repo"]) for call in uploads] == [(NAME, None), (NAME, "adapter")]
    assert {"README.md", "unet"} <= files[0] and "adapter_model.safetensors" in files[1]


def test_nothing_is_uploaded_by_default(workspace: Path, hub: Any) -> None:
    publish(workspace, None)
    assert hub.mock_calls == []


def test_what_cannot_work_is_refused_before_training(
    workspace: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InvalidInput, match=rf"output\.push_to_hub = '{NAME}': needs an account"):
        publish(workspace)
    with pytest.raises(InvalidInput, match=r"output\.push_to_hub = 'a/b/c': is not the name of a repository"):
        publish(workspace, "a/b/c")
    assert not (workspace / "run").exists()


def test_a_refused_upload_keeps_the_result(workspace: Path, hub: Any) -> None:
    hub.upload_folder.side_effect = OSError("403")
    with pytest.raises(InvalidInput, match=r"was refused \(403\)\. Remedy: the run is complete; upload it with `hf"):
        publish(workspace)
    assert (workspace / "run" / "model" / "README.md").is_file()
