"""A site's executor: takes the messages its SuperNode has received and lets the installed ClientApp answer them.

Flower's own executor unpacks the code that came with a run and starts a process with it for every message. This one runs no code but what
is installed here, whatever was sent along, and it is one process that lasts. The SuperNode must be started with `--isolation process`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors.http import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

App: TypeAlias = Callable[[Message, Context], Message]
"""A ClientApp."""

PAUSE = 0.2  # seconds between looks for a message
PROTECTED = frozenset({"/flwr.proto.Runtime/AcquireTask"})
log = logging.getLogger("fedgraft.executor")


class TaskStopped(Exception):
    """The run of the message in hand was stopped; raised from Flower's heartbeat by way of SIGINT."""


class Executor:
    """Answers one message after another."""

    def __init__(self, address: str, secret: bytes, app: App) -> None:
        self.address, self.app = address, app
        self.client = self._connect(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=PROTECTED))

    def serve(self) -> None:
        """Until the process is ended."""
        while True:
            try:
                task = self.client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
                if task.token:
                    self._answer(task.token)
                else:
                    time.sleep(PAUSE)
            except TaskStopped:
                log.warning("the run was stopped; its question is dropped")
            except httpx.TransportError:
                time.sleep(PAUSE)  # the SuperNode starts or ends

    def _answer(self, token: str) -> None:
        """Pull the message that belongs to a token, have it answered, push the reply."""
        client = self._connect(RuntimeTokenHttpInterceptor(token))
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        context, status, details = None, SubStatus.FAILED, "the executor was stopped"
        try:
            heartbeat.start()
            message, context, _, _ = pull_task_input(client)
            reply, details = self._reply(message, context)
            push_message(client, reply, context)
            status = SubStatus.FAILED if details else SubStatus.COMPLETED
        finally:
            push_task_output(client, context, status, details)
            heartbeat.stop()
            client.close()

    def _reply(self, message: Message, context: Context) -> tuple[Message, str]:
        """The reply, and why it is an error ("" when it is none)."""
        try:
            return self.app(message, context), ""
        except TaskStopped:
            raise
        except Exception as error:
            log.exception("the message could not be answered")
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message), reason

    def _connect(self, authentication: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=True,  # on this machine only: the SuperNode serves its executor on loopback
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), authentication],
            retry_invoker=make_simple_http_retry_invoker(),
        )


def load(reference: str) -> App:
    """The installed ClientApp that `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    app: App = getattr(importlib.import_module(module), attribute)
    return app


def main() -> None:
    """The command: where the SuperNode serves its executor, the secret they share, and the app."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--address", "--secret-file", "--app"):
        parser.add_argument(name, required=True)
    words = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every look
    signal.signal(signal.SIGINT, _stop_task)
    Executor(words.address, Path(words.secret_file).read_bytes(), load(words.app)).serve()


def _stop_task(number: int, frame: FrameType | None) -> None:
    raise TaskStopped


if __name__ == "__main__":
    main()
