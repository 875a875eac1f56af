"""`make clients`: starts a server and lets every client play its scenarios in its own environment.

python tests/clients/run.py FOLDER_OF_ENVIRONMENTS [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "benchmarks"))

from server import serving  # noqa: E402

SCRIPTS = {"openai1": "openai_client.py", "openai3": "openai_client.py"}


def main() -> int:
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    lines = (HERE / "environments.txt").read_text().splitlines()
    names = only or [line.split()[0] for line in lines if not line.startswith("#")]
    failed = []
    with (
        tempfile.TemporaryDirectory() as state,
        serving("smollm2", "--state-dir", state, "--kv-memory", "400MiB", "--dtype", "fp32") as (url, _),
    ):
        for name in names:
            print(f"== {name}", flush=True)
            script = HERE / SCRIPTS.get(name, f"{name}_client.py")
            if subprocess.run([folder / name / "bin" / "python", script, url], check=False).returncode:
                failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all clients are served")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
