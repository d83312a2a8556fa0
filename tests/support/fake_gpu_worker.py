"""Stands in for `machine.gpu_worker`: answers as that does, without compiling."""

import json
import os
import sys
import time
from pathlib import Path

HLO = "HloModule fake\nENTRY %main () -> f32[] {\n  ROOT %c = f32[4]{0} copy(%p)\n}\n"


def main() -> None:
    """One answer for each request; the number of classes says which."""
    for line in sys.stdin:
        request = json.loads(line)
        match request["num_classes"]:
            case 1:
                answer = {"user_error": "the batch is odd"}
            case 2:
                answer = {"error": "XlaRuntimeError: no such thing"}
            case 3:
                print("fatal: out of registers", file=sys.stderr)
                raise SystemExit(7)
            case 4:
                time.sleep(600)
                raise SystemExit(1)
            case _:
                Path(request["text"]).write_text(HLO)
                assert os.environ["JAX_PLATFORMS"] == "cpu"
                answer = {
                    "temporary_bytes": request["config"]["data"]["global_batch_size"],
                    "argument_bytes": int(sys.argv[2]),
                    "output_bytes": 0,
                    "alias_bytes": 0,
                    "state": {"centers": 1},
                    "seconds": 0.5,
                }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
