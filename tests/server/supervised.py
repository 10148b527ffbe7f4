"""A server with the stand-in front end: ``python supervised.py JSON``. Prints its port, then what happens."""

from __future__ import annotations

import json
import sys

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import NpuZooError
from npu_zoo.dispatch import resolve
from npu_zoo.server.supervisor import RestartPolicy, Supervisor, follow, listen
from npu_zoo.testing.door import unchecked_config


def main(options: dict[str, dict[str, object]]) -> int:
    config = unchecked_config(resolve(EngineArgs(**options["engine"])), **options.get("changes", {}))
    follow(config)
    listener = listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    supervisor = Supervisor(
        config,
        listener,
        front_end="stand_in_front_end:serve",
        options=options.get("front_end"),
        policy=RestartPolicy(**{"backoff": 0.05, **options.get("policy", {})}),
        on_loading=lambda stage, done, total: print(f"loading {stage} {done}/{total}", flush=True),
        on_ready=lambda info: print(f"ready {info.pid}", flush=True),
        **options.get("options", {}),
    )
    try:
        return supervisor.run()
    except NpuZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
