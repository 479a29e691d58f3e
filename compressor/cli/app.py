"""`compress`: the app, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from compressor import __version__
from compressor.cli import checks, demo, doctor, evaluate, recipes, run, serving, single, tune
from compressor.errors import CompressError, Interrupted, UsageError
from compressor.idle_threads import sleep_early

# typer carries its own copy of click in new versions: reach the classes through typer itself.
_ClickError = cast("type[Exception]", typer.BadParameter.__mro__[2])

app = typer.Typer(
    name="compress",
    help="Compress language models: quantize, prune, distill, verify, evaluate and serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"compress {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show full tracebacks.")] = False,
) -> None:
    """Options that stand before the command (--debug is understood anywhere)."""


app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("resume")(run.resume)
app.command("quantize")(single.quantize)
app.command("prune")(single.prune)
app.command("distill")(single.distill)
app.command("eval")(evaluate.evaluate)
app.command("verify")(checks.verify)
app.command("inspect")(checks.inspect)
app.command("serve")(serving.serve)
app.command("generate")(serving.generate)
app.command("bench")(serving.bench)
app.command("tune")(tune.tune)
app.command("doctor")(doctor.doctor)
app.add_typer(recipes.app, name="recipe")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with the exit code of what happened."""
    sleep_early(os.environ)
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run_command(given))


def run_command(given: Sequence[str]) -> int:
    """Run a command line; returns its exit code. Nothing but `SystemExit` gets out."""
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"]
    as_json = "--json" in words
    try:
        result = app(words, prog_name="compress", standalone_mode=False)
        sys.stdout.flush()
        if result == 130:  # typer turns Ctrl-C into this result
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except CompressError as error:
        return _failed(error, words, as_json, debug)
    except _ClickError as error:
        message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
        fix = "see: " + _help_line(error)
        return _failed(UsageError(message, code="US01", fix=fix), words, as_json, debug=False)
    except (KeyboardInterrupt, typer.Abort):
        stopped = Interrupted("stopped at once", signal=2, fix="run the same command again")
        return _failed(stopped, words, as_json, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _bug(error, words, as_json, debug)


def _help_line(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else "compress --help"


def exit_code(error: CompressError) -> int:
    """The class's code; 128 + n when signal n asked for the stop."""
    if isinstance(error, Interrupted) and error.signal is not None:
        return 128 + error.signal
    return error.exit_code


def _failed(error: CompressError, words: list[str], as_json: bool, debug: bool) -> int:
    from compressor.console import show_error

    if debug:
        traceback.print_exception(error)
    show_error(error, as_json=as_json, run_dir=_run_dir_of(words))
    return exit_code(error)


def _bug(error: Exception, words: list[str], as_json: bool, debug: bool) -> int:
    from compressor.run_dir.log import redact

    text = redact("".join(traceback.format_exception(error)))
    file = _save_traceback(text, _run_dir_of(words))
    last = redact(str(error)).strip().splitlines()
    problem = CompressError(
        f"this is a bug: {type(error).__name__}: {last[0] if last else '(no message)'}",
        why=f"The traceback is in {file}.",
        fix="please report it with that file; --debug shows it here",
    )
    return _failed(problem, [*words], as_json, False) if not debug else _shown(text, problem)


def _shown(text: str, problem: CompressError) -> int:
    sys.stderr.write(text)
    return problem.exit_code


def _save_traceback(text: str, run_dir: str) -> str:
    folder = run_dir if run_dir and Path(run_dir).is_dir() else None
    try:
        descriptor, name = tempfile.mkstemp(".txt", "compress-traceback-", folder)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        return f"no file ({error.strerror})"
    return name


def _run_dir_of(words: list[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--run-dir":
            return following
        if word.startswith("--run-dir="):
            return word.partition("=")[2]
    return ""
