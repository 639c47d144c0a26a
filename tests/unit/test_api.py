"""The public names, and the page that describes them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import gramfuse_client
import gramfuse_server

ROOT = Path(__file__).parents[2]


def test_the_api_page_is_made_from_the_docstrings_as_they_are() -> None:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == module.document(), "make api"
    for package in (gramfuse_client, gramfuse_server):
        assert set(package.__all__) == set(module.PUBLIC[package.__name__])


def test_the_public_names_of_one_side_load_no_more_than_they_need() -> None:
    code = (
        "import gramfuse_client, gramfuse_server, sys; gramfuse_server.read_statistics; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
