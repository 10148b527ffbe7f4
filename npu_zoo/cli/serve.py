"""``serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import ssl

import typer

from npu_zoo.cli.options import model_options, request_options
from npu_zoo.cli.output import note
from npu_zoo.cli.progress import LoadingProgress
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.dispatch import resolve
from npu_zoo.server.keys import ApiKeys
from npu_zoo.server.logs import logging_config
from npu_zoo.server.options import FrontEndOptions, ServeOptions, is_loopback
from npu_zoo.server.tracing import traces_address
from npu_zoo.settings import Settings

_LIBRARIES = ("torch", "fastapi", "uvicorn", "prometheus_client", "limits")


@model_options(ServeOptions, "options", "Server")
@request_options(engine=True)
def serve(settings: Settings, options: ServeOptions) -> None:
    """Serve a model to OpenAI's clients: chat and text completions, streamed or whole.

    The engine runs in a process of its own and is started again should it die. SIGTERM lets running requests finish.
    """
    _require_libraries()
    args = settings.args
    config = resolve(args if args.serving else args.model_copy(update={"serving": "openai"}))
    if config.skip_tokenizer_init:
        raise UsageError("a server needs the tokenizer, and skip_tokenizer_init is set")
    _check(options)
    for text in config.notes:
        note(text)
    _warn_of_exposure(options)
    from npu_zoo.protocol.generation_config import generation_defaults
    from npu_zoo.server.supervisor import Supervisor, follow, listen

    defaults = {**generation_defaults(config.weights), **settings.sampling}
    follow(config)
    listener = listen(options.host, options.port)
    address = _address(options, listener.getsockname()[1])
    with LoadingProgress() as loading:
        supervisor = Supervisor(
            config,
            listener,
            options=FrontEndOptions(options, defaults, draw_seeds=args.seed is None),
            grace_period=options.grace,
            on_loading=loading,
            on_ready=lambda info: note(f"{config.model} on {config.hardware} is served at {address}"),
        )
        code = supervisor.run()
    raise typer.Exit(code)


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}, not installed here: pip install 'npu-zoo[serve]'")


def _check(options: ServeOptions) -> None:
    """Raise for what the front end would fail on, before a model is loaded."""
    ApiKeys.load(options.api_key_file, os.environ)
    logging_config(options.log_format, options.log_level, options.log_file)
    if options.otlp_endpoint is not None:
        traces_address(options.otlp_endpoint)
    if options.ssl_certfile is not None:
        _check_tls(options)


def _check_tls(options: ServeOptions) -> None:
    assert options.ssl_certfile is not None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password=_no_password)
        if options.ssl_ca_certs:
            context.load_verify_locations(options.ssl_ca_certs)
    except (OSError, ValueError) as error:
        files = ", ".join(str(f) for f in (options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs) if f)
        raise ConfigError(f"the TLS files {files} cannot be used: {error}") from error


def _no_password() -> str:
    raise ValueError("the private key has a password; store it without one, readable by the server alone")


def _warn_of_exposure(options: ServeOptions) -> None:
    if not is_loopback(options.host) and not ApiKeys.load(options.api_key_file, os.environ):
        note(f"{options.host} can be reached from other machines, and no API keys are set (--api-key-file)")


def _address(options: ServeOptions, port: int) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{port}/v1"
