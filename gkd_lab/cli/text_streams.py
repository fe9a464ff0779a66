"""Text of any script in and out: UTF-8 mode where the locale has none, and output that no name can crash."""

import codecs
import io
import os
import sys

_ERROR_HANDLER = "gkd_lab_readable"


def restart_in_utf8_mode() -> None:
    """Start the process again in Python's UTF-8 mode if file names are ASCII to it, as with `LC_ALL=C`.

    Without that mode names on the command line are half decoded, and names in a file cannot be opened. Child
    processes inherit it. Returns if it is not needed.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    environment = os.environ | {"PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], environment)


def accept_any_text() -> None:
    """Let standard output and error write any text.

    Bytes of a file name that are no text are written as they are; other characters that the stream's encoding
    lacks, as half of an emoji, as `\\ud83d`.
    """
    codecs.register_error(_ERROR_HANDLER, _replace_unwritable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _replace_unwritable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return (replacement, where to go on) for the first character that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character, end = error.object[error.start], error.start + 1
    single = UnicodeEncodeError(error.encoding, error.object, error.start, end, error.reason)
    if "\udc80" <= character <= "\udcff":
        return codecs.lookup_error("surrogateescape")(single)
    return codecs.backslashreplace_errors(single)
