"""Runs every example against one server that accepts uploads, in the environment of this Python."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tinkerbell_server.config import Settings
from tinkerbell_server.launch import running_server

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

with tempfile.TemporaryDirectory() as folder, running_server(Settings(data_dir=folder, dry_run_seconds=60.0)) as server:
    for example in EXAMPLES:
        print(f"--- {example.name}", flush=True)
        subprocess.run([sys.executable, str(example), "--url", server.url], check=True)
