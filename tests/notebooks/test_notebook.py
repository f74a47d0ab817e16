"""The committed notebook: valid, clean, without outputs, and its cells depend only on the settings."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest

from tests.docs.pages import PAGES
from tests.notebooks import notebook

CELLS = [cell for cell in notebook.load().cells if cell.cell_type == "code"]


def settings() -> dict[str, object]:
    """Names and values of the settings cell, which has only constants."""
    statements = ast.parse(notebook.cell("settings")).body
    assert all(isinstance(node, ast.Assign) and len(node.targets) == 1 for node in statements)
    return {node.targets[0].id: ast.literal_eval(node.value) for node in statements}


def test_it_is_a_valid_notebook_for_a_tpu_without_outputs():
    loaded = notebook.load()
    nbformat.validate(loaded)
    assert loaded.metadata["accelerator"] == "TPU" and loaded.metadata["colab"]["gpuType"] == "V5E1"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in CELLS)
    assert len({cell.id for cell in loaded.cells}) == len(loaded.cells)


def test_it_passes_ruff():
    process = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "notebooks"], cwd=notebook.ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout


def test_the_first_code_cell_is_the_settings_and_each_is_used_elsewhere():
    assert CELLS[0].id == "settings" and [cell.id for cell in CELLS if cell.metadata.get("tags")] == ["settings"]
    source = "\n".join(cell.source for cell in CELLS[1:])
    loaded = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    stored = {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert settings().keys() <= loaded and not settings().keys() & stored
    assert settings()["PLATFORM"] == "tpu" and settings()["MODEL"] == "Qwen/Qwen2.5-0.5B-Instruct"


def test_every_setting_has_a_valid_form_field():
    for line in notebook.cell("settings").splitlines():
        if not line.startswith("#") and line:
            name, _, field = line.partition("  # @param ")
            choices = json.loads(field) if field.startswith("[") else None
            assert field.startswith(("[", "{type:")), line
            assert choices is None or ast.literal_eval(name.partition(" = ")[2]) in choices


def test_no_path_depends_on_a_machine():
    for cell in notebook.load().cells:
        paths = set(re.findall(r"[\"'`](/[\w.-]+/[\w./-]*)", cell.source))
        assert all(path.startswith("/content/drive") for path in paths), (cell.id, paths)


def test_links_to_colab_lead_to_the_notebook():
    form = r"https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/\w+/(notebooks/[\w.-]+)"
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    links = [link for text in texts for link in re.findall(r"https://colab\.research\.google\.com/github/\S*\w", text)]
    assert links
    for link in links:
        assert (notebook.ROOT / re.fullmatch(form, link)[1]).is_file()


def test_drive_is_mounted_only_on_colab(monkeypatch, tmp_path, capsys):
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    exec(notebook.cell("folder"), {"WORKDIR": str(tmp_path / "here")})
    assert "not on Drive: nothing to mount" in capsys.readouterr().out and (tmp_path / "here").is_dir()
    names = {"WORKDIR": "/content/drive/MyDrive/x"}
    with pytest.raises(ValueError, match="this is not Colab"):
        exec(notebook.cell("folder"), names)
    colab = types.ModuleType("google.colab")
    colab.drive, colab.__spec__ = drive, object()
    google = types.ModuleType("google")
    google.__spec__, google.__path__, google.colab = object(), [], colab
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: None)
    exec(notebook.cell("folder"), names)
    assert mounted == ["/content/drive"]


def test_the_code_is_cloned_or_a_folder_and_needs_an_address(monkeypatch, tmp_path, capsys):
    source = tmp_path / "source"
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", "-b", "backbone", str(source)], check=True)
    (source / "file").write_text("")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def root(**names):
        variables = {"CODE": "", "REVISION": "", "Path": Path} | names
        exec(notebook.cell("code"), variables)
        return variables["ROOT"]

    with pytest.raises(ValueError, match="CODE is empty"):
        root()
    with pytest.raises(ValueError, match=r"CODE file://.*nowhere"):
        root(CODE=f"file://{tmp_path}/nowhere")
    cloned = root(CODE=f"file://{source}", REVISION="backbone")
    assert (cloned / "file").is_file() and root(CODE=f"file://{source}") == cloned
    assert root(CODE=str(source)) == source
    assert sys.path[0] == str(source)
    monkeypatch.chdir(notebook.ROOT / "notebooks")
    assert root() == notebook.ROOT
