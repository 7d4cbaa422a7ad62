"""The child process of one model in one engine, as the benchmark sees it; `serving_child` is what runs in it."""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from dsmoe.bench.serving_engines import INSTALL, NEEDS

# named as the console command, which loads torch only where it is needed
CODE = "import sys; sys.argv[0] = 'dsmoe'; from dsmoe.bench.serving_child import main; sys.exit(main())"
_ROOT = Path(__file__).resolve().parents[2]
_LOG_CHARACTERS = 2000


class EngineFailureError(Exception):
    """An engine that is missing, refuses a model, ends or doesn't answer; the message is one line."""


def python_of(engine: str, other: str | None) -> str:
    """The interpreter for an engine: this one where it is installed here, else the other one, if one was given."""
    return other if other and importlib.util.find_spec(NEEDS[engine]) is None else sys.executable


def command_of(python: str) -> list[str]:
    """The command line of a child process."""
    return [python, "-c", CODE]


class Child:
    """A process with a model loaded.

    Args:
        job: what `serving_child` takes.
        python: interpreter.
        timeout: seconds that an answer may take.

    Raises:
        EngineFailureError: it can't be started.
    """

    def __init__(self, job: dict[str, Any], python: str, timeout: float) -> None:
        self._engine, self._python, self._timeout = job["engine"], python, timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        try:
            self._process = subprocess.Popen(
                command_of(python), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                env=_environment(job), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise EngineFailureError(f"{python} can't be started ({error})") from None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, value: dict[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises:
            EngineFailureError: it tells of an error, there is none, or it takes too long.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: the answer tells
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            raise EngineFailureError(f"no answer within {self._timeout:g} s") from None
        if line is None:
            self._process.wait()
            raise EngineFailureError(
                f"its process ended with status {self._process.returncode}{self._last_words()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailureError(self._explained(answer["error"]))
        return answer

    def _explained(self, error: str) -> str:
        package = NEEDS[self._engine]
        if error.startswith("ModuleNotFoundError") and f"'{package}'" in error:
            return (
                f"{package} is not installed for {Path(self._python).name}: {INSTALL[self._engine]}, or --python with "
                "the interpreter of an environment that has it"
            )
        return error

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_CHARACTERS))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""

    def close(self, seconds: float = 20.0) -> None:
        """End the process and wait for it; after so many seconds by force."""
        if self._log.closed:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with contextlib.suppress(OSError):  # and what it has started
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._log.close()


def _environment(job: dict[str, Any]) -> dict[str, str]:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    bound = ",".join(map(str, job["cores"])) or "nobind"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(job["threads"]),
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "TOKENIZERS_PARALLELISM": "false",
    }
