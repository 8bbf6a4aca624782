"""A Ray cluster of three nodes on this machine, which a sweep runs on while one of them is killed.

`python -m tests.e2e.faults.ray_cluster FOLDER WORD…` starts the command `-m WORD…` twice: the first
time a node is killed as soon as a cell is finished and both nodes are at work on others. It writes
`runs.json`: of each command the exit code, its output, and the cells that were finished at its end.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 300


def finished(folder: Path) -> dict[str, str]:
    """Cell -> when it was started, of the finished cells of the sweep."""
    files = sorted(folder.glob("sweep/*/provenance.json"))
    contents = [(file.parent.name, json.loads(file.read_text("utf-8"))) for file in files]
    return {name: about["started"] for name, about in contents if about.get("status") == "finished"}


def is_midway(folder: Path) -> bool:
    """Whether a cell is finished, and each of the two nodes runs another one."""
    return bool(finished(folder)) and len(list(folder.glob("sweep/*/.running.lock"))) > 1


def main(folder: Path, words: list[str]) -> None:
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    memory = {"object_store_memory": 80_000_000}
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, **memory}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    runs = []
    try:
        _, lost = [cluster.add_node(num_cpus=1, **memory) for _ in range(2)]
        cluster.wait_for_nodes()
        ray = "hydra.launcher.ray"
        command = [sys.executable, "-m", "saexp", "-m", "hydra/launcher=ray", *words]
        command += [f"hydra.sweep.dir={folder}/sweep", f"cache_dir={folder}/cache"]
        command += [f"{ray}.init.address='{cluster.address}'"]
        command += [f"+{ray}.init.object_store_memory=null", f"+{ray}.remote.max_retries=0"]
        for is_first in (True, False):
            with (folder / "out.txt").open("w+") as out:
                process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
                try:
                    while is_first and process.poll() is None and not is_midway(folder):
                        time.sleep(0.05)
                    if is_first:
                        cluster.remove_node(lost, allow_graceful=False)
                    code = process.wait(timeout=PATIENCE_SECONDS)
                finally:
                    process.kill()
                out.seek(0)
                runs.append({"code": code, "out": out.read(), "finished": finished(folder)})
    finally:
        cluster.shutdown()
    (folder / "runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
