"""The process in which a tool of one's own runs, where it can be killed.

`WorkerPool` runs it as a script, `tool_worker.py module:function memory_bytes alarm_seconds`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


def load() -> Callable[[str, int], list[str]]:
    """Imports the function, and gives what calls it: status and text of an argument."""
    from distrl_envs.grading.code_session import shortened
    from distrl_envs.user_code import load_attribute, named

    function = load_attribute(sys.argv[1])

    def call(argument: str, most: int) -> list[str]:
        try:
            said = function(argument)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            return ["error", shortened(named(error), most)[0]]
        if not isinstance(said, str):
            return ["no text", f"{said!r:.80} ({type(said).__name__})"]
        text, cut = shortened(said, most)
        return ["cut" if cut else "ok", text]

    return call


if __name__ == "__main__":
    sys.path.pop(0)  # This folder, whose modules would hide others of their names.
    from distrl_envs.grading.worker_loop import serve

    serve(load)
