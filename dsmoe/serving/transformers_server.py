"""transformers' own server (`transformers serve`) for this architecture: `python -m dsmoe.serving.transformers_server`.

Three things keep the stock command from serving a dsmoe folder without remote code: its process doesn't import this
package, it looks the model class up as an attribute of `transformers`, and a chat request to a model without a chat
template ends in status 500. All else is transformers'.
"""

import functools
import signal
import sys
from typing import Any

import transformers

from dsmoe import DSMoEForCausalLM

NO_TEMPLATE = "has no chat template: use /v1/completions, or give its tokenizer a chat_template"


def prepare() -> None:
    """Make the architecture known to transformers' server."""
    from transformers.cli.serving import server

    setattr(transformers, DSMoEForCausalLM.__name__, DSMoEForCausalLM)
    server.build_server = functools.partial(_with_handler, server.build_server)


def _with_handler(build: Any, *args: Any, **kwargs: Any) -> Any:
    """The app, with an answer for a ValueError that a tokenizer without a template raises."""
    from fastapi.responses import JSONResponse

    app = build(*args, **kwargs)

    async def explain(_request: Any, error: Exception) -> Any:
        text = str(error)
        status = 500
        if "chat_template" in text or "chat template" in text:
            text, status = f"this model {NO_TEMPLATE}", 400
        return JSONResponse({"error": {"message": text, "type": type(error).__name__}}, status_code=status)

    app.add_exception_handler(ValueError, explain)
    return app


def main() -> None:
    """The command `transformers`, with the architecture known to it."""
    prepare()
    from transformers.cli.transformers import app

    # uvicorn shuts down and sends itself the signal again, of which the command line would make status 1
    signal.signal(signal.SIGINT, lambda _number, _frame: sys.exit(130))
    app()


if __name__ == "__main__":
    main()
